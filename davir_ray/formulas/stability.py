"""How stable a selection is: what several references that scored the same rows have in common.

Shape letters: N rows, R references. A place is a number between 0 and 1, NaN where a reference has no score.
"""

import math
from itertools import combinations
from statistics import NormalDist
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_Share = TypeVar("_Share", float, Floats)

_TAIL = 0.975

_DECIMALS = 12
"""Decimals of a mean place: more are rounding errors of the places, which would decide between rows of one mean."""


class Places(NamedTuple):
    """The places of rows, over all references that have scored them."""

    mean_N: Floats
    """Rounded to 12 decimals, so that equal sums of places are equal; NaN where there is none."""
    sd_N: Floats
    """Sample standard deviation; NaN where there are fewer than two."""
    num_N: Ints


class Agreement(NamedTuple):
    """The overlap of the selections of two references, corrected for chance, with a 95 % interval."""

    mean: float
    low: float
    high: float
    over: Literal["references", "rows"]
    """What the interval takes as drawn at random."""


def over_references(places_NR: Floats) -> Places:
    """Mean and spread of each row's places; the same bits for any order of the references."""
    num_N = (~np.isnan(places_NR)).sum(axis=1)
    in_order_NR = np.sort(places_NR, axis=1)  # NaN last
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_N = np.nansum(in_order_NR, axis=1) / num_N
        squares_N = np.nansum((in_order_NR - mean_N[:, None]) ** 2, axis=1)
        sd_N = np.where(num_N > 1, np.sqrt(squares_N / (num_N - 1)), np.nan)
    return Places(np.round(mean_N, _DECIMALS), sd_N, num_N)


def beyond_chance(share: _Share, chance: float) -> _Share:
    """A share of common rows corrected for chance: 0 for rows drawn at random, 1 if all are common."""
    return (share - chance) / (1 - chance)


def agreement(common_RR: Ints, num_selected: int, num_rows: int) -> Agreement | None:
    """The mean over all pairs of references of their overlap, (c / k − k / N) / (1 − k / N).

    c is the number of rows that are among the best k = `num_selected` of N = `num_rows` by both. None if k is N, or
    there is one reference.

    With three references or more, the interval is the mean ± Student's t with R − 1 degrees of freedom times the
    jackknife's standard error over the references: the mean is a U-statistic of pairs (Efron and Stein, 1981). Two
    references show nothing of how much references vary, nor do more that all overlap alike: their interval is Wilson's
    (1927) for the share of k rows, and takes the rows alone as drawn.
    """
    num_references = len(common_RR)
    if num_references < 2 or num_selected >= num_rows:
        return None
    chance = num_selected / num_rows
    overlap_RR = beyond_chance(common_RR / num_selected, chance)
    mean = _mean_of_pairs(overlap_RR)
    squares = 0.0
    if num_references > 2:
        left_out = [np.delete(np.delete(overlap_RR, one, 0), one, 1) for one in range(num_references)]
        squares = float(np.var([_mean_of_pairs(others) for others in left_out])) * (num_references - 1)
    if squares > 0:
        from scipy import stats  # imported late: a driver without repeats does not need it

        half = float(stats.t.ppf(_TAIL, num_references - 1)) * math.sqrt(squares)
        lowest = beyond_chance(max(0, 2 * num_selected - num_rows) / num_selected, chance)
        return Agreement(mean, max(lowest, mean - half), min(1.0, mean + half), "references")
    share = mean * (1 - chance) + chance
    low, high = (beyond_chance(end, chance) for end in _wilson(share, num_selected))
    return Agreement(mean, low, high, "rows")


def _mean_of_pairs(overlap_RR: Floats) -> float:
    return float(np.mean([overlap_RR[pair] for pair in combinations(range(len(overlap_RR)), 2)]))


def _wilson(share: float, num: int) -> tuple[float, float]:
    z = NormalDist().inv_cdf(_TAIL)
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)
