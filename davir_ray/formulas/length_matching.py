"""A random draw that matches a selection in the number of rows in each range of lengths and in total tokens."""

import numpy as np
import numpy.typing as npt

from davir_ray.formulas.hashing import Keys

Ints = npt.NDArray[np.int64]

_MAX_PASSES = 20
"""Maximum number of passes over the rows of a range. Every swap reduces the difference; one or two passes usually
remove it."""


def length_bins(lengths: Ints, edges: list[int]) -> Ints:
    """The range that each length falls into: 0 is below the first edge."""
    return np.searchsorted(edges, lengths, side="right").astype(np.int64)


def length_cells(lengths: Ints, prompts: Ints | None, edges: list[int]) -> Ints:
    """The cell of each row: its range of response lengths and, with `prompts`, its range of prompt lengths."""
    bins = length_bins(lengths, edges)
    return bins if prompts is None else bins * (len(edges) + 1) + length_bins(prompts, edges)


def matched_draw(
    keys: Keys,
    lengths: Ints,
    wanted: Ints,
    edges: list[int],
    *,
    prompts: Ints | None = None,
    wanted_prompts: Ints | None = None,
) -> Ints:
    """Rows drawn from a pool with these lengths, in the order of their random keys, to match the wanted lengths.

    From each range of lengths, the wanted number of rows is drawn. Then drawn rows are swapped for others of their
    range until the total number of tokens matches, or is as close as swaps can bring it. With the lengths of prompts,
    a range is a pair of a range of response lengths and one of prompt lengths: both histograms are then those of the
    wanted rows, but the total number of tokens is matched for responses alone. The result depends on the keys, not on
    the order of the pool. Raises ValueError if a range of the pool has fewer rows than are wanted.
    """
    bins, wanted_bins = length_cells(lengths, prompts, edges), length_cells(wanted, wanted_prompts, edges)
    drawn: list[Ints] = []
    others: list[Ints] = []
    missing = 0
    for number in np.unique(wanted_bins):
        rows = np.flatnonzero(bins == number)
        rows = rows[np.argsort(keys[rows], kind="stable")]
        count = int((wanted_bins == number).sum())
        if len(rows) < count:
            raise ValueError(f"{count} rows are wanted from a range of lengths that has {len(rows)}")
        drawn.append(rows[:count])
        others.append(rows[count:])
        missing += _swap_to(int(wanted[wanted_bins == number].sum()), drawn[-1], others[-1], lengths)
    for chosen, rest in zip(drawn, others, strict=True):  # what is missing in one range may be found in another
        if missing:
            missing = _swap_to(int(lengths[chosen].sum()) + missing, chosen, rest, lengths)
    return np.concatenate(drawn)


def _swap_to(tokens: int, chosen: Ints, rest: Ints, lengths: Ints) -> int:
    """Swap rows between `chosen` and `rest`, in place, until the chosen have `tokens`; returns the number missing."""
    missing = tokens - int(lengths[chosen].sum())
    for _ in range(_MAX_PASSES):
        before = missing
        for place, row in enumerate(chosen):
            if not missing:
                return 0
            gains = lengths[rest] - lengths[row]
            nearer = np.flatnonzero(np.abs(missing - gains) < abs(missing))
            if len(nearer):
                other = nearer[0]  # first in the random order: taking the longest would distort the distribution
                chosen[place], rest[other] = rest[other], row
                missing -= int(gains[other])
        if missing == before:
            break
    return missing
