"""How rows meet: a small table from every shard in the driver, or the rows of a group in one task.

Only what a shard's task lets through is moved; the driver sees summaries and the names of files.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray.data

from davir_ray.engine.connect import num_cpus, own_errors, whole_block_context
from davir_ray.engine.shards import Shards
from davir_ray.run.files import FileEntry

_MOST_PARTITIONS = 200
"""Ray's default, which costs seconds where there are only a few groups."""

ENTRY = pa.schema([("name", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())])

Change = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Round:
    """Rows with the same number in `column` come together, in any order, and `work` makes a small table of them.

    It must not be empty: an empty block comes back without its columns (2.60).
    """

    column: str
    num_groups: int
    work: Change


def collect(shards: Shards, summarise: Change, schema: pa.Schema) -> pa.Table:
    """A small table from each shard, with this schema, together in the driver."""
    shards = shards.then(summarise, num_cpus())
    with own_errors():
        tables = ray.get(ray.data.read_datasource(shards, **shards.read_options).to_arrow_refs())
    # An empty block comes back without its columns (2.60).
    return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables if table.num_rows)])


def regroup(shards: Shards, assign: Change, *rounds: Round) -> list[dict[str, Any]]:
    """Bring rows together, once or in several rounds; returns the rows that the last round made.

    `assign` adds the first round's column to the table of a shard, and drops what is not needed.
    """
    shards = shards.then(assign, num_cpus())
    with own_errors(), ray.data.DataContext.current(whole_block_context()):
        dataset = ray.data.read_datasource(shards, **shards.read_options)
        for each in rounds:
            grouped = dataset.groupby(each.column, num_partitions=min(each.num_groups, _MOST_PARTITIONS))
            dataset = grouped.map_groups(each.work, batch_format="pyarrow")
        return list(dataset.take_all())


def exchange(shards: Shards, assign: Change, num_bins: int, write: Change) -> list[FileEntry]:
    """Bring the rows of each bin together to be written as one file.

    `assign` adds the column `bin`; `write` gets a bin whole and returns `entry_row` of its file. It writes the file
    itself, for a Datasink would not see bins: blocks after map_groups may be split, merged or empty (2.60).
    """
    rows = regroup(shards, assign, Round("bin", num_bins, write))
    return sorted((FileEntry(**row) for row in rows), key=lambda entry: entry.name)


def entry_row(entry: FileEntry) -> pa.Table:
    """A file's entry as a row that `exchange` understands."""
    return pa.table({name: [value] for name, value in asdict(entry).items() if name in ENTRY.names}, ENTRY)


def entries_of(rows: list[dict[str, Any]]) -> list[FileEntry]:
    """Of rows that hold the columns of ENTRY beside others."""
    return [FileEntry(**{name: row[name] for name in ENTRY.names}) for row in rows]


def table_of(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """Rows as a table."""
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)
