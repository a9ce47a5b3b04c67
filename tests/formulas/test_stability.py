"""Means of places, overlaps beyond chance and their intervals: by hand, and against SciPy and simulations."""

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from davir_ray.formulas.stability import agreement, beyond_chance, over_references

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def test_mean_and_spread_are_over_the_references_that_have_a_place() -> None:
    places_NR = np.random.default_rng(0).random((200, 4))
    places_NR[np.random.default_rng(1).random((200, 4)) < 0.4] = np.nan
    found = over_references(places_NR)
    assert 0 < (found.num_N == 0).sum() < (found.num_N == 1).sum()
    for row, places in enumerate(places_NR):
        there = [float(place) for place in places if not np.isnan(place)]
        assert found.num_N[row] == len(there)
        assert found.mean_N[row] == pytest.approx(sum(there) / len(there) if there else np.nan, nan_ok=True)
        sd = stats.tstd(there) if len(there) > 1 else np.nan
        assert found.sd_N[row] == pytest.approx(sd, nan_ok=True)


def test_rows_whose_places_have_the_same_sum_have_the_same_mean() -> None:
    """As they are ties, which the ids decide, and not the rounding of a sum."""
    draw = np.random.default_rng(2)
    ranks_NR = draw.integers(0, 40, (3000, 3))
    found = over_references((ranks_NR + 0.5) / 150)
    for total in np.unique(ranks_NR.sum(axis=1)):
        assert len(set(found.mean_N[ranks_NR.sum(axis=1) == total])) == 1


def test_the_order_of_the_references_changes_no_bit() -> None:
    places_NR = np.random.default_rng(0).random((500, 5))
    one, other = over_references(places_NR), over_references(places_NR[:, ::-1].copy())
    np.testing.assert_array_equal(one.mean_N, other.mean_N)
    np.testing.assert_array_equal(one.sd_N, other.sd_N)


@pytest.mark.parametrize(("num_selected", "num_rows"), [(5, 40), (30, 40)])
def test_overlap_is_none_by_chance_and_one_if_all_is_common(num_selected: int, num_rows: int) -> None:
    """The mean number of common rows of two random draws is that of the hypergeometric distribution."""
    by_chance = stats.hypergeom(num_rows, num_selected, num_selected).mean()
    chance = num_selected / num_rows
    assert beyond_chance(by_chance / num_selected, chance) == pytest.approx(0, abs=1e-12)
    assert beyond_chance(1.0, chance) == 1


def common_of(best_NR: Bools) -> npt.NDArray[np.int64]:
    num = best_NR.shape[1]
    return np.array([[(best_NR[:, one] & best_NR[:, other]).sum() for other in range(num)] for one in range(num)])


def test_the_mean_is_over_all_pairs_and_the_interval_leaves_out_each_reference() -> None:
    common_RR = np.array([[20, 12, 9, 15], [12, 20, 10, 14], [9, 10, 20, 7], [15, 14, 7, 20]])
    found = agreement(common_RR, 20, 100)
    assert found is not None
    overlaps = {pair: (common_RR[pair] / 20 - 0.2) / 0.8 for pair in combinations(range(4), 2)}
    mean = sum(overlaps.values()) / 6
    pseudo_values = []
    for left_out in range(4):
        others = [overlap for pair, overlap in overlaps.items() if left_out not in pair]
        pseudo_values.append(4 * mean - 3 * sum(others) / 3)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(pseudo_values))
    assert found == (pytest.approx(mean), pytest.approx(low), pytest.approx(high), "references")


def test_two_references_have_the_interval_of_a_share_of_rows() -> None:
    found = agreement(np.array([[50, 30], [30, 50]]), 50, 1000)
    wilson = stats.binomtest(30, 50).proportion_ci(method="wilson")
    low, high = ((end - 0.05) / 0.95 for end in wilson)
    assert found == (pytest.approx(0.55 / 0.95), pytest.approx(low), pytest.approx(high), "rows")


