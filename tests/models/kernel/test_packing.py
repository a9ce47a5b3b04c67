"""Packs: every example once, the budget kept, the same whatever the order of the rows."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from davir_ray.models.kernel.packing import pack

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
