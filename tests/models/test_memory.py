"""A token budget: every row once, in packs that fit; what fits nowhere costs no other row."""

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from families import PACKABLE, config_of, make
from hypothesis import given
from hypothesis import strategies as st

from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.packing import pack
from davir_ray.models.memory import TokenBudget

Rows = npt.NDArray[np.int64]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200), st.integers(1, 60), st.data())
def test_every_row_that_fits_is_run_once_whatever_the_memory(
    lengths: list[int], budget: int, room: int, data: st.DataObject
) -> None:
    """`room` is how many tokens the device has memory for."""
    rows = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(lengths)))))) if lengths else [], dtype=np.int64)
    lengths_R, ids_R = np.array(lengths, dtype=np.int64), np.arange(len(lengths))[::-1].copy()

    def forward(packed: Rows) -> int:
        if lengths_R[packed].sum() > room:
            raise torch.OutOfMemoryError("no room")
        return int(lengths_R[packed].sum())

    budgeted = TokenBudget(budget)
    found = list(budgeted.run(forward, rows, lengths_R, ids_R))
    assert sorted(row for packed, _ in found for row in packed) == [row for row in rows if lengths[row] <= room]
    assert all(tokens == lengths_R[packed].sum() for packed, tokens in found)
    assert budgeted.num_tokens <= budget


def test_a_pack_is_run_before_the_next_is_cut_and_in_the_order_of_packing() -> None:
    lengths, ids = np.array([9, 3, 4, 8, 1]), np.arange(5)
    began: list[list[int]] = []
    for number, (rows, _) in enumerate(TokenBudget(8).run(lambda rows: began.append(rows.tolist()), ids, lengths, ids)):
        assert began[number:] == [rows.tolist()]
    assert began == [rows.tolist() for rows in pack(lengths, ids, 8)]


def test_a_pack_that_does_not_fit_halves_the_budget_for_good() -> None:
    lengths, ids = np.full(6, 10), np.arange(6)
    budget = TokenBudget(60)
    sizes: list[int] = []

    def forward(rows: Rows) -> None:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no room")

    assert [rows.tolist() for rows, _ in budget.run(forward, ids, lengths, ids)] == [[0], [1], [2], [3], [4], [5]]
    assert (sizes, budget.num_tokens) == ([6, 3, 1, 1, 1, 1, 1, 1], 15)
    sizes.clear()
    list(budget.run(forward, ids, lengths, ids))
    assert sizes == [1] * 6


@pytest.mark.parametrize("family", PACKABLE)
def test_nothing_of_a_pass_that_ran_out_of_memory_is_alive_when_the_next_begins(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise half a pack might not fit, either."""
    likelihood = Likelihood(make(config_of(family)))
    lengths, ids = np.full(4, 9), np.arange(4)
    examples = [(np.arange(9, dtype=np.int32) + row, (1, 9)) for row in range(4)]
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        made.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
        if len(made) > 12 and not alive:  # in a middle layer of the first pass
            raise torch.OutOfMemoryError("no room")

    for module in likelihood.model.get_decoder().modules():
        module.register_forward_hook(keep)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(ref() is not None for ref in made)))
    with torch.inference_mode():
        budget = TokenBudget(36)
        runs = list(budget.run(lambda rows: likelihood(Pack.of([examples[row] for row in rows])), ids, lengths, ids))
    assert alive == [0]
    assert [len(rows) for rows, _ in runs] == [2, 2]
