"""Shards: files of a run that are read one by one, in tasks that read one or a few."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from davir_ray.errors import IntegrityError
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.location import Location


@dataclass(frozen=True)
class Shards:
    """Named shards; `read(name)` gives the table of one."""

    entries: list[FileEntry]
    read: Callable[[str], pa.Table]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(entry.bytes for entry in self.entries)


def grouped(shards: list[FileEntry], *, max_shards: int, max_bytes: float) -> list[list[FileEntry]]:
    """Neighbouring shards in groups of at most `max_shards` and, where there are several, `max_bytes` on disk."""
    groups: list[list[FileEntry]] = []
    size = 0
    for shard in shards:
        if not groups or len(groups[-1]) == max_shards or size + shard.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.bytes
    return groups


def read_columns(folder: Location, columns: list[str] | None, name: str) -> pa.Table:
    """The columns of one shard; None: all of them."""
    return read_parquet(folder / name, columns)


def read_side_by_side(
    folder: Location, columns: list[str] | None, beside: Location, more: list[str], name: str
) -> pa.Table:
    """The columns of one shard, and more columns from the file of the same name in another folder.

    Raises IntegrityError unless both have the same rows in the same order. `columns` has example_id; None: all.
    """
    table, other = read_columns(folder, columns, name), read_columns(beside, ["example_id", *more], name)
    if not table["example_id"].equals(other["example_id"]):
        raise IntegrityError(f"{folder / name} and {beside / name} do not hold the same rows; redo with --overwrite")
    for column in more:
        table = table.append_column(other.schema.field(column), other[column])
    return table
