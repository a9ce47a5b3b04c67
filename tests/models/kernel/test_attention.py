"""The packed attention function against attention written out in float64, one sequence and one head at a time."""

import itertools
import math
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from davir_ray.models.kernel.attention import PACKED_ATTENTION, packed_attention, register_packed_attention
from davir_ray.models.kernel.by_length import equal_runs

LENGTHS = (5, 9, 9, 9, 1, 30)
HEADS, DIM = 4, 16
MODULE = torch.nn.Module()


def draw(key_heads: int, num_tokens: int = sum(LENGTHS)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        2 * torch.randn(1, heads, num_tokens, DIM, generator=generator) for heads in (HEADS, key_heads, key_heads)
    )
    return query, key, value


def places(lengths: tuple[int, ...]) -> dict[str, Any]:
    """The keywords that say where the sequences of a pack lie."""
    edges = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
    return {
        "sequence_edges": edges, "sequence_edges_on_cpu": edges, "longest_sequence": max(lengths, default=0),
    }  # fmt: skip


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[1, heads, T, D] → [1, T, heads, D] in float64, by loops over sequences, heads and queries."""
    result = torch.zeros(1, query.shape[2], HEADS, DIM, dtype=torch.float64)
    group = HEADS // key.shape[1]
    starts = itertools.accumulate(lengths, initial=0)
    for (start, length), head in itertools.product(zip(starts, lengths, strict=False), range(HEADS)):
        for at in range(start, start + length):
            first = start if window is None else max(start, at - window + 1)
            seen = slice(first, at + 1)
            weights = key[0, head // group, seen].double() @ query[0, head, at].double()
            weights = weights * (scaling if scaling is not None else 1 / math.sqrt(DIM))
            if softcap is not None:
                weights = softcap * torch.tanh(weights / softcap)
            result[0, at, head] = torch.softmax(weights, dim=0) @ value[0, head // group, seen].double()
    return result


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_each_sequence_attends_to_its_own_past(
    key_heads: int, scaling: float | None, window: int | None, softcap: float | None
) -> None:
    query, key, value = draw(key_heads)
    result, weights = packed_attention(
        MODULE, query, key, value, None,
        **places(LENGTHS), scaling=scaling, sliding_window=window, softcap=softcap,
    )  # fmt: skip
    assert weights is None
    expected = written_out(query, key, value, LENGTHS, scaling, window, softcap)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_lengths_every_row_of_the_batch_is_one_sequence() -> None:
    query, key, value = (x.reshape(2, x.shape[1], 10, DIM) for x in draw(2, num_tokens=20))
    result, _ = packed_attention(MODULE, query, key, value, None)
    for row in range(2):
        one = (x[row : row + 1] for x in (query, key, value))
        expected = written_out(*one, (10,), None, None, None)
        torch.testing.assert_close(result[row : row + 1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [(20,), (5, 5), (), (30,)])
def test_lengths_that_do_not_fill_the_pack_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        packed_attention(MODULE, *draw(2, num_tokens=25), None, **places(lengths))


def test_transformers_makes_no_mask_for_it_and_does_not_wait_to_look_for_sequences() -> None:
    register_packed_attention()
    assert PACKED_ATTENTION not in ALL_MASK_ATTENTION_FUNCTIONS


def test_several_rows_are_no_pack() -> None:
    rows = [x.reshape(2, x.shape[1], 10, DIM) for x in draw(2, num_tokens=20)]
    with pytest.raises(ValueError, match="one row of tokens; got 2"):
        packed_attention(MODULE, *rows, None, **places((4, 6)))


def test_neighbours_of_equal_length_are_one_run() -> None:
    assert equal_runs((5, 9, 9, 9, 1, 9)) == [(0, 1, 5), (5, 3, 9), (32, 1, 1), (33, 1, 9)]
    assert equal_runs(()) == []
