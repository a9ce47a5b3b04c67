"""Does one arm train a better model than another? Means, 95 % intervals and paired tests on held-out examples.

A measure of a model is a ratio: the sum of its values over the examples divided by the sum of their weights (nats by
tokens, correct answers by questions). A measure of an arm is the mean over its models, one for each seed. There are two
sources of variance, and both are included:

- The choice of held-out examples. They are resampled (bootstrap), with the same draws for all arms, so that the arms
  stay paired.
- The seeds. Three seeds cannot be resampled: the percentiles of a bootstrap of three numbers are their minimum and
  maximum, an interval that contains the mean in only three of four cases. Their part is drawn from Student's t instead,
  with their standard error and the degrees of freedom of Welch and Satterthwaite: about S - 1 where the seeds vary more
  than the examples.

An arm that draws its rows for each seed varies with the draw. An arm that is one set of rows, such as a selection, does
not. Compared with a drawn arm, the question is whether it does better than one more draw would; so the variance of a
single draw is added. Without it, any set that is merely lucky would count as better.

The letters in names are dimensions: S seeds, E examples, B bootstrap replicates, A arms.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

NUM_REPLICATES = 4000
"""Number of bootstrap replicates: enough for the ends of an interval to vary by only about 2 % of its width."""

_MAX_COUNTS = 2**22
"""Maximum number of counts in memory at a time while examples are resampled."""


class Interval(NamedTuple):
    """A 95 % interval. From a single example it is a point, which says nothing."""

    low: float
    high: float

    def clipped(self, lowest: float, highest: float) -> "Interval":
        """The interval, cut to the possible values of the measure."""
        return Interval(*(float(min(max(end, lowest), highest)) for end in self))


class Spread(NamedTuple):
    """A part of the variance of a mean, with its degrees of freedom."""

    variance: float
    degrees: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The values of one arm's models on the held-out examples."""

    values_SE: Floats
    """One row for each seed."""
    weights_E: Floats
    """Weights of the examples, the same for every arm."""
    draws_rows: bool = False
    """Whether each seed was trained on rows drawn for it."""
    takes_all: bool = False
    """Whether the arm was trained on every row, so that no other draw is possible."""

    @property
    def num_seeds(self) -> int:
        """The number of models."""
        return len(self.values_SE)

    @property
    def mean(self) -> float:
        """The measure, averaged over the seeds."""
        return float(self.by_seed.mean())

    @property
    def by_seed(self) -> Floats:
        """The measure of each model."""
        return np.asarray(self.values_SE.sum(axis=1) / self.weights_E.sum())

    def spread(self) -> list[Spread]:
        """The variance of the mean over the seeds; empty for one seed, from which it cannot be estimated."""
        if self.num_seeds < 2:
            return []
        return [Spread(float(self.by_seed.var(ddof=1)) / self.num_seeds, self.num_seeds - 1)]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two arms on the same examples: the first minus the second."""

    mean: float
    interval: Interval
    p: float
    """p-value for equal arms, from the variance over examples and seeds; with one seed, over examples alone."""
    p_examples: float
    """p-value for equal models: a paired t-test over the examples, for these particular models."""


class Panel:
    """Outcomes of several arms on the same examples with the same weights; the examples are resampled once for all."""

    def __init__(self, outcomes: Mapping[Hashable, Outcome], seed: int = 0) -> None:
        self._outcomes, self._seed = outcomes, seed
        means_AE = np.stack([outcome.values_SE.mean(axis=0) for outcome in outcomes.values()])
        weights_E = next(iter(outcomes.values())).weights_E
        self._num_examples = len(weights_E)
        replicates_BA = resampled(means_AE, weights_E, NUM_REPLICATES, seed)
        self._replicates = {name: replicates_BA[:, place] for place, name in enumerate(outcomes)}

    def interval(self, name: Hashable) -> Interval:
        """The interval of an arm's mean."""
        return _interval(self._replicates[name], self._num_examples, self._outcomes[name].spread(), self._seed)

    def difference(self, name: Hashable, other: Hashable) -> Difference:
        """The first arm minus the second."""
        arm, against = self._outcomes[name], self._outcomes[other]
        difference_E = arm.values_SE.mean(axis=0) - against.values_SE.mean(axis=0)
        mean = float(difference_E.sum() / arm.weights_E.sum())
        # A fixed set is compared with one more draw of the other arm, whose variance is that of a single seed.
        more_draws = against.num_seeds if against.draws_rows and not (arm.draws_rows or arm.takes_all) else 0
        drawn = [Spread(part.variance * (1 + more_draws), part.degrees) for part in against.spread()]
        spreads = [*arm.spread(), *drawn]
        examples = _spread_of_examples(difference_E, arm.weights_E)
        return Difference(
            mean=mean,
            interval=_interval(
                self._replicates[name] - self._replicates[other], self._num_examples, spreads, self._seed
            ),
            p=_p_value(mean, [*examples, *spreads]),
            p_examples=_p_value(mean, examples),
        )


