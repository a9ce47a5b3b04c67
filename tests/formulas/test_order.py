"""The order of a ranking and its bins, against numpy's sort and comparisons of Python tuples."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from davir_ray.formulas.hashing import Ids, Keys, random_keys
from davir_ray.formulas.order import bins, boundaries, order, value_keys

DENORMAL = 5e-324
SPECIAL = [np.inf, -np.inf, 0.0, -0.0, DENORMAL, -DENORMAL, 2.2250738585072014e-308, 1.7976931348623157e308, 1.0, -1.0]
VALUES = st.lists(st.one_of(st.floats(allow_nan=False), st.sampled_from(SPECIAL)), max_size=60)
COMPOSITES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=60, unique=True)


def shuffled_ids(count: int) -> Ids:
    return np.random.default_rng(3).permutation(count).astype(np.int64)


@given(VALUES)
def test_value_keys_order_as_numpy_sorts_the_values(listed: list[float]) -> None:
    values, ids = np.array(listed, dtype=np.float64), shuffled_ids(len(listed))
    np.testing.assert_array_equal(order(value_keys(values), ids), np.lexsort((ids, -values)))
    np.testing.assert_array_equal(order(value_keys(values, lowest=True), ids), np.lexsort((ids, values)))


@given(VALUES)
def test_keys_are_equal_exactly_where_values_are(listed: list[float]) -> None:
    values = np.array(listed, dtype=np.float64)
    keys = value_keys(values)
    np.testing.assert_array_equal(keys[:, None] == keys[None, :], values[:, None] == values[None, :])


def test_special_values_stand_in_their_place() -> None:
    values = np.array(SPECIAL)
    ranked = values[order(value_keys(values), np.arange(len(values)))]
    assert ranked[0] == np.inf
    assert ranked[-1] == -np.inf
    assert np.all(np.diff(ranked[1:-1]) <= 0)
    assert value_keys(np.array([0.0])) == value_keys(np.array([-0.0]))


def test_ties_by_the_thousand_go_by_ascending_id() -> None:
    values = np.random.default_rng(0).integers(0, 4, 20_000).astype(np.float64)
    ids = shuffled_ids(len(values))
    ranked = order(value_keys(values), ids)
    np.testing.assert_array_equal(ranked, np.lexsort((ids, -values)))
    assert np.all(np.diff(ids[ranked])[np.diff(values[ranked]) == 0] > 0)


@pytest.mark.parametrize("lowest", [False, True])
def test_nan_is_refused(lowest: bool) -> None:
    with pytest.raises(ValueError, match="NaN"):
        value_keys(np.array([1.0, np.nan]), lowest=lowest)


def test_random_keys_do_not_collide_and_leave_no_trace_of_the_ids() -> None:
    ids = np.arange(100_000, dtype=np.int64)
    keys = random_keys(ids, seed=0)
    assert len(np.unique(keys)) == len(ids)
    rank = np.argsort(np.argsort(keys))
    assert abs(np.corrcoef(ids, rank)[0, 1]) < 0.02
    assert abs(np.corrcoef(rank[:-1], rank[1:])[0, 1]) < 0.02
    counts = np.bincount((keys >> np.uint64(56)).astype(np.int64), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 370  # chi-squared, 255 degrees: p < 1e-5


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 2**63 - 1), min_size=1, unique=True))
def test_a_random_key_depends_on_seed_and_id_only(seed: int, listed: list[int]) -> None:
    ids = np.array(listed, dtype=np.int64)
    keys = random_keys(ids, seed)
    np.testing.assert_array_equal(random_keys(ids[::-1], seed)[::-1], keys)
    assert random_keys(ids[-1:], seed)[0] == keys[-1]
    np.testing.assert_array_equal(order(random_keys(ids, seed, lowest=True), ids), order(keys, ids)[::-1])


def test_seeds_share_no_keys_of_neighbouring_ids() -> None:
    ids = np.arange(10_000, dtype=np.int64)
    keys = np.concatenate([random_keys(ids, seed) for seed in range(5)])
    assert len(np.unique(keys)) == len(keys)


def test_seeds_give_unrelated_orders() -> None:
    ids = np.random.default_rng(1).integers(0, 2**63 - 1, 20_000)
    ranks = np.array([np.argsort(order(random_keys(ids, seed), ids)) for seed in (0, 1, 2, 12345)])
    correlations = np.corrcoef(ranks) - np.eye(len(ranks))
    assert np.abs(correlations).max() < 0.04


@given(COMPOSITES, COMPOSITES)
def test_a_bin_is_the_number_of_boundaries_at_or_before_the_row(
    rows: list[tuple[int, int]], cuts: list[tuple[int, int]]
) -> None:
    keys, ids = composite(rows)
    boundary_keys, boundary_ids = composite(sorted(cuts))
    expected = [sum(cut <= row for cut in cuts) for row in rows]
    assert bins(keys, ids, boundary_keys, boundary_ids).tolist() == expected


def test_bins_of_thousands_of_ties_are_those_of_tuple_comparison() -> None:
    draw = np.random.default_rng(5)
    keys, ids = draw.integers(0, 3, 3000).astype(np.uint64), shuffled_ids(3000)
    cuts = sorted(zip(draw.integers(0, 4, 40).tolist(), draw.permutation(4000)[:40].tolist(), strict=True))
    rows = list(zip(keys.tolist(), ids.tolist(), strict=True))
    assert bins(keys, ids, *composite(cuts)).tolist() == [sum(cut <= row for cut in cuts) for row in rows]


@pytest.mark.parametrize("num_distinct", [1, 2, 3, 1000])
@pytest.mark.parametrize("num_bins", [1, 2, 7, 64])
def test_boundaries_cut_any_ties_into_equal_bins_in_ranking_order(num_distinct: int, num_bins: int) -> None:
    keys = np.random.default_rng(2).integers(0, num_distinct, 5000).astype(np.uint64)
    ids = shuffled_ids(5000)
    row_bins = bins(keys, ids, *boundaries(keys, ids, num_bins))
    counts = np.bincount(row_bins, minlength=num_bins)
    assert counts.max() - counts.min() <= 1
    assert np.all(np.diff(row_bins[order(keys, ids)]) >= 0)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5])
def test_more_bins_than_rows_leave_bins_empty(num_rows: int) -> None:
    keys, ids = np.zeros(num_rows, dtype=np.uint64), shuffled_ids(num_rows)
    boundary_keys, boundary_ids = boundaries(keys, ids, 8)
    assert len(boundary_keys) == len(boundary_ids) <= max(0, num_rows - 1)
    row_bins = bins(keys, ids, boundary_keys, boundary_ids)
    assert sorted(row_bins.tolist()) == list(range(num_rows))


def composite(rows: list[tuple[int, int]]) -> tuple[Keys, Ids]:
    table: npt.NDArray[np.int64] = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0].astype(np.uint64), table[:, 1].copy()
