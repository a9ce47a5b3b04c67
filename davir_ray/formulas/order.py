"""The order of a ranking, and how it is cut into bins that can be sorted apart.

Every row gets a composite key (key, example_id), both integers, ascending = best first; no two rows are equal, so the
order is total and every cut exact. Letters: N rows, B boundaries.
"""

import hashlib

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]

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


def random_keys(example_ids: Ids, seed: int, *, lowest: bool = False) -> Keys:
    """Keys of a random order that depends on (seed, example_id) only: splitmix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        z = example_ids.astype(np.uint64) + _mix(np.array([seed & (2**64 - 1)], dtype=np.uint64))
        keys = _mix(z)
    return ~keys if lowest else keys


def drawn(example_ids: Ids, share: float, purpose: str) -> npt.NDArray[np.bool_]:
    """Which rows belong to a sample of this share: by id and purpose alone, so every run draws the same."""
    limit = np.uint64(min(2**64 - 1, int(share * 2**64)))
    return np.asarray(random_keys(example_ids, seed_from(purpose)) <= limit)


def hash_parts(hashes: Ids, num_parts: int) -> npt.NDArray[np.int64]:
    """Part of each 63-bit hash when their range is cut into equal parts, which then hold about equally many."""
    return np.asarray(np.minimum(hashes // ((2**63 - 1) // num_parts), num_parts - 1), dtype=np.int64)


def seed_from(*parts: object) -> int:
    """A seed below 2**63 from values whose text is stable."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _mix(z: Keys) -> Keys:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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
