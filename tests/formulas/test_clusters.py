"""Measures of clustered pairs and their intervals: equal to loops, scipy's bootstrap and tables of variance by hand.

In simulations their intervals contain the truth about as often as they should.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import optimize, stats

from davir_ray.formulas.clusters import (
    Clusters,
    Comparison,
    Estimate,
    Measure,
    compare_correlations,
    compare_shares,
    correlation_interval,
    mean,
    mean_interval,
    pearson,
    share_interval,
    spearman,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def layout(num_pairs: int, draw: np.random.Generator) -> Ints:
    """The cluster of each pair: clusters of 1 to 4 pairs."""
    sizes = draw.integers(1, 5, num_pairs)
    return np.repeat(np.arange(num_pairs), sizes)[:num_pairs]


def shared(values: Callable[[int], Floats], cluster_N: Ints, share: float) -> Floats:
    """Values of which a share of the variance is common to a cluster."""
    of_clusters = values(int(cluster_N.max()) + 1)
    return np.asarray(math.sqrt(share) * of_clusters[cluster_N] + math.sqrt(1 - share) * values(len(cluster_N)))


def rounded_pairs(num_pairs: int = 300) -> tuple[Floats, Floats, Ints]:
    """Correlated values with ties, and keys of clusters in no order."""
    draw = np.random.default_rng(3)
    cluster_N = layout(num_pairs, draw)
    x_N = np.round(5 * shared(draw.standard_normal, cluster_N, 0.4))
    y_N = np.round(x_N / 4 + 2 * shared(draw.standard_normal, cluster_N, 0.4), 1)
    order = draw.permutation(num_pairs)
    return x_N[order], y_N[order], cluster_N[order] * 1_000_003 - 2**40


def bootstrap_error(statistic: Callable[[Ints], float], keys_N: Ints) -> float:
    """The standard error by scipy's bootstrap, with clusters as the units that are drawn."""
    members = [np.flatnonzero(keys_N == key) for key in np.unique(keys_N)]

    def of_drawn(drawn: Ints) -> float:
        return statistic(np.concatenate([members[one] for one in drawn]))

    found = stats.bootstrap(
        (np.arange(len(members)),), of_drawn, vectorized=False, n_resamples=1500, method="percentile", rng=0
    )
    return float(found.standard_error)


def error_of(measure: Measure | None) -> float:
    assert measure is not None
    num = len(measure.errors_C)
    return math.sqrt(num / (num - 1) * float((measure.errors_C**2).sum()))


def test_a_mean_and_its_error_are_those_of_a_bootstrap_of_clusters() -> None:
    _, y_N, keys_N = rounded_pairs()
    found = mean(y_N, Clusters.of(keys_N))
    assert found.value == pytest.approx(np.mean(y_N))
    assert error_of(found) == pytest.approx(bootstrap_error(lambda rows: float(y_N[rows].mean()), keys_N), rel=0.06)
    assert error_of(found) > 1.2 * stats.sem(y_N)


def test_pearson_and_its_errors_are_those_of_leaving_out_each_cluster_in_a_loop() -> None:
    x_N, y_N, keys_N = rounded_pairs()
    found = pearson(x_N, y_N, Clusters.of(keys_N))
    assert found is not None
    assert math.tanh(found.value) == pytest.approx(stats.pearsonr(x_N, y_N).statistic)
    without = [np.arctanh(np.corrcoef(x_N[keys_N != key], y_N[keys_N != key])[0, 1]) for key in np.unique(keys_N)]
    num = len(without)
    assert error_of(found) ** 2 == pytest.approx((num - 1) / num * np.sum((without - np.mean(without)) ** 2))
    assert found.errors_C == pytest.approx((num - 1) / num * (np.mean(without) - without))


