"""The order of a ranking, and how it is cut into bins that can be sorted apart.

Every row gets a composite key (key, example_id), both integers, ascending = best first; no two rows are equal, so the
order is total and every cut exact. Letters: N rows, B boundaries.
"""

import numpy as np
import numpy.typing as npt

from davir_ray.formulas.hashing import Ids, Keys

_SIGN = np.uint64(1) << np.uint64(63)


def value_keys(values: npt.NDArray[np.float64], *, lowest: bool = False) -> Keys:
    """Keys that ascend as values descend (with `lowest`: ascend); -0.0 equals 0.0, infinities take part.

    The bits of an IEEE 754 double, its sign handled, order as the numbers do. Raises ValueError for NaN.
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
    """Composite keys that cut a sample into bins of equal counts: bin b holds what lies at or after boundary b - 1."""
    ranked = order(keys, ids)
    cuts = [len(ranked) * b // num_bins for b in range(1, num_bins)]
    chosen = ranked[np.unique(np.array([cut for cut in cuts if 0 < cut < len(ranked)], dtype=np.int64))]
    return keys[chosen], ids[chosen]


def bins(keys: Keys, ids: Ids, boundary_keys: Keys, boundary_ids: Ids) -> npt.NDArray[np.int64]:
    """Bin of each row: the number of boundaries at or before it. Ties of keys are cut by id, so any data balances."""
    first = np.searchsorted(boundary_keys, keys, side="left")
    last = np.searchsorted(boundary_keys, keys, side="right")
    for start in np.unique(first[last > first]):
        rows = (first == start) & (last > first)
        tied = boundary_ids[start : last[rows][0]]
        first[rows] = start + np.searchsorted(tied, ids[rows], side="right")
    return first.astype(np.int64)
