"""Does one arm train a better model than another? Means, 95 % intervals and tests on held-out examples.

A measure of a model is a ratio: the sum of its values over the examples divided by the sum of their weights (nats by
tokens, correct answers by questions). A measure of an arm is the mean over its models. Interval and p-value come from
one estimate and one variance: mean ± t(df) √variance, with the degrees of freedom of Satterthwaite (1946).

Two things are sampled, and cross: the held-out examples, which all models share, and the models. What a model does on
an example is mean + model + example + model × example (a two-way layout with random effects; Searle, Casella and
McCulloch, Variance Components, 1992, chapter 4). So

    variance of a difference = variance over examples + max(0, MS - I) × (Σq² of one arm + Σq² of the other)

- The variance over examples is that of the difference of the arms' mean values, whose ratio is linearised (Cochran,
  Sampling Techniques, 1977, chapter 6). Examples with the same prompt are one cluster, and the sources are strata. Each
  residual is divided by one minus its share of the weight: a long response pulls the ratio towards itself, so that its
  residual is too small. With one source this is the jackknife. The degrees of freedom are those of the effective
  number of clusters (Kish, Survey Sampling, 1965).
- MS is the variance between the units of an arm, and I the part of it that is noise over the examples, which the
  variance over examples contains already: it is counted once. q is a unit's share of the arm's models.
- A unit is a model where all of an arm's models have the same rows. Where the rows vary (draws, or selections of
  several runs), a unit is a set of rows with all of its models: a lucky set makes all of them better.
- Arms of one group whose units are seeds share one estimate of MS and of I: from three seeds, no arm alone could say
  how much models vary. Draws and selections vary in their own ways, so such an arm is a group of its own.

The letters in names are dimensions: S models, E examples, C clusters, U units.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MIN_DIFFERING = 10
"""Number of examples on which two arms must differ before a share of right answers is tested."""

_NUM_FLIPS = 9999
"""Number of random assignments of signs."""

_FEW_BEYOND = 10

_LEAST_P = 1e-300
"""A p-value is never 0: Student's tail is not, where its number underflows."""

_ROUNDING = 1e-12
"""Standard errors up to this, relative to the mean, are rounding errors."""

_MIN_SEEDS = 5
"""Number of seeds that a correlation between arms is estimated from; fewer show anything."""

_MIN_DRAWS = 3
"""Number of draws from which the variance of one draw is estimated: of two, it could be anything."""

_TAIL = 0.975

Kind = Literal["seeds", "draws", "runs"]
"""What the units of an arm are: models on the same rows, draws of rows, or the selections of several runs."""


class Interval(NamedTuple):
    """A 95 % interval, not adjusted for other tests. NaN at both ends where no variance is known."""

    low: float
    high: float

    def clipped(self, lowest: float, highest: float) -> "Interval":
        """The interval, cut to the possible values of the measure."""
        return Interval(*(float(min(max(end, lowest), highest)) for end in self))


