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


_ID_BYTES = 16
"""Bytes of an id and the number of its part."""


def check_ids(folder: Location, shards: list[FileEntry]) -> None:
    """Raise IntegrityError if two rows of these shards have the same example_id."""
    num_rows = total_rows(shards)
    num_parts = 1 + num_rows // _IDS_PER_PART
    repeated = regroup(
        Shards(shards, partial(read_columns, folder, ["example_id"])),
        partial(assign_part, column="example_id", num_parts=num_parts),
        Round("part", num_parts, _repeated_ids),
        kept=_ID_BYTES * num_rows / max(1, sum(entry.bytes for entry in shards)),
    )
    if found := [example_id for ids in repeated for example_id in ids]:
        raise IntegrityError(f"two rows have the same example_id {found[0]}; rename a source to draw new ids")


def _repeated_ids(part: pa.Table) -> list[int]:
    """The first id that occurs twice, if any."""
    ids = np.sort(np.asarray(part["example_id"]))
    return [int(repeated) for repeated in ids[1:][ids[1:] == ids[:-1]][:1]]
