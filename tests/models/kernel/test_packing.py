"""Packs: every example once, the budget kept, the same whatever the order of the rows, and even over ranks."""

import gzip
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from davir_ray.models.kernel.likelihood import TOKENS_PER_PACK
from davir_ray.models.kernel.packing import deal, pack

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 500))
def test_every_row_is_packed_once_within_the_budget(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    packs = pack(sizes, np.arange(len(sizes)), budget)
    assert sorted(int(row) for rows in packs for row in rows) == list(range(len(sizes)))
    for rows in packs:
        assert len(rows) == 1 or (len(rows) > 1 and sizes[rows].sum() <= budget)


@given(LENGTHS, st.integers(1, 500))
def test_packs_are_sorted_by_length_then_id_and_none_could_take_the_next_example(
    lengths: list[int], budget: int
) -> None:
    sizes, ids = np.array(lengths, dtype=np.int64), np.arange(len(lengths))[::-1]
    packs = pack(sizes, ids, budget)
    listed = [(int(sizes[row]), int(ids[row])) for rows in packs for row in rows]
    assert listed == sorted(listed)
    for rows, following in itertools.pairwise(packs):
        assert sizes[rows].sum() + sizes[following[0]] > budget


@given(LENGTHS, st.integers(1, 500))
def test_packs_do_not_depend_on_the_order_of_the_rows(lengths: list[int], budget: int) -> None:
    sizes, ids = np.array(lengths, dtype=np.int64), np.arange(100, 100 + len(lengths))
    order = np.random.default_rng(len(lengths) + budget).permutation(len(lengths))
    shuffled = pack(sizes[order], ids[order], budget)
    expected = [ids[rows].tolist() for rows in pack(sizes, ids, budget)]
    assert [ids[order][rows].tolist() for rows in shuffled] == expected


def test_no_rows_give_no_packs() -> None:
    assert pack(np.empty(0, np.int64), np.empty(0, np.int64), 10) == []


def test_examples_longer_than_the_budget_stand_alone() -> None:
    packs = pack(np.array([50, 3, 60, 3]), np.arange(4), 10)
    assert [rows.tolist() for rows in packs] == [[1, 3], [0], [2]]


def test_a_pack_may_hold_as_many_tokens_as_the_budget() -> None:
    packs = pack(np.array([3, 3, 4]), np.arange(3), 6)
    assert [rows.tolist() for rows in packs] == [[0, 1], [2]]


@given(LENGTHS.filter(bool), st.integers(1, 500), st.integers(1, 9))
def test_every_row_is_dealt_once_in_as_few_turns_as_the_budget_allows(
    lengths: list[int], budget: int, num_ranks: int
) -> None:
    sizes, ids = np.array(lengths, dtype=np.int64), np.arange(len(lengths))
    turns = deal(sizes, ids, budget, num_ranks)
    packs = [rows for turn in turns for rows in turn if rows is not None]
    assert sorted(int(row) for rows in packs for row in rows) == list(range(len(sizes)))
    assert all(len(rows) == 1 or sizes[rows].sum() <= budget for rows in packs)
    assert {len(turn) for turn in turns} == {num_ranks}
    assert all(any(rows is not None for rows in turn) for turn in turns)
    assert len(turns) == math.ceil(len(pack(sizes, ids, budget)) / num_ranks)


@given(LENGTHS.filter(bool), st.integers(1, 500), st.integers(1, 9))
def test_no_smaller_budget_would_do_with_the_same_number_of_turns(
    lengths: list[int], budget: int, num_ranks: int
) -> None:
    sizes, ids = np.array(lengths, dtype=np.int64), np.arange(len(lengths))
    turns = deal(sizes, ids, budget, num_ranks)
    most = max(int(sizes[rows].sum()) for turn in turns for rows in turn if rows is not None)
    if most > max(lengths):
        assert len(pack(sizes, ids, most - 1)) > len(turns) * num_ranks


def test_a_rank_without_a_row_has_no_pack() -> None:
    turns = deal(np.array([3, 5]), np.arange(2), 100, 4)
    assert [[None if rows is None else rows.tolist() for rows in turn] for turn in turns] == [[[1], [0], None, None]]


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_of_alpaca_keep_every_rank_busy(
    data_folder: Path, tokenizer: PreTrainedTokenizerFast, device: str, num_ranks: int
) -> None:
    with gzip.open(data_folder / "alpaca_9k.jsonl.gz", "rt") as lines:
        texts = ["\n\n".join(json.loads(line).values()) for line in lines]
    lengths = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    order = np.random.default_rng(0).permutation(len(lengths))
    shares = []
    for start in range(0, len(order) - 127, 128):
        of_batch = lengths[order[start : start + 128]]
        turns = deal(of_batch, np.arange(128), TOKENS_PER_PACK[device], num_ranks)
        by_rank = zip(*turns, strict=True)
        of_rank = [sum(int(of_batch[rows].sum()) for rows in packs if rows is not None) for packs in by_rank]
        shares.append(of_batch.sum() / (num_ranks * max(of_rank)))
    assert np.mean(shares) >= 0.95
