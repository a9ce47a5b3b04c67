"""Is every example_id unique? An order by score and id would not be total otherwise, nor a join by id exact."""

from functools import partial

import numpy as np
import pyarrow as pa

from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Round, regroup
from davir_ray.errors import IntegrityError
from davir_ray.formulas.hashing import hash_parts
from davir_ray.run.files import FileEntry
from davir_ray.run.location import Location

_IDS_PER_PART = 2_000_000
"""Ids that one task compares; 16 MB."""


def check_ids(folder: Location, shards: list[FileEntry]) -> None:
    """Raise IntegrityError if two rows of scores/ (or of frozen/) have the same example_id."""
    num_parts = 1 + sum(shard.rows for shard in shards) // _IDS_PER_PART
    found = regroup(
        Shards(shards, partial(read_columns, folder, ["example_id"])),
        partial(_assign_part, num_parts=num_parts),
        Round("part", num_parts, _repeated_ids),
    )
    repeated = [row["example_id"] for row in found if row["example_id"] >= 0]
    if repeated:
        raise IntegrityError(f"two rows have the same example_id {repeated[0]}; rename a source to draw new ids")


def _assign_part(table: pa.Table, num_parts: int) -> pa.Table:
    return table.append_column("part", pa.array(hash_parts(np.asarray(table["example_id"]), num_parts)))


def _repeated_ids(group: pa.Table) -> pa.Table:
    """One id that occurs twice, or -1."""
    ids = np.sort(np.asarray(group["example_id"]))
    repeated = ids[1:][ids[1:] == ids[:-1]]
    return pa.table({"example_id": pa.array(repeated[:1] if len(repeated) else [-1], pa.int64())})
