"""The tests of a comparison: which arms are compared, on what, with what correction, and what the page may say of it.

One test is primary, declared by the settings before anything is trained: it is corrected at most for the sizes that
were chosen from. All others on the page
are corrected together (Holm), whatever arms, sizes, schedules, measures and sources they are of; so are the tests of
equivalence, which alone allow a page to call two arms level.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from davir_ray.formulas.statistics import MIN_DIFFERING, Difference, Estimate, Interval, Panel, holm

SIGNIFICANT = 0.05

ON_AVERAGE, ANOTHER_DRAW = "on average", "another draw"
"""The questions of a test: is an arm better than the mean of the other's draws, and than one more draw would be?"""

BETTER, WORSE, LEVEL, NOT_RESOLVED = "better", "worse", "level", "not resolved"

NOT_TESTED, FEW_DIFFER, NO_VARIANCE = "shown only", f"fewer than {MIN_DIFFERING} differ", "no variance"
"""Why a difference is not tested, besides an arm of one model or one draw."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One arm minus another: a row of tests.parquet."""

    measure: str
    source: str | None
    """None: all sources together."""
    rows: int
    reading: str
    arm: str
    against: str
    question: str
    primary: bool = False
    num_heldout: int
    num_differing: int
    """Number of examples on which the two differ."""
    mean: float
    low: float
    high: float
    """Ends of the 95 % interval, not adjusted for other tests."""
    margin: float
    """Differences up to this size count as none."""
    degrees: float
    p: float | None
    """p-value, not corrected; None where there is no test, for the reason in `untested`."""
    p_holm: float | None = None
    """p of the primary test, times the sizes that it was chosen from; of the others p with Holm's correction over all
    of the page but the primary."""
    p_level: float | None
    """p-value of equivalence within the margin, not corrected."""
    p_level_holm: float | None = None
    """Likewise of p_level."""
    p_models: float | None
    """p-value for these particular models: from the variance over the examples alone. None where there is none."""
    untested: str | None
    lower_is_better: bool

    @property
    def within_margin(self) -> bool:
        """Whether a test of equivalence shows that the difference is smaller than the margin."""
        return self.p_level_holm is not None and self.p_level_holm < SIGNIFICANT

    @property
    def verdict(self) -> str:
        """What the page may say of the first arm; empty where there is no test."""
        if self.p_holm is not None and self.p_holm < SIGNIFICANT:
            return BETTER if (self.mean < 0) == self.lower_is_better else WORSE
        if self.within_margin:
            return LEVEL
        return "" if self.untested else NOT_RESOLVED


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a contrast is of, apart from its two arms."""

    measure: str
    source: str | None
    rows: int
    reading: str
    is_share: bool
    """Whether the values are answers, right (1) or wrong (0)."""
    lower_is_better: bool
    margin: float
    """Differences up to this size count as none."""
    num_heldout: int
    tested: bool
    """Whether there are p-values; else the differences are only shown with their intervals."""


def contrasts_of(
    scope: Scope, pairs: Sequence[tuple[str, str]], arms: Mapping[str, Hashable], panel: Panel
) -> Iterator[Contrast]:
    """The contrasts of those pairs of arms that are both there; `arms` are their names in the panel."""
    for arm, against in pairs:
        if arm not in arms or against not in arms:
            continue
        found = panel.difference(arms[arm], arms[against], shares=scope.is_share)
        few = scope.is_share and found.num_differing < MIN_DIFFERING
        interval = panel.difference_of_shares(arms[arm], arms[against]) if few else found.estimate.interval
        untested = found.lone if scope.tested else NOT_TESTED
        yield _contrast(scope, (arm, against, ON_AVERAGE), found, found.estimate, interval, untested)
        if found.another_draw is not None and not few:
            another = found.another_draw
            yield _contrast(scope, (arm, against, ANOTHER_DRAW), found, another, another.interval, untested)


def corrected(
    contrasts: Sequence[Contrast], is_primary: Callable[[Contrast], bool], num_sizes: int = 1
) -> list[Contrast]:
    """The contrasts with their corrected p-values; `is_primary(contrast)` is true of the declared test.

    If its size was chosen among several, its p-values are multiplied by their number (Bonferroni): the choice is made
    on other examples, but on the same models, whose luck it keeps.
    """
    marked = [replace(one, primary=is_primary(one)) for one in contrasts]
    p, p_level = (
        holm([math.nan if one.primary or found is None else found for one, found in zip(marked, of, strict=True)])
        for of in ([one.p for one in marked], [one.p_level for one in marked])
    )
    return [
        replace(
            one,
            p_holm=_times(one.p, num_sizes) if one.primary else _known(p[place]),
            p_level_holm=_times(one.p_level, num_sizes) if one.primary else _known(p_level[place]),
        )
        for place, one in enumerate(marked)
    ]


def _contrast(
    scope: Scope,
    names: tuple[str, str, str],
    found: Difference,
    estimate: Estimate,
    interval: Interval,
    untested: str | None,
) -> Contrast:
    """The contrast of two arms on a question, `names`; not yet corrected for the other tests."""
    few = scope.is_share and found.num_differing < MIN_DIFFERING
    p = max(estimate.p, found.p_flips or 0.0)
    untested = untested or (FEW_DIFFER if few else NO_VARIANCE if math.isnan(p) else None)
    if scope.is_share:
        interval = interval.clipped(-1.0, 1.0)
    return Contrast(
        measure=scope.measure,
        source=scope.source,
        rows=scope.rows,
        reading=scope.reading,
        arm=names[0],
        against=names[1],
        question=names[2],
        num_heldout=scope.num_heldout,
        num_differing=found.num_differing,
        mean=estimate.mean,
        low=interval.low,
        high=interval.high,
        margin=scope.margin,
        degrees=estimate.degrees,
        p=None if untested else p,
        p_level=None if untested else _known(estimate.p_beyond(scope.margin)),
        p_models=None if few or not scope.tested else _known(found.p_flips or found.of_models.p),
        untested=untested,
        lower_is_better=scope.lower_is_better,
    )


def _times(p: float | None, number: int) -> float | None:
    return None if p is None else min(1.0, p * number)


def _known(p: float) -> float | None:
    return None if math.isnan(p) else p