def critical(degrees: float) -> float:
    """Half the width of a 95 % interval in standard errors: a quantile of Student's t."""
    return float(stats.t.ppf(_TAIL, degrees))


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The held-out examples that every arm is measured on."""

    weights_E: Floats
    """Weight of each example: its tokens, or 1."""
    clusters_E: Ints
    """Number of the prompt of each example, from 0: examples with the same prompt are drawn together."""
    strata_E: Ints
    """Number of the source of each example, from 0: the number of examples of a source is fixed."""

    @classmethod
    def independent(cls, weights_E: Floats) -> "Examples":
        """Examples of one source with prompts of their own."""
        num = len(weights_E)
        return cls(weights_E=weights_E, clusters_E=np.arange(num), strata_E=np.zeros(num, np.int64))

    def of(self, there_E: npt.NDArray[np.bool_]) -> "Examples":
        """Some of the examples alone."""
        return Examples(
            weights_E=self.weights_E[there_E], clusters_E=self.clusters_E[there_E], strata_E=self.strata_E[there_E]
        )

    @cached_property
    def cluster_shares(self) -> Floats:
        """Each cluster's share of the weight; clusters of a prompt that occurs in several sources are one a source."""
        return self.summed(self.weights_E / self.weights_E.sum())

    @property
    def num_clusters(self) -> int:
        """The number of clusters."""
        return len(self.cluster_shares)

    @cached_property
    def _cluster_of(self) -> Ints:
        """The cluster, from 0, that each example is in."""
        both_E2 = np.stack([self.strata_E, self.clusters_E], axis=1)
        return np.asarray(np.unique(both_E2, axis=0, return_inverse=True)[1]).ravel()

    @cached_property
    def _stratum_of(self) -> Ints:
        """The stratum of each cluster, from 0; strata of a single cluster, which show no variance, are put together."""
        first_C = np.unique(self._cluster_of, return_index=True)[1]
        _, stratum_C, counts = np.unique(self.strata_E[first_C], return_inverse=True, return_counts=True)
        single_C = counts[stratum_C] == 1
        if single_C.any():
            # A lone single stratum joins the largest of the others.
            stratum_C[single_C] = len(counts) if single_C.sum() > 1 else int(np.argmax(counts))
        return np.asarray(np.unique(stratum_C, return_inverse=True)[1])

    @cached_property
    def degrees(self) -> float:
        """Degrees of freedom of a variance over the examples; 0 if there is only one cluster."""
        num_clusters = self.num_clusters
        effective = 1.0 / float((self.cluster_shares**2).sum()) if num_clusters else 0.0
        free = (num_clusters - 1 - int(self._stratum_of.max(initial=0))) if num_clusters > 1 else 0
        return min(float(free), max(1.0, effective - 1)) if free else 0.0

    def summed(self, values_E: Floats) -> Floats:
        """The sums over each cluster, along the last axis."""
        if values_E.ndim == 1:
            return np.asarray(np.bincount(self._cluster_of, weights=values_E), dtype=np.float64)
        return np.stack([np.bincount(self._cluster_of, weights=row) for row in values_E])

    def ratios(self, values_E: Floats) -> Floats:
        """The measure: the sum of the values along the last axis, divided by the sum of the weights."""
        return np.asarray(values_E.sum(axis=-1) / self.weights_E.sum(), dtype=np.float64)

    def residuals(self, values_E: Floats) -> Floats:
        """What each cluster adds to the ratio: sums of (value - ratio × weight) / total weight, of shape C or UC."""
        ratios = self.ratios(values_E)[..., None]
        return self.summed((values_E - ratios * self.weights_E) / self.weights_E.sum())

    def variance(self, residuals_C: Floats) -> float:
        """The variance over the examples of a ratio, or of a difference of ratios, with these residuals."""
        if len(residuals_C) < 2:
            return 0.0
        num_in = np.bincount(self._stratum_of)
        free_C = residuals_C * (1 - 1 / len(residuals_C)) / np.maximum(1 - self.cluster_shares, 0.5)
        means = np.bincount(self._stratum_of, weights=free_C) / num_in
        squares = np.bincount(self._stratum_of, weights=(free_C - means[self._stratum_of]) ** 2)
        return float((squares * num_in / np.maximum(num_in - 1, 1)).sum())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The values of one arm's models on the held-out examples."""

    values_SE: Floats
    row_sets: Sequence[int] = ()
    """For each model the number of the draw, or of the run, whose rows it was trained on; empty: all have the same."""
    kind: Kind = "seeds"
    """What a set of rows is, where they vary."""
    group: Hashable = None
    """Arms of the same group and kind of units share the estimate of how much these vary."""

    @property
    def num_models(self) -> int:
        """The number of models."""
        return len(self.values_SE)

    @cached_property
    def unit_of(self) -> Ints:
        """The unit of each model: its set of rows if these vary, else the model itself."""
        sets = np.unique(self.row_sets, return_inverse=True)[1] if len(self.row_sets) else np.empty(0, np.int64)
        return np.asarray(sets) if sets.max(initial=0) else np.arange(self.num_models)

    @property
    def units(self) -> Kind:
        """What the units are."""
        return self.kind if len(set(self.row_sets)) > 1 else "seeds"

    @property
    def pool(self) -> Hashable:
        """Arms with the same pool share the estimate of how much their units vary."""
        return self.group, self.units

    @cached_property
    def unit_values(self) -> Floats:
        """Mean values of each unit's models."""
        return np.stack([self.values_SE[self.unit_of == unit].mean(axis=0) for unit in range(self.num_units)])

    @property
    def num_units(self) -> int:
        """The number of units."""
        return int(self.unit_of.max()) + 1

    @property
    def squared_shares(self) -> float:
        """Σq²: the variance of the mean over the models is so many times that of a unit."""
        return float((np.bincount(self.unit_of) ** 2).sum()) / self.num_models**2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean or a difference, with its interval and p-value from one variance."""

    mean: float
    variance: float
    degrees: float
    """Degrees of freedom; 0 where no variance is known."""

    @property
    def interval(self) -> Interval:
        """The mean ± t(degrees) × √variance."""
        if not self.degrees:
            return Interval(math.nan, math.nan)
        half = critical(self.degrees) * math.sqrt(self.variance)
        return Interval(self.mean - half, self.mean + half)

    @property
    def p(self) -> float:
        """The two-sided p-value for a true value of 0; NaN where no variance is known, or none was seen."""
        if not self.degrees:
            return math.nan
        if self.variance == 0:
            return 1.0 if self.mean == 0 else math.nan
        return max(_LEAST_P, float(2 * stats.t.sf(abs(self.mean) / math.sqrt(self.variance), self.degrees)))

    def p_beyond(self, margin: float) -> float:
        """The p-value for a true value of at least `margin` in size: small if the two are equivalent.

        Two one-sided tests (Schuirmann, 1987); below 0.05 where the 90 % interval is within the margin.
        """
        if not self.degrees or self.variance == 0:
            return math.nan
        scale = math.sqrt(self.variance)
        least = min(margin + self.mean, margin - self.mean) / scale
        return max(_LEAST_P, float(stats.t.sf(least, self.degrees)))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first arm minus the second, on the same examples."""

    estimate: Estimate
    """Over examples and units: with one model of each arm, over examples alone."""
    of_models: Estimate
    """Over examples alone: what these particular models show."""
    another_draw: Estimate | None
    """The first arm minus one more draw of the second, None where the draws' own variance is not known."""
    num_differing: int
    """Number of examples on which the arms' means differ."""
    lone: Literal["one model", "one draw"] | None
    """What one of the arms has only one of, so that it is not known how much it varies; None if neither has."""
    p_flips: float | None
    """For shares of right answers: the p-value of random signs over the examples, for these particular models."""