def test_spearman_with_ties_and_its_error_are_those_of_scipy_and_a_bootstrap_of_clusters() -> None:
    x_N, y_N, keys_N = rounded_pairs()
    found = spearman(x_N, y_N, Clusters.of(keys_N))
    assert found is not None
    assert math.tanh(found.value) == pytest.approx(stats.spearmanr(x_N, y_N).statistic)
    assert found.errors_C.sum() == pytest.approx(0, abs=1e-12)

    def statistic(rows: Ints) -> float:
        return float(np.arctanh(stats.spearmanr(x_N[rows], y_N[rows]).statistic))

    assert error_of(found) == pytest.approx(bootstrap_error(statistic, keys_N), rel=0.06)
    without = [statistic(np.flatnonzero(keys_N != key)) for key in np.unique(keys_N)]
    num = len(without)
    assert error_of(found) ** 2 == pytest.approx((num - 1) / num * np.sum((without - np.mean(without)) ** 2), rel=0.06)


def test_the_error_of_spearman_with_few_different_values_is_that_of_leaving_out_each_cluster() -> None:
    draw = np.random.default_rng(8)
    x_N = draw.choice(3, 600, p=[0.7, 0.2, 0.1]).astype(np.float64)
    y_N = np.minimum(2.0, x_N * (draw.random(600) < 0.6) + draw.choice(2, 600, p=[0.8, 0.2]))
    found = spearman(x_N, y_N, Clusters.of(np.arange(600)))
    rows = np.arange(600)
    without = [np.arctanh(stats.spearmanr(x_N[rows != row], y_N[rows != row]).statistic) for row in rows]
    assert error_of(found) ** 2 == pytest.approx(599 / 600 * np.sum((without - np.mean(without)) ** 2), rel=0.02)


def test_correlations_do_not_depend_on_units_or_on_a_large_constant() -> None:
    x_N, y_N, keys_N = rounded_pairs()
    clusters = Clusters.of(keys_N)
    for correlation in (pearson, spearman):
        found, moved = correlation(x_N, y_N, clusters), correlation(1e-6 * x_N + 1e3, 1e4 * y_N - 1e9, clusters)
        assert found is not None and moved is not None
        assert moved.value == pytest.approx(found.value)
        assert moved.errors_C == pytest.approx(found.errors_C, abs=1e-8)


def test_correlations_that_are_not_defined_are_none_and_few_clusters_have_no_interval() -> None:
    x_N = np.arange(8.0)
    clusters = Clusters.of(np.arange(8))
    for correlation in (pearson, spearman):
        assert correlation(x_N, np.ones(8), clusters) is None
        assert correlation(np.ones(8), x_N, clusters) is None
        assert correlation(x_N[:3], x_N[:3] ** 2, Clusters.of(np.arange(3))) is None
        for y_N, keys_N in ((np.sin(x_N), np.arange(8) % 3), (x_N**1, np.arange(8))):
            found = correlation(x_N, y_N, Clusters.of(keys_N))
            assert found is not None
            assert math.tanh(found.value) == pytest.approx(stats.pearsonr(stats.rankdata(x_N), y_N).statistic, abs=0.2)
            assert correlation_interval(Estimate.of([found])) is None


def test_the_variances_over_seeds_and_pairs_are_those_of_a_two_way_table() -> None:
    """A table of S policies and N pairs, each its own cluster, with expected mean squares by hand."""
    draw = np.random.default_rng(0)
    num_policies, num_pairs = 4, 50
    noise = draw.standard_normal((num_policies, num_pairs))
    table = noise + draw.standard_normal(num_pairs) + 0.6 * draw.standard_normal((num_policies, 1))
    clusters = Clusters.of(np.arange(num_pairs))
    estimate = Estimate.of([mean(row, clusters) for row in table])
    rows, columns, centre = table.mean(axis=1), table.mean(axis=0), table.mean()
    of_policies = num_pairs * np.sum((rows - centre) ** 2) / (num_policies - 1)
    of_pairs = num_policies * np.sum((columns - centre) ** 2) / (num_pairs - 1)
    rest = table - rows[:, None] - columns + centre
    of_rest = np.sum(rest**2) / ((num_policies - 1) * (num_pairs - 1))
    cells = num_policies * num_pairs
    seeds = estimate.seeds()
    assert seeds.variance == pytest.approx((of_policies - of_rest) / cells)
    squares = of_policies**2 / (num_policies - 1) + of_rest**2 / ((num_policies - 1) * (num_pairs - 1))
    assert seeds.degrees == pytest.approx((of_policies - of_rest) ** 2 / squares)
    interval = mean_interval(estimate)
    assert interval is not None
    assert sum(interval) / 2 == pytest.approx(centre)
    # The pairs' degrees of freedom follow from their fourth moment: 2 V² / Var(V).
    squared = (columns - centre) ** 2
    pairs = of_pairs / cells
    of_variance = num_pairs * np.var(squared) * (num_pairs / (num_pairs - 1) / num_pairs**2) ** 2
    pair_degrees = min(2 * pairs**2 / of_variance, num_pairs - 1)
    total = pairs + seeds.variance
    degrees = total**2 / (pairs**2 / pair_degrees + seeds.variance**2 / seeds.degrees)
    assert (interval.high - interval.low) / 2 == pytest.approx(stats.t.ppf(0.975, degrees) * math.sqrt(total))


