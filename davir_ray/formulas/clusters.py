"""Shares, means and correlations of pairs that share prompts, for policies of several seeds, with their intervals.

Pairs with the same prompt are one cluster: clusters are independent, pairs in one are not. Every interval is Student's
t with a variance from the clusters' own contributions and Satterthwaite's degrees of freedom, so nothing is drawn at
random.

Two sources of chance are crossed: the policies of a setting differ in their seeds, and all are measured on the same
pairs. The value of policy s is modelled as v_s = μ + a_s + e + ε_s with a_s the effect of its seed, e the sampling of
the pairs that all policies have in common, and ε_s the rest of the pairs' sampling, independent between policies. The
variance of the mean over S policies is σ_a²/S + σ_e² + σ_ε²/S. It is estimated by V_C + max(0, V_S − V_R), with

- V_C, the variance over the clusters of the mean over policies, of expectation σ_e² + σ_ε²/S,
- V_S, the variance of the values over the policies divided by S, of expectation (σ_a² + σ_ε²)/S,
- V_R, the interaction of clusters and policies divided by S, of expectation σ_ε²/S, which V_C and V_S both contain
  (the two-way clustered variance of Cameron, Gelbach and Miller 2011, J. Bus. Econ. Stat. 29).

Shape letters: N pairs, C clusters, S policies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

from davir_ray.formulas import statistics
from davir_ray.formulas.statistics import Interval, critical

Floats = npt.NDArray[np.float64]

_LEAST_CLUSTERS = 4
"""Without one of three clusters, a correlation is often ±1, which Fisher's z cannot express."""

_ROUNDING = 1e-12
"""A difference of correlations below this is that of rounding errors."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Pairs, grouped by what they share."""

    cluster_N: npt.NDArray[np.int64]
    """Number of the cluster of each pair, from 0."""
    sizes_C: Floats
    """Number of pairs in each cluster."""

    @classmethod
    def of(cls, keys_N: npt.NDArray[np.int64]) -> Self:
        """The clusters of pairs with equal keys."""
        _, cluster_N, sizes_C = np.unique(keys_N, return_inverse=True, return_counts=True)
        return cls(cluster_N=cluster_N, sizes_C=sizes_C.astype(np.float64))

    @property
    def num_pairs(self) -> int:
        """The number of pairs."""
        return len(self.cluster_N)

    @property
    def num(self) -> int:
        """The number of clusters."""
        return len(self.sizes_C)

    def sums(self, values_N: Floats) -> Floats:
        """The sum of the values in each cluster, of shape C."""
        return np.asarray(np.bincount(self.cluster_N, values_N, self.num), dtype=np.float64)


class Measure(NamedTuple):
    """A measure of one policy."""

    value: float
    errors_C: Floats
    """What each cluster contributes to the sampling error of the value; their sum is 0, and C / (C − 1) times the sum
    of their squares estimates its variance. NaN where there are too few clusters."""


class Component(NamedTuple):
    """A component of a variance, with its degrees of freedom."""

    variance: float
    degrees: float


def mean(values_N: Floats, clusters: Clusters) -> Measure:
    """The mean over pairs; of a column of 0 and 1, a share.

    It is a ratio, of the clusters' sums to their sizes, linearised (Cochran 1977, Sampling Techniques, section 6.4).
    """
    value = float(values_N.mean())
    return Measure(value, (clusters.sums(values_N) - value * clusters.sizes_C) / clusters.num_pairs)


def pearson(x_N: Floats, y_N: Floats, clusters: Clusters) -> Measure | None:
    """Fisher's z of Pearson's correlation; None for fewer than 4 pairs, or if one of the two does not vary.

    The errors are the jackknife's, from the correlations without each cluster (Efron 1982, The Jackknife, the
    Bootstrap and Other Resampling Plans, section 3.1): on heavy tails they cover better than linearised ones.
    """
    if not _vary(x_N, y_N):
        return None
    x_N, y_N = stats.zscore(x_N), stats.zscore(y_N)
    products = (np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N)
    sums_6C = np.stack([clusters.sums(product_N) for product_N in products])
    total_6 = sums_6C.sum(axis=1)
    value = float(_fisher_z(total_6))
    num = clusters.num
    if num < _LEAST_CLUSTERS:
        return Measure(value, np.full(num, np.nan))
    without_C = _fisher_z(total_6[:, None] - sums_6C)
    if not np.isfinite(without_C).all():
        return Measure(value, np.full(num, np.nan))
    return Measure(value, (num - 1) / num * (without_C.mean() - without_C))


def _fisher_z(sums_6: Floats) -> Floats:
    num, x, y, xx, yy, xy = sums_6
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (xy / num - x * y / num**2) / np.sqrt((xx / num - (x / num) ** 2) * (yy / num - (y / num) ** 2))
        return np.asarray(np.arctanh(np.clip(r, -1.0, 1.0)))