class _Between(NamedTuple):
    """How much the units of some arms vary."""

    mean_square: float
    """MS: variance between units."""
    noise: float
    """I: the part of it that is noise over the examples."""
    degrees: int


class _Part(NamedTuple):
    """A mean square, how often it is in a variance, and its degrees of freedom."""

    name: Hashable
    """What the mean square estimates: parts of one name are one random number."""
    mean_square: float
    times: float
    degrees: float
    noise: float = 0.0
    """The part of the mean square that the variance over examples contains already."""


class Panel:
    """Outcomes of several arms on the same examples."""

    def __init__(self, outcomes: Mapping[Hashable, Outcome], examples: Examples) -> None:
        self._outcomes, self._examples = outcomes, examples
        groups: dict[Hashable, list[Outcome]] = {}
        for outcome in outcomes.values():
            groups.setdefault(outcome.pool, []).append(outcome)
        self._between = {group: self._pooled(found) for group, found in groups.items()}

    @property
    def num_clusters(self) -> int:
        """The number of examples that count on their own."""
        return self._examples.num_clusters

    def mean(self, name: Hashable) -> Estimate:
        """The arm's mean over its models."""
        outcome = self._outcomes[name]
        return self._estimate(outcome.values_SE.mean(axis=0), self._between_units([outcome]))

    def by_model(self, name: Hashable) -> Floats:
        """The measure of each model of an arm."""
        return self._examples.ratios(self._outcomes[name].values_SE)

    def share(self, name: Hashable) -> Interval:
        """The interval of an arm's share of right answers.

        That of several sources is made of theirs (MOVER: Zou and Donner, 2008), because a source with all answers
        right, or all wrong, shows no variance.
        """
        outcome, examples = self._outcomes[name], self._examples
        mean, ends = self.mean(name).mean, []
        for stratum in np.unique(examples.strata_E):
            there_E = examples.strata_E == stratum
            part = replace(outcome, values_SE=outcome.values_SE[:, there_E])
            panel = Panel({name: part}, examples.of(there_E)) if not there_E.all() else self
            found = panel.mean(name)
            low, high = share_interval(found, panel.num_clusters, outcome.num_models)
            weight = float(examples.weights_E[there_E].sum() / examples.weights_E.sum())
            ends.append((weight * (found.mean - low), weight * (high - found.mean)))
        below, above = (math.sqrt(sum(end**2 for end in side)) for side in zip(*ends, strict=True))
        return Interval(mean - below, mean + above)

    def difference_of_shares(self, name: Hashable, other: Hashable) -> Interval:
        """The interval of a difference of shares from those of the two (Newcombe's hybrid score, 1998).

        It takes the two for independent, which is too wide where they agree on most questions, and is never a point:
        for arms that differ on too few questions for a test.
        """
        (share, low, high), (others, others_low, others_high) = (
            (self.mean(one).mean, *self.share(one)) for one in (name, other)
        )
        below, above = math.hypot(share - low, others_high - others), math.hypot(high - share, others - others_low)
        return Interval(share - others - below, share - others + above)

    def difference(self, name: Hashable, other: Hashable, *, shares: bool = False) -> Difference:
        """The first arm minus the second; `shares`: the values are answers, right (1) or wrong (0)."""
        arm, against = self._outcomes[name], self._outcomes[other]
        difference_E = arm.values_SE.mean(axis=0) - against.values_SE.mean(axis=0)
        between, more = self._between_units([arm, against]), self._one_more(arm, against)
        return Difference(
            estimate=self._estimate(difference_E, between),
            of_models=self._estimate(difference_E),
            another_draw=None if more is None else self._estimate(difference_E, [*between, *more]),
            num_differing=int((difference_E != 0).sum()),
            lone=self._lone(arm) or self._lone(against),
            p_flips=sign_flips(self._examples.summed(difference_E)) if shares else None,
        )

    def _lone(self, outcome: Outcome) -> Literal["one model", "one draw"] | None:
        if outcome.kind == "draws" and outcome.units != "draws":
            return "one draw"  # its luck is not known, however many models it has
        return None if self._between[outcome.pool].degrees else "one model"

    def _between_units(self, outcomes: Sequence[Outcome]) -> list[_Part]:
        """The parts of the variance of a mean, or of a difference, that come from the units of these arms."""
        times: dict[Hashable, float] = {}
        for outcome in outcomes:
            times[outcome.pool] = times.get(outcome.pool, 0.0) + outcome.squared_shares
        return [
            _Part(group, between.mean_square, share, between.degrees, between.noise)
            for group, share in times.items()
            if (between := self._between[group]).mean_square > between.noise
        ]

    def _one_more(self, arm: Outcome, against: Outcome) -> list[_Part] | None:
        """The variance of one draw: between draws, less what a draw's seeds explain; None where it is not known."""
        if against.units != "draws" or arm.units == "draws" or against.num_units < _MIN_DRAWS:
            return None
        by_model, unit_of_S = self._examples.ratios(against.values_SE), against.unit_of
        models_U = np.bincount(unit_of_S)
        within = int((models_U - 1).sum())
        if not within:
            return None
        means_U = np.bincount(unit_of_S, weights=by_model) / models_U
        seeds = float(((by_model - means_U[unit_of_S]) ** 2).sum()) / within
        between, share = self._between[against.pool], float((1 / models_U).mean())
        if between.mean_square <= share * seeds:
            return []
        of_seeds = (against.pool, "seeds of a draw")
        return [_Part(against.pool, between.mean_square, 1.0, between.degrees), _Part(of_seeds, seeds, -share, within)]

    def _estimate(self, mean_E: Floats, between: Sequence[_Part] = ()) -> Estimate:
        """A mean, or a difference of means, with the variance over examples and these parts between units."""
        examples = self._examples
        mean = float(examples.ratios(mean_E))
        over_examples = examples.variance(examples.residuals(mean_E))
        counted_twice = min(over_examples, sum(part.times * part.noise for part in between))
        variance = over_examples - counted_twice + sum(part.times * part.mean_square for part in between)
        merged: dict[Hashable, _Part] = {}
        for part in between:
            before = merged[part.name].times if part.name in merged else 0.0
            merged[part.name] = part._replace(times=before + part.times)
        squares = sum((part.times * part.mean_square) ** 2 / part.degrees for part in merged.values())
        if not examples.degrees or not over_examples + squares:
            return Estimate(mean=mean, variance=variance, degrees=examples.degrees)
        degrees = variance**2 / (over_examples**2 / examples.degrees + squares)
        if variance <= (_ROUNDING * max(1.0, abs(mean))) ** 2:
            variance = 0.0
        return Estimate(mean=mean, variance=variance, degrees=max(1.0, degrees))

    def _pooled(self, outcomes: list[Outcome]) -> _Between:
        """The variance between the units of each arm, and its noise, pooled over the arms."""
        squares, noise, degrees = 0.0, 0.0, 0
        for outcome in outcomes:
            if (free := outcome.num_units - 1) == 0:
                continue
            values_UE = outcome.unit_values
            by_unit = self._examples.ratios(values_UE)
            residuals_UC = self._examples.residuals(values_UE)
            squares += float(((by_unit - by_unit.mean()) ** 2).sum())
            noise += sum(self._examples.variance(row) for row in residuals_UC - residuals_UC.mean(axis=0))
            degrees += free
        if not degrees:
            return _Between(0.0, 0.0, 0)
        return _Between(squares / degrees, noise / degrees, degrees)


