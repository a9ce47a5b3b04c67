"""Does one arm train a better model than another? Means, 95 % intervals and paired tests on held-out examples.

A measure is a ratio: values summed over the examples by weights summed over them (nats by tokens, right answers by
questions), and its mean over the seeds. Two things vary, and both count:

- Which examples were held out. They are resampled (bootstrap), the same draws for all arms, which stay paired.
- Which model came out: one for each seed. Three seeds cannot be resampled (the percentiles of a bootstrap of three
  numbers are their least and greatest, which hold the mean three times in four), so their part is drawn from
  Student's t around their mean, with their standard error and, by Welch and Satterthwaite, about S - 1 degrees of
  freedom where they vary more than the examples do.

An arm whose rows are drawn anew for each seed varies with the draw. An arm that is one set of rows, such as a
selection, does not, and against a drawn arm the question is whether it does better than one more draw would: the
variance of a single draw is added. Without it any set that happens to be a lucky one counts as better.

Letters: S seeds, E examples, B bootstrap replicates, A rows that are resampled together.
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
"""Bootstrap replicates: the ends of an interval then vary by about 2 % of its width."""

_BLOCK_NUMBERS = 2**22
"""Counts in memory at a time while examples are resampled."""


class Interval(NamedTuple):
    """95 %: from low to high. Of a single example it is a point, and says nothing."""

    low: float
    high: float

    def clipped(self, least: float, most: float) -> "Interval":
        """The same, kept where the measure can be."""
        return Interval(*(float(min(max(end, least), most)) for end in self))


class Spread(NamedTuple):
    """A part of a mean's variance, and how well it is known."""

    variance: float
    degrees: int


@dataclass(frozen=True)
class Outcome:
    """What the models of one arm made of the held-out examples."""

    values_SE: Floats
    weights_E: Floats
    draws_rows: bool = False
    """Each seed trained on rows of its own."""
    takes_all: bool = False
    """Trained on every row, so no other draw could have been taken."""

    @property
    def num_seeds(self) -> int:
        """Models."""
        return len(self.values_SE)

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(self.by_seed.mean())

    @property
    def by_seed(self) -> Floats:
        """The measure of each model."""
        return np.asarray(self.values_SE.sum(axis=1) / self.weights_E.sum())

    def spread(self) -> list[Spread]:
        """Of the mean over the seeds; unknown, and left out, where there is one."""
        if self.num_seeds < 2:
            return []
        return [Spread(float(self.by_seed.var(ddof=1)) / self.num_seeds, self.num_seeds - 1)]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One arm minus another, on the same examples."""

    mean: float
    interval: Interval
    p: float
    """That the arms do equally well: examples and seeds counted; examples alone where there is one seed."""
    p_examples: float
    """Paired t-test over the examples: that these very models do equally well on further examples."""


class Panel:
    """Outcomes of several arms on the same examples, with the same weights; the examples are resampled once for all."""

    def __init__(self, outcomes: Mapping[Hashable, Outcome], seed: int = 0) -> None:
        self._outcomes, self._seed = outcomes, seed
        means_AE = np.stack([outcome.values_SE.mean(axis=0) for outcome in outcomes.values()])
        weights_E = next(iter(outcomes.values())).weights_E
        self._num_examples = len(weights_E)
        replicates_BA = resampled(means_AE, weights_E, NUM_REPLICATES, seed)
        self._replicates = {name: replicates_BA[:, place] for place, name in enumerate(outcomes)}

    def interval(self, name: Hashable) -> Interval:
        """Of an arm's mean over seeds and examples."""
        return _interval(self._replicates[name], self._num_examples, self._outcomes[name].spread(), self._seed)

    def difference(self, name: Hashable, other: Hashable) -> Difference:
        """One arm minus another."""
        arm, against = self._outcomes[name], self._outcomes[other]
        apart_E = arm.values_SE.mean(axis=0) - against.values_SE.mean(axis=0)
        mean = float(apart_E.sum() / arm.weights_E.sum())
        spreads = [*arm.spread(), *_spread_against(arm, against)]
        examples = _spread_of_examples(apart_E, arm.weights_E)
        return Difference(
            mean=mean,
            interval=_interval(
                self._replicates[name] - self._replicates[other], self._num_examples, spreads, self._seed
            ),
            p=_p_value(mean, [*examples, *spreads]),
            p_examples=_p_value(mean, examples),
        )


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Student's t around the mean of one number for each seed; None where there is one seed."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Interval(float(np.mean(values)) - half, float(np.mean(values)) + half)


def resampled(values_AE: Floats, weights_E: Floats, num_replicates: int, seed: int) -> Floats:
    """Ratios over examples drawn with replacement, shape BA: the same draws for every row of values."""
    draw, num = np.random.default_rng(seed), len(weights_E)
    sums_EA = np.column_stack([values_AE.T, weights_E])
    block = max(1, _BLOCK_NUMBERS // num)
    blocks = []
    for start in range(0, num_replicates, block):
        rows = min(block, num_replicates - start)
        places_BE = draw.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        counts_BE = np.bincount(places_BE.ravel(), minlength=rows * num).reshape(rows, num)
        blocks.append(counts_BE.astype(np.float64) @ sums_EA)
    sums_BA = np.concatenate(blocks)
    return np.asarray(sums_BA[:, :-1] / sums_BA[:, -1:])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several tests' p-values, in the same order; NaN stays NaN and is no test."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return [float(value) for value in adjusted]


def _spread_against(arm: Outcome, other: Outcome) -> list[Spread]:
    """Of the other arm, and of one more draw of its rows where it draws them and the first arm is one set of many."""
    more_draws = other.num_seeds if other.draws_rows and not (arm.draws_rows or arm.takes_all) else 0
    return [Spread(part.variance * (1 + more_draws), part.degrees) for part in other.spread()]


def _spread_of_examples(apart_E: Floats, weights_E: Floats) -> list[Spread]:
    """Of the mean difference, as the paired t-test has it."""
    num = len(apart_E)
    if num < 2:
        return []
    return [Spread(float(apart_E.var(ddof=1)) / num / float(weights_E.mean()) ** 2, num - 1)]


def _interval(replicates_B: Floats, num_examples: int, spreads: Sequence[Spread], seed: int) -> Interval:
    """Percentiles of the replicates, each moved by what the seeds may have moved it."""
    moved = math.sqrt(sum(part.variance for part in spreads))
    if moved:
        degrees = _degrees([Spread(float(replicates_B.var()), max(1, num_examples - 1)), *spreads])
        # Its quantiles in random order: draws of so heavy a tail would move the ends about.
        order_B = np.random.default_rng([seed, 1]).permutation(len(replicates_B))
        replicates_B = replicates_B + moved * stats.t.ppf((order_B + 0.5) / len(replicates_B), degrees)
    low, high = np.percentile(replicates_B, (2.5, 97.5))
    return Interval(float(low), float(high))


def _p_value(mean: float, spreads: Sequence[Spread]) -> float:
    """Two-sided, of Student's t; NaN where nothing is known."""
    if not spreads:
        return math.nan
    total = sum(part.variance for part in spreads)
    if total == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(total), _degrees(spreads)))


def _degrees(spreads: Sequence[Spread]) -> float:
    """Degrees of freedom of a sum of variances, by Welch and Satterthwaite; not all of them are 0."""
    total = sum(part.variance for part in spreads)
    return total**2 / sum(part.variance**2 / part.degrees for part in spreads)