def spearman(x_N: Floats, y_N: Floats, clusters: Clusters) -> Measure | None:
    """Fisher's z of Spearman's rank correlation; None for fewer than 4 pairs, or if one of the two does not vary.

    The errors are linearised, by the influence of a pair on the correlation of the two distribution functions
    (Croux and Dehon 2010, Stat. Methods Appl. 19), here with mid-ranks for ties. A pair has influence through its own
    ranks and through those of all others.
    """
    if not _vary(x_N, y_N):
        return None
    num = len(x_N)
    # Mid-distribution functions, of mean exactly 1/2.
    a_N, b_N = ((stats.rankdata(values_N) - 0.5) / num for values_N in (x_N, y_N))
    of_products = a_N * b_N + _sum_above(x_N, b_N) / num + _sum_above(y_N, a_N) / num
    of_a, of_b = (one_N**2 + 2 * _sum_above(values_N, one_N) / num for values_N, one_N in ((x_N, a_N), (y_N, b_N)))
    variance_a, variance_b, covariance = a_N.var(), b_N.var(), float(np.mean(a_N * b_N) - 0.25)
    r = float(np.clip(covariance / math.sqrt(variance_a * variance_b), -1.0, 1.0))
    value = float(np.arctanh(r)) if abs(r) < 1 else math.copysign(math.inf, r)
    if clusters.num < _LEAST_CLUSTERS or abs(r) == 1:
        return Measure(value, np.full(clusters.num, np.nan))
    influence_N = of_products / math.sqrt(variance_a * variance_b) - r / 2 * (of_a / variance_a + of_b / variance_b)
    influence_N -= influence_N.mean()
    return Measure(value, clusters.sums(influence_N) / num / (1 - r * r))


def _sum_above(order_N: Floats, values_N: Floats) -> Floats:
    """For each pair, the sum of the values of pairs above it in the order, those equal to it counted half."""
    _, place_N = np.unique(order_N, return_inverse=True)
    sums = np.bincount(place_N, values_N)
    above = sums.sum() - np.cumsum(sums)
    return np.asarray((above + sums / 2)[place_N])


def _vary(x_N: Floats, y_N: Floats) -> bool:
    return len(x_N) >= 4 and bool(np.ptp(x_N) > 0 and np.ptp(y_N) > 0)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean of a measure over the policies of a setting."""

    values_S: Floats
    errors_SC: Floats

    @classmethod
    def of(cls, measures: Sequence[Measure]) -> Self:
        """The estimate from one measure for each policy, all on the same clusters."""
        return cls(
            values_S=np.array([one.value for one in measures]), errors_SC=np.stack([one.errors_C for one in measures])
        )

    @property
    def mean(self) -> float:
        """The mean over the policies."""
        return float(self.values_S.mean())

    def errors(self) -> Floats:
        """What each cluster contributes to the sampling error of the mean, of shape C."""
        return np.asarray(self.errors_SC.mean(axis=0))

    def seeds(self) -> Component:
        """The component max(0, V_S − V_R) of the variance of the mean; 0 for a single policy.

        The degrees of freedom are Satterthwaite's of the difference.
        """
        num, num_clusters = self.errors_SC.shape
        if num < 2:
            return Component(0.0, math.inf)
        between = float(self.values_S.var(ddof=1)) / num
        rest_SC = self.errors_SC - self.errors()
        shared = _variance(rest_SC.ravel(), num_clusters) / (num * (num - 1))
        if not between > shared:
            return Component(0.0, math.inf)
        squares = between**2 / (num - 1) + shared**2 / ((num - 1) * max(1, num_clusters - 1))
        return Component(between - shared, (between - shared) ** 2 / squares)


class Comparison(NamedTuple):
    """The difference of two settings on the same pairs: the first minus the second."""

    difference: float
    interval: Interval | None
    """None where the clusters are too few."""
    p: float
    """p-value for no difference, below 0.05 exactly where the interval excludes 0; NaN without an interval."""


def share_interval(share: Estimate, clusters: Clusters) -> Interval:
    """The interval of a mean share, never a point: Wilson's, with an effective number of pairs and Student's t.

    The effective number is that of independent pairs whose share has the estimated variance, and no more than there
    are pairs and policies. If all pairs of all policies agree it is (Σ m)² / Σ m² for clusters of m pairs, as if those
    in a cluster were always alike (Kish 1965, Survey Sampling; Franco, Little, Louis and Slud 2019, J. Surv. Stat.
    Methodol. 7).
    """
    p, sizes_C = share.mean, clusters.sizes_C
    if clusters.num < 2:
        return Interval(0.0, 1.0)
    pairs = Component(_variance(share.errors(), clusters.num), clusters.num - 1)
    variance, degrees = _sum([pairs, share.seeds()])
    if p in (0.0, 1.0):
        effective, degrees = clusters.num_pairs**2 / float((sizes_C**2).sum()), pairs.degrees
    else:
        largest = float(clusters.num_pairs * len(share.values_S))
        effective = min(largest, p * (1 - p) / variance) if variance else largest
    squared = critical(degrees) ** 2 / effective
    centre = (p + squared / 2) / (1 + squared)
    half = math.sqrt(squared * p * (1 - p) + squared**2 / 4) / (1 + squared)
    return Interval(centre - half, centre + half).clipped(0.0, 1.0)


def mean_interval(estimate: Estimate) -> Interval | None:
    """The interval of a mean of values without bounds; None where it cannot be estimated."""
    found = _estimated(estimate.mean, [_pairs(estimate.errors()), estimate.seeds()])
    return None if found is None else found.interval


def correlation_interval(z: Estimate) -> Interval | None:
    """The interval of tanh of the mean of Fisher's z over the policies; None where it cannot be estimated."""
    interval = mean_interval(z)
    return interval and Interval(*(math.tanh(end) for end in interval))