def share_interval(estimate: Estimate, num_clusters: int, num_models: int = 1) -> Interval:
    """The interval of a share of right answers: Jeffreys' on the effective number of questions, never a point.

    So many independent questions would give the estimate's variance, fewer where t is wider than with all clusters'
    degrees of freedom (Korn and Graubard, Survey Methodology 24, 1998), and not more than the answers. Where all
    answers are right, or all wrong, no variance is seen, and it is the number of clusters.
    """
    share = min(max(estimate.mean, 0.0), 1.0)
    number = float(num_clusters)
    if estimate.variance > 0 and 0 < share < 1:
        wider = critical(max(1, num_clusters - 1)) / critical(max(1.0, estimate.degrees))
        number = min(share * (1 - share) / estimate.variance * wider**2, float(num_clusters * num_models))
    right, wrong = share * number, (1 - share) * number
    low = float(stats.beta.ppf(1 - _TAIL, right + 0.5, wrong + 0.5)) if share > 0 else 0.0
    high = float(stats.beta.ppf(_TAIL, right + 0.5, wrong + 0.5)) if share < 1 else 1.0
    return Interval(min(low, share), max(high, share))


def sign_flips(differences_C: Floats, seed: int = 0) -> float:
    """The p-value of the hypothesis that each difference might as well have the other sign.

    The share of random assignments of signs whose sum is at least as far from 0 (Fisher, 1935), the observed one
    included (Phipson and Smyth, 2010). Where fewer than ten of them are, the tail of the normal distribution with the
    signs' variance is finer, down to the share of one assignment of all and its opposite.
    """
    sizes_C = np.abs(differences_C[differences_C != 0])
    observed = abs(float(differences_C.sum())) * (1 - 1e-12)  # equal sums may differ in their last bit
    draw, num_beyond, left = np.random.default_rng(seed), 0, _NUM_FLIPS
    while left:
        rows = min(left, max(1, 2**22 // max(1, len(sizes_C))))
        signs = draw.integers(0, 2, (rows, len(sizes_C)), dtype=np.int8) * 2 - 1
        num_beyond += int((np.abs(signs @ sizes_C) >= observed).sum())
        left -= rows
    counted = (1 + num_beyond) / (1 + _NUM_FLIPS)
    if num_beyond >= _FEW_BEYOND:
        return counted
    tail = 2 * float(stats.norm.sf(observed / math.sqrt(float((sizes_C**2).sum())))) if len(sizes_C) else 1.0
    return min(counted, max(tail, 2.0 ** (1 - len(sizes_C)), _LEAST_P))


def seed_correlation(arms: Sequence[Mapping[int, float]]) -> float | None:
    """The correlation between arms of what a seed adds, from the measures of models by seed; None with few.

    Tests take it for 0. A positive one, as of adapters that begin with the same values, makes them cautious.
    """
    seeds = sorted(set.intersection(*(set(arm) for arm in arms))) if len(arms) > 1 else []
    if len(seeds) < _MIN_SEEDS:
        return None
    values_AS = np.array([[arm[seed] for seed in seeds] for arm in arms])
    covariances_AA = np.atleast_2d(np.cov(values_AS))
    own, num = float(np.trace(covariances_AA)), len(arms)
    return float((covariances_AA.sum() - own) / (num - 1) / own) if own else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several p-values, in the same order; NaN stays NaN and does not count as a test."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return [float(value) for value in adjusted]
