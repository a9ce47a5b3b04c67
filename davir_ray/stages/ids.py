"""Example ids, which the ranking and joins need to be unique.

Apart from the stages that call it, because the tasks of the check import this module: those stages import models, which
takes each worker seconds.
"""

from functools import partial

import numpy as np
import pyarrow as pa

from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Round, assign_part, regroup
from davir_ray.errors import IntegrityError
from davir_ray.run.files import FileEntry, total_rows
from davir_ray.run.location import Location

IDS_CHECKED = "ids_checked"
"""Key in the details of prepare's manifest: True since its ids are checked there."""

_IDS_PER_PART = 2_000_000
"""Ids that one task compares; 16 MB."""


def check_ids(folder: Location, shards: list[FileEntry]) -> None:
    """Raise IntegrityError if two rows of these shards have the same example_id."""
    num_parts = 1 + total_rows(shards) // _IDS_PER_PART
    found = regroup(
        Shards(shards, partial(read_columns, folder, ["example_id"])),
        partial(assign_part, column="example_id", num_parts=num_parts),
        Round("part", num_parts, _repeated_id),
    )
    repeated = [row["example_id"] for row in found if row["example_id"] >= 0]
    if repeated:
        raise IntegrityError(f"two rows have the same example_id {repeated[0]}; rename a source to draw new ids")


def _repeated_id(group: pa.Table) -> pa.Table:
    """One id that occurs twice, or -1."""
    ids = np.sort(np.asarray(group["example_id"]))
    repeated = ids[1:][ids[1:] == ids[:-1]]
    return pa.table({"example_id": pa.array(repeated[:1] if len(repeated) else [-1], pa.int64())})