def test_one_policy_and_policies_that_differ_no_more_than_the_pairs_explain_have_no_variance_over_seeds() -> None:
    draw = np.random.default_rng(1)
    clusters = Clusters.of(np.arange(100))
    one = mean(draw.standard_normal(100), clusters)
    assert Estimate.of([one]).seeds().variance == 0
    alike = [mean(row - row.mean(), clusters) for row in draw.standard_normal((3, 100))]
    assert Estimate.of(alike).seeds().variance == 0


def wilson(share: float, num: float, critical: float) -> list[float]:
    """The ends at which a share is `critical` standard errors away, by search."""

    def beyond(truth: float) -> float:
        return abs(share - truth) - critical * math.sqrt(truth * (1 - truth) / num)

    low = optimize.brentq(beyond, 1e-12, min(share, 1 - 1e-12)) if share > 0 else 0.0
    high = optimize.brentq(beyond, max(share, 1e-12), 1 - 1e-12) if share < 1 else 1.0
    return [float(low), float(high)]


def test_the_interval_of_a_share_is_wilsons_with_the_number_of_independent_pairs() -> None:
    draw = np.random.default_rng(2)
    cluster_N = layout(200, draw)
    right_N = (shared(draw.standard_normal, cluster_N, 0.7) > -0.7).astype(np.float64)
    clusters = Clusters.of(cluster_N)
    found = share_interval(Estimate.of([mean(right_N, clusters)]), clusters)
    error = bootstrap_error(lambda rows: float(right_N[rows].mean()), cluster_N)
    share = float(right_N.mean())
    num = share * (1 - share) / error**2
    assert num < 170
    assert list(found) == pytest.approx(wilson(share, num, stats.t.ppf(0.975, clusters.num - 1)), abs=0.01)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_none_has_an_interval_that_is_no_point(share: float) -> None:
    for size in (1, 4):
        clusters = Clusters.of(np.arange(40) // size)
        estimate = Estimate.of(3 * [mean(np.full(40, share), clusters)])
        expected = wilson(share, 40 / size, stats.t.ppf(0.975, 40 / size - 1))
        assert list(share_interval(estimate, clusters)) == pytest.approx(expected)
    alone = Clusters.of(np.zeros(40, np.int64))
    assert share_interval(Estimate.of([mean(np.full(40, share), alone)]), alone) == (0, 1)


def test_a_share_equal_in_every_cluster_has_the_interval_of_independent_pairs() -> None:
    clusters = Clusters.of(np.arange(40) // 2)
    estimate = Estimate.of([mean(np.arange(40.0) % 2, clusters)])
    assert list(share_interval(estimate, clusters)) == pytest.approx(wilson(0.5, 40, stats.t.ppf(0.975, 19)))


@pytest.mark.parametrize(("gained", "lost"), [(12, 3), (0, 0), (7, 0)])
def test_shares_of_independent_pairs_are_compared_as_by_bonett_and_price(gained: int, lost: int) -> None:
    right_N = np.arange(60) < 30
    other_N = right_N.copy()
    other_N[:gained] = False
    other_N[60 - lost :] = True
    clusters = Clusters.of(np.arange(60))
    one, other = (Estimate.of([mean(values.astype(np.float64), clusters)]) for values in (right_N, other_N))
    found = compare_shares(one, other, clusters)
    more, fewer = (gained + 1) / 62, (lost + 1) / 62
    error = math.sqrt((more + fewer - (more - fewer) ** 2) / 61)  # 61: unbiased, where theirs is for large samples
    half = stats.t.ppf(0.975, 61) * error
    assert found.difference == pytest.approx((gained - lost) / 60)
    assert found.interval is not None
    assert list(found.interval) == pytest.approx([more - fewer - half, more - fewer + half])
    assert found.p == pytest.approx(2 * stats.t.sf(abs(more - fewer) / error, 61))


def test_p_is_below_005_exactly_where_the_interval_excludes_zero_and_is_never_zero() -> None:
    draw = np.random.default_rng(4)
    verdicts = set()

    def check(found: Comparison) -> None:
        assert found.interval is not None
        excluded = not found.interval.low <= 0 <= found.interval.high
        assert (found.p < 0.05) == excluded
        verdicts.add(excluded)

    for _ in range(60):
        cluster_N = layout(60, draw)
        clusters = Clusters.of(cluster_N)
        x_N = draw.standard_normal(60)
        y_SN = [slope * x_N + draw.standard_t(3, 60) for slope in (0.1, 0.2, 1.3, 1.0)]
        z = [pearson(x_N, y_N, clusters) for y_N in y_SN]
        known = [one for one in z if one is not None]
        check(compare_correlations(Estimate.of(known[:2]), Estimate.of(known[2:])))
        right = [mean((y_N > 0.3 * at).astype(np.float64), clusters) for at, y_N in enumerate(y_SN)]
        check(compare_shares(Estimate.of(right[:2]), Estimate.of(right[2:]), clusters))
    assert verdicts == {True, False}
    x_N = draw.standard_normal(100_000)
    clusters = Clusters.of(np.arange(100_000))
    up, down = (pearson(x_N, sign * x_N + draw.standard_normal(100_000), clusters) for sign in (1, -1))
    assert up is not None and down is not None
    assert compare_correlations(Estimate.of([up]), Estimate.of([down])).p > 0
    assert compare_correlations(Estimate.of([up]), Estimate.of([up])) == (0, (0, 0), 1)


def test_the_error_of_a_difference_is_that_of_a_bootstrap_of_the_same_pairs_for_both() -> None:
    x_N, y_N, keys_N = rounded_pairs()
    other_N = 0.7 * y_N - 0.5 * x_N + np.random.default_rng(5).standard_normal(len(y_N))
    clusters = Clusters.of(keys_N)
    one, other = pearson(x_N, y_N, clusters), pearson(x_N, other_N, clusters)
    assert one is not None and other is not None
    found = compare_correlations(Estimate.of([one]), Estimate.of([other]))

    def statistic(rows: Ints) -> float:
        return float(np.corrcoef(x_N[rows], y_N[rows])[0, 1] - np.corrcoef(x_N[rows], other_N[rows])[0, 1])

    assert found.difference == pytest.approx(statistic(np.arange(len(x_N))))
    assert found.interval is not None
    half = (found.interval.high - found.interval.low) / 2
    assert half == pytest.approx(stats.t.ppf(0.975, clusters.num / 2) * bootstrap_error(statistic, keys_N), rel=0.1)


# --- simulations: how often an interval contains the truth ------------------------------------------------------------

_SLOPES = (0.5, 0.8)
_OFFSETS = (0.5, 0.9)
_SEED_SPREAD = 0.1


def _truth(of: Callable[[float], float], centre: float, spread: float) -> float:
    """The mean over seeds, whose effects are normal, by numerical integration."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    return float(sum(weights * np.array([of(centre + spread * node) for node in nodes])) / weights.sum())


def _coverage(num_pairs: int, num_seeds: int, degrees: float, repeats: int) -> dict[str, float]:
    """The shares of 95 % intervals that contain the truth, for two settings on the same pairs, clusters of 1 to 4.

    Margins are a length effect, which differs between seeds, and noise by Student's t, most of it common to all
    policies. Whether a pair is right has a latent normal variable with the same structure.
    """
    draw = np.random.default_rng([num_pairs, num_seeds, int(degrees)])
    spread = _SEED_SPREAD if num_seeds > 1 else 0.0
    noise_variance = degrees / (degrees - 2)
    z = [_truth(lambda b: math.atanh(b / math.sqrt(b * b + noise_variance)), slope, spread) for slope in _SLOPES]
    r = [math.tanh(one) for one in z]
    share = [_truth(lambda at: float(stats.norm.cdf(at)), offset, spread) for offset in _OFFSETS]

    def heavy(num: int) -> Floats:
        return draw.standard_t(degrees, num)

    hits = dict.fromkeys(("pearson", "share", "pearson difference", "share difference"), 0)
    for _ in range(repeats):
        cluster_N = layout(num_pairs, draw)
        clusters = Clusters.of(cluster_N)
        length_N = shared(draw.standard_normal, cluster_N, 0.3)
        common_N, latent_N = shared(heavy, cluster_N, 0.4), shared(draw.standard_normal, cluster_N, 0.4)
        correlations, shares = [], []
        for slope, offset in zip(_SLOPES, _OFFSETS, strict=True):
            of_seeds = []
            rights = []
            for effect, other_effect in spread * draw.standard_normal((num_seeds, 2)):
                own_N, own_latent_N = shared(heavy, cluster_N, 0.4), shared(draw.standard_normal, cluster_N, 0.4)
                margin_N = (slope + effect) * length_N + math.sqrt(0.7) * common_N + math.sqrt(0.3) * own_N
                found = pearson(length_N, margin_N, clusters)
                assert found is not None
                of_seeds.append(found)
                right_N = offset + other_effect + math.sqrt(0.7) * latent_N + math.sqrt(0.3) * own_latent_N > 0
                rights.append(mean(right_N.astype(np.float64), clusters))
            correlations.append(Estimate.of(of_seeds))
            shares.append(Estimate.of(rights))
        intervals = {
            "pearson": (correlation_interval(correlations[0]), r[0]),
            "share": (share_interval(shares[0], clusters), share[0]),
            "pearson difference": (compare_correlations(*correlations).interval, r[0] - r[1]),
            "share difference": (compare_shares(*shares, clusters).interval, share[0] - share[1]),
        }
        for name, (interval, value) in intervals.items():
            assert interval is not None
            hits[name] += interval.low <= value <= interval.high
    return {name: count / repeats for name, count in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [1, 3, 8])
@pytest.mark.parametrize("num_pairs", [80, 400])
def test_intervals_of_heavy_tailed_margins_contain_the_truth(num_pairs: int, num_seeds: int) -> None:
    """In 94 to 98 of 100 cases; with 3 seeds that differ more than this, in 91 to 96."""
    repeats = {1: 800, 3: 500, 8: 250}[num_seeds]
    found = _coverage(num_pairs, num_seeds, 3.0, repeats)
    chance = 2.5 * math.sqrt(0.05 * 0.95 / repeats)
    for name, coverage in found.items():
        assert 0.935 - chance <= coverage <= 0.975 + chance, (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_intervals_of_shares_of_few_clusters_contain_the_truth(share: float) -> None:
    draw = np.random.default_rng(7)
    for num in (10, 40):
        hits = 0
        for _ in range(1500):
            sizes = draw.integers(1, 5, num)
            chances = draw.beta(share * 2, (1 - share) * 2, num)  # pairs of a prompt correlate with 1/3
            cluster_N = np.repeat(np.arange(num), sizes)
            clusters = Clusters.of(cluster_N)
            right_N = (draw.random(len(cluster_N)) < chances[cluster_N]).astype(np.float64)
            low, high = share_interval(Estimate.of([mean(right_N, clusters)]), clusters)
            hits += low <= share <= high
        assert 0.93 <= hits / 1500 <= 0.99, num