def compare_shares(share: Estimate, other: Estimate, clusters: Clusters) -> Comparison:
    """The difference of two shares of the same pairs; interval and p-value also hold where few pairs differ.

    They have two more clusters, of one pair each: one for the first setting, one for the second (Bonett and Price
    2012, J. Educ. Behav. Stat. 37, whose interval this is for clusters of one pair and one policy, but for t).
    """
    difference = share.mean - other.mean
    if clusters.num < 2:
        return Comparison(difference, Interval(-1.0, 1.0), 1.0)
    sizes_C = np.append(clusters.sizes_C, (1.0, 1.0))
    num_pairs = sizes_C.sum()
    errors_C = (share.errors() - other.errors()) * clusters.num_pairs + difference * clusters.sizes_C
    shrunk = difference * clusters.num_pairs / num_pairs
    errors_C = (np.append(errors_C, (1.0, -1.0)) - shrunk * sizes_C) / num_pairs
    pairs = Component(_variance(errors_C, len(errors_C)), len(errors_C) - 1)
    return _compared(difference, shrunk, [pairs, share.seeds(), other.seeds()], 1.0)


def compare_correlations(z: Estimate, other: Estimate) -> Comparison:
    """The difference of two correlations of the same pairs, each tanh of the mean of Fisher's z over the policies."""
    of_one, of_other = math.tanh(z.mean), math.tanh(other.mean)
    # The derivatives of tanh, which bring errors of z to the scale of correlations.
    slope, other_slope = 1 - of_one**2, 1 - of_other**2
    difference = of_one - of_other
    parts = [
        _pairs(slope * z.errors() - other_slope * other.errors()),
        *(
            Component(part.variance * by**2, part.degrees)
            for part, by in ((z.seeds(), slope), (other.seeds(), other_slope))
        ),
    ]
    return _compared(difference, difference, parts, 2.0)


def _compared(difference: float, centre: float, parts: Sequence[Component], bound: float) -> Comparison:
    found = _estimated(centre, parts)
    if found is None:
        return Comparison(difference, None, math.nan)
    if abs(centre) < _ROUNDING and found.variance < _ROUNDING**2:  # the same policies
        return Comparison(difference, found.interval, 1.0)
    return Comparison(difference, found.interval.clipped(-bound, bound), found.p)


def _estimated(centre: float, parts: Sequence[Component]) -> statistics.Estimate | None:
    variance, degrees = _sum(parts)
    known = math.isfinite(centre) and math.isfinite(variance)
    return statistics.Estimate(mean=centre, variance=variance, degrees=degrees) if known else None


def _pairs(errors_C: Floats) -> Component:
    """The component of the pairs' sampling; its degrees of freedom follow from how unequal the squared errors are.

    They are 2 V² / Var(V), with the variance of V from the fourth moment of the errors: the clusters less one for
    normal errors, fewer on heavy tails and for clusters of unequal sizes (Satterthwaite 1946, Biometrics Bull. 2).
    """
    num = len(errors_C)
    variance = _variance(errors_C, num)
    squared_C = errors_C**2
    spread = float((squared_C**2).sum() - squared_C.sum() ** 2 / num)
    degrees = 2 * float(squared_C.sum()) ** 2 / spread if spread > 0 else math.inf
    return Component(variance, min(degrees, max(1, num - 1)))


def _variance(errors: Floats, num_clusters: int) -> float:
    return float((errors**2).sum()) * num_clusters / (num_clusters - 1) if num_clusters > 1 else math.nan


def _sum(parts: Sequence[Component]) -> Component:
    """The sum of components, with Welch and Satterthwaite's degrees of freedom; if all are 0, those of the first."""
    total = sum(part.variance for part in parts)
    squares = sum(part.variance**2 / part.degrees for part in parts)
    return Component(total, total**2 / squares if squares else parts[0].degrees)
