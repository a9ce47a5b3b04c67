"""A random draw that is like a given selection in length: as many rows in each range, and as many tokens in all."""

import numpy as np
import numpy.typing as npt

from davir_ray.formulas.hashing import Keys

Ints = npt.NDArray[np.int64]

_MOST_PASSES = 20
"""Over a range's rows; each swap brings the sum nearer, and one or two passes are enough where it can be met."""


def length_bins(lengths: Ints, edges: list[int]) -> Ints:
    """Range of each length: 0 below the first edge."""
    return np.searchsorted(edges, lengths, side="right").astype(np.int64)


def matched_draw(keys: Keys, lengths: Ints, wanted: Ints, edges: list[int]) -> Ints:
    """Rows of a pool with these lengths, drawn in the order of their random keys, matched to the wanted lengths.

    In each range of lengths as many rows as are wanted; then rows change places with others of their range until the
    tokens are as many as wanted, in each range and so in all, or as near as swaps bring them. The result depends on the
    keys alone, not on the order of the pool. ValueError if a range of the pool has fewer rows than are wanted.
    """
    bins, wanted_bins = length_bins(lengths, edges), length_bins(wanted, edges)
    drawn: list[Ints] = []
    others: list[Ints] = []
    left = 0
    for number in np.unique(wanted_bins):
        rows = np.flatnonzero(bins == number)
        rows = rows[np.argsort(keys[rows], kind="stable")]
        count = int((wanted_bins == number).sum())
        if len(rows) < count:
            raise ValueError(f"{count} rows are wanted of a range of lengths that has {len(rows)}")
        drawn.append(rows[:count])
        others.append(rows[count:])
        left += _close(drawn[-1], others[-1], lengths, int(wanted[wanted_bins == number].sum()))
    for chosen, rest in zip(drawn, others, strict=True):  # what one range could not give, another may
        if left:
            left = _close(chosen, rest, lengths, int(lengths[chosen].sum()) + left)
    return np.concatenate(drawn)


def _close(chosen: Ints, rest: Ints, lengths: Ints, tokens: int) -> int:
    """Swap rows, in place, until the chosen have so many tokens; returns how many are still missing."""
    missing = tokens - int(lengths[chosen].sum())
    for _ in range(_MOST_PASSES):
        before = missing
        for place, row in enumerate(chosen):
            if not missing:
                return 0
            gains = lengths[rest] - lengths[row]
            nearer = np.flatnonzero(np.abs(missing - gains) < abs(missing))
            if len(nearer):
                other = nearer[0]  # the first in the random order: the longest would bend the distribution
                chosen[place], rest[other] = rest[other], row
                missing -= int(gains[other])
        if missing == before:
            break
    return missing