@pytest.mark.parametrize("common", [0, 3])
def test_references_that_all_overlap_alike_are_no_proof_of_certainty(common: int) -> None:
    common_RR = np.where(np.eye(3, dtype=bool), 3, common)
    found = agreement(common_RR, 3, 30)
    wilson = stats.binomtest(common, 3).proportion_ci(method="wilson")
    assert found is not None
    assert found.over == "rows"
    assert found[1:3] == pytest.approx([(end - 0.1) / 0.9 for end in wilson])


def test_where_all_rows_are_selected_or_one_reference_scored_there_is_no_overlap() -> None:
    assert agreement(np.full((2, 2), 10), 10, 10) is None
    assert agreement(np.full((1, 1), 10), 10, 20) is None


def test_no_interval_leaves_what_is_possible() -> None:
    for common_RR in (np.array([[9, 9, 1], [9, 9, 8], [1, 8, 9]]), np.array([[9, 0, 9], [0, 9, 1], [9, 1, 9]])):
        found = agreement(common_RR, 9, 100)
        assert found is not None
        assert (0 - 0.09) / 0.91 - 1e-12 <= found.low < found.mean < found.high <= 1
    found = agreement(np.array([[9, 8, 9], [8, 9, 8], [9, 8, 9]]), 9, 10)
    assert found is not None
    assert found.low == pytest.approx((8 / 9 - 0.9) / 0.1), "two selections of 9 of 10 rows have 8 in common at least"


NUM_ROWS, NUM_BEST = 500, 50


def references(values_N: Floats, num: int, draw: np.random.Generator, spread: float, axes_AN: Floats) -> Bools:
    """The best rows of references that differ in noise by row, in how much of it, and in what they have learnt."""
    scales = 0.7 * np.exp(spread * draw.normal(size=(num, 1)))
    noise = scales * draw.normal(size=(num, len(values_N))) + draw.normal(size=(num, len(axes_AN))) @ axes_AN
    cuts = -np.partition(-(values_N + noise), NUM_BEST - 1, axis=1)[:, NUM_BEST - 1 : NUM_BEST]
    return ((values_N + noise) >= cuts).T


@pytest.mark.parametrize("num_references", [3, 5])
@pytest.mark.parametrize(("spread", "learnt"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
def test_the_interval_holds_the_overlap_of_two_more_references(
    num_references: int, spread: float, learnt: float
) -> None:
    """In 95 of 100 sets of references, or nearly: the rows stay as they are."""
    draw = np.random.default_rng(5)
    held = []
    for _ in range(12):
        values_N, axes_AN = draw.normal(size=NUM_ROWS), learnt * draw.normal(size=(2, NUM_ROWS))
        many = references(values_N, 80, draw, spread, axes_AN).astype(float)
        common_RR = many.T @ many
        pairs = common_RR[np.triu_indices(80, 1)] / NUM_BEST
        true = (pairs.mean() - NUM_BEST / NUM_ROWS) / (1 - NUM_BEST / NUM_ROWS)
        for _ in range(25):
            found = agreement(
                common_of(references(values_N, num_references, draw, spread, axes_AN)), NUM_BEST, NUM_ROWS
            )
            assert found is not None
            held.append(found.low <= true <= found.high)
    assert np.mean(held) > 0.9


def test_the_interval_of_two_references_holds_the_overlap_where_only_rows_are_drawn() -> None:
    """Each row has noise of its own, and the rows are drawn, too."""
    draw = np.random.default_rng(6)
    many = [references(draw.normal(size=NUM_ROWS), 2, draw, 0.0, np.zeros((1, NUM_ROWS))) for _ in range(400)]
    found = [agreement(common_of(pair), NUM_BEST, NUM_ROWS) for pair in many]
    true = np.mean([one.mean for one in found if one])
    assert np.mean([one.low <= true <= one.high for one in found if one]) > 0.93
