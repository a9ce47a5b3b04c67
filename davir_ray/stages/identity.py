"""Is every example_id unique? An order by score and id would not be total otherwise, nor a join by id exact."""

from functools import partial

import numpy as np
import pyarrow as pa
import ray.data

from davir_ray.errors import IntegrityError
from davir_ray.stages.cluster import num_cpus, own_errors, whole_block_context
from davir_ray.stages.shards import Shards, read_columns
from davir_ray.storage import FileEntry, Location

_IDS_PER_PART = 2_000_000
"""Ids that one task compares; 16 MB."""

_MOST_PARTITIONS = 200
_TIMEOUT_S = 1800


def check_ids(run: Location, shards: list[FileEntry]) -> None:
    """Raise IntegrityError if two rows of scores/ have the same example_id.

    Ids are hashes, so equal parts of their range hold equally many; each part is brought together and counted.
    """
    num_parts = 1 + sum(shard.rows for shard in shards) // _IDS_PER_PART
    source = Shards(shards, partial(read_columns, run / "scores", ["example_id"]))
    source = source.then(partial(_assign_part, num_parts=num_parts), num_cpus())
    with own_errors(), ray.data.DataContext.current(whole_block_context(_TIMEOUT_S)):
        found = (
            ray.data.read_datasource(source, **source.read_options)
            .groupby("part", num_partitions=min(num_parts, _MOST_PARTITIONS))
            .map_groups(_repeated_ids, batch_format="pyarrow")
            .take_all()
        )
    repeated = [row["example_id"] for row in found if row["example_id"] >= 0]
    if repeated:
        raise IntegrityError(f"two rows have the same example_id {repeated[0]}; rename a source to draw new ids")


def _assign_part(table: pa.Table, num_parts: int) -> pa.Table:
    part = np.minimum(np.asarray(table["example_id"]) // ((2**63 - 1) // num_parts), num_parts - 1)
    return table.append_column("part", pa.array(part, pa.int64()))


def _repeated_ids(group: pa.Table) -> pa.Table:
    """One id that occurs twice, or -1: an empty answer would lose its column."""
    ids = np.sort(np.asarray(group["example_id"]))
    repeated = ids[1:][ids[1:] == ids[:-1]]
    return pa.table({"example_id": pa.array(repeated[:1] if len(repeated) else [-1], pa.int64())})
