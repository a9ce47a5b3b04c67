"""Random draws and partitions by hash: the result for a row does not depend on the shards or their order."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]


def random_keys(example_ids: Ids, seed: int, *, lowest: bool = False) -> Keys:
    """Keys of a random order that depends on seed and example_id only: splitmix64 (Steele, Lea and Flood, 2014).

    Ascending keys are the order; `lowest` reverses it.
    """
    with np.errstate(over="ignore"):
        z = example_ids.astype(np.uint64) + _mix(np.array([seed & (2**64 - 1)], dtype=np.uint64))
        keys = _mix(z)
    return ~keys if lowest else keys


def drawn(example_ids: Ids, share: float, purpose: str) -> npt.NDArray[np.bool_]:
    """Which rows belong to a random sample of about this share; it depends on their ids and the purpose alone."""
    limit = np.uint64(min(2**64 - 1, int(share * 2**64)))
    return np.asarray(random_keys(example_ids, seed_from(purpose)) <= limit)


def sample_rows(table: pa.Table, share: float, purpose: str, id_column: str = "example_id") -> pa.Table:
    """The rows of a table that belong to the sample of this share."""
    return table.filter(pa.array(drawn(np.asarray(table[id_column]), share, purpose)))


def hash_parts(hashes: Ids, num_parts: int) -> npt.NDArray[np.int64]:
    """The part that each 63-bit hash falls into when their range is cut into equal parts."""
    return np.asarray(np.minimum(hashes // ((2**63 - 1) // num_parts), num_parts - 1), dtype=np.int64)


def seed_from(*parts: object) -> int:
    """A seed below 2**63 from values whose repr is stable across processes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _mix(z: Keys) -> Keys:
    """One step of splitmix64."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
