"""The order of a ranking, and its partition into bins that can be sorted separately.

Every row has a composite key (key, example_id) of two integers; in ascending order the best row comes first. No two
rows have equal keys, so the order is total and every partition exact.
"""

import numpy as np
import numpy.typing as npt

from davir_ray.formulas.hashing import Ids, Keys

_SIGN = np.uint64(1) << np.uint64(63)


def value_keys(values: npt.NDArray[np.float64], *, lowest: bool = False) -> Keys:
    """Keys that ascend as the values descend, or with `lowest` as they ascend; -0.0 equals 0.0.

    Interpreted as integers, the bits of IEEE 754 doubles sort like the numbers, infinities included, once the sign is
    handled. Raises ValueError for NaN.
    """
    if np.isnan(values).any():
        raise ValueError("NaN has no rank; filter it first")
    bits = (values + 0.0).view(np.uint64)
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return ascending if lowest else ~ascending


def order(keys: Keys, ids: Ids) -> npt.NDArray[np.intp]:
    """Row indices from best to worst."""
    return np.lexsort((ids, keys))


def boundaries(keys: Keys, ids: Ids, num_bins: int) -> tuple[Keys, Ids]:
    """The composite keys that cut a sample into bins of equal size; bin b begins with boundary b - 1."""
    ranked = order(keys, ids)
    cuts = [len(ranked) * b // num_bins for b in range(1, num_bins)]
    chosen = ranked[np.unique(np.array([cut for cut in cuts if 0 < cut < len(ranked)], dtype=np.int64))]
    return keys[chosen], ids[chosen]


def bins(keys: Keys, ids: Ids, boundary_keys: Keys, boundary_ids: Ids) -> npt.NDArray[np.int64]:
    """The bin of each row: the number of boundaries that are not after it.

    Rows with equal keys are divided by id, so the bins are of equal size even where most keys are tied.
    """
    first = np.searchsorted(boundary_keys, keys, side="left")
    last = np.searchsorted(boundary_keys, keys, side="right")
    for start in np.unique(first[last > first]):
        rows = (first == start) & (last > first)
        tied = boundary_ids[start : last[rows][0]]
        first[rows] = start + np.searchsorted(tied, ids[rows], side="right")
    return first.astype(np.int64)