def over_seeds(values: Sequence[float]) -> Interval | None:
    """The interval of the mean of one value for each seed, by Student's t; None for a single seed."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Interval(float(np.mean(values)) - half, float(np.mean(values)) + half)


def resampled(values_AE: Floats, weights_E: Floats, num_replicates: int, seed: int) -> Floats:
    """Measures on examples drawn with replacement, of shape BA; every arm gets the same draws."""
    draw, num = np.random.default_rng(seed), len(weights_E)
    sums_EA = np.column_stack([values_AE.T, weights_E])
    block = max(1, _MAX_COUNTS // num)
    blocks = []
    for start in range(0, num_replicates, block):
        rows = min(block, num_replicates - start)
        places_BE = draw.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        counts_BE = np.bincount(places_BE.ravel(), minlength=rows * num).reshape(rows, num)
        blocks.append(counts_BE.astype(np.float64) @ sums_EA)
    sums_BA = np.concatenate(blocks)
    return np.asarray(sums_BA[:, :-1] / sums_BA[:, -1:])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several p-values, in the same order; NaN stays NaN and does not count as a test."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return [float(value) for value in adjusted]


def _spread_of_examples(difference_E: Floats, weights_E: Floats) -> list[Spread]:
    """The variance of the mean difference, as in a paired t-test."""
    num = len(difference_E)
    if num < 2:
        return []
    return [Spread(float(difference_E.var(ddof=1)) / num / float(weights_E.mean()) ** 2, num - 1)]


def _interval(replicates_B: Floats, num_examples: int, spreads: Sequence[Spread], seed: int) -> Interval:
    """Percentiles of the replicates, each shifted by a draw from the distribution of the seeds' mean."""
    scale = math.sqrt(sum(part.variance for part in spreads))
    if scale:
        degrees = _degrees([Spread(float(replicates_B.var()), max(1, num_examples - 1)), *spreads])
        # Quantiles in random order: random draws from so heavy a tail would make the ends of the interval noisy.
        order_B = np.random.default_rng([seed, 1]).permutation(len(replicates_B))
        replicates_B = replicates_B + scale * stats.t.ppf((order_B + 0.5) / len(replicates_B), degrees)
    low, high = np.percentile(replicates_B, (2.5, 97.5))
    return Interval(float(low), float(high))


def _p_value(mean: float, spreads: Sequence[Spread]) -> float:
    """Two-sided p-value by Student's t; NaN where no variance is known."""
    if not spreads:
        return math.nan
    total = sum(part.variance for part in spreads)
    if total == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(total), _degrees(spreads)))


def _degrees(spreads: Sequence[Spread]) -> float:
    """Degrees of freedom of a sum of variances, by Welch and Satterthwaite; at least one of them must not be 0."""
    total = sum(part.variance for part in spreads)
    return total**2 / sum(part.variance**2 / part.degrees for part in spreads)
