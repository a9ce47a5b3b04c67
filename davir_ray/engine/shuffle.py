"""Operations over all shards: collect a small table from each, write a file for each, or group rows across shards.

Only what a shard's task returns is moved; the driver sees summaries and the entries of files.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from davir_ray.engine.connect import own_errors, whole_block_context
from davir_ray.engine.resources import num_cpus
from davir_ray.engine.shards import Shards
from davir_ray.formulas.hashing import hash_parts
from davir_ray.run.files import FileEntry

_MAX_PARTITIONS = 200
"""Ray's default, which costs seconds where there are only a few groups."""

_WRITTEN = pa.schema([("written", pa.string())])
"""A Written as JSON; null if a task had nothing to write."""

Change = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Written:
    """A file that a task wrote, and what the task counted in it."""

    entry: FileEntry
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """One shuffle: groups rows by the number in `column`, in any order; `work` makes a small table of each group.

    That table must not be empty: an empty block comes back without its columns (2.60).
    """

    column: str
    num_groups: int
    work: Change


def collect(shards: Shards, summarise: Change, schema: pa.Schema) -> pa.Table:
    """Make a small table of each shard, with this schema; returns them as one table in the driver."""
    shards = shards.then(lambda _, table: summarise(table), num_cpus())
    return in_driver(ray.data.read_datasource(shards, **shards.read_options), schema)


def gather(shards: Shards, schema: pa.Schema) -> pa.Table:
    """Bring the rows of every shard, as they are read, into the driver; returns them as one table."""
    return collect(shards, lambda table: table, schema)


def write_shards(shards: Shards, write: Callable[[str, pa.Table], Written | None]) -> list[Written]:
    """Write a file for each shard in the task that reads it; returns what was written, sorted by name.

    `write(name, rows)` writes the file of one shard; it returns None where it has nothing to write.
    """
    shards = shards.then(lambda name, table: _to_row(write(name, table)), num_cpus())
    return _from_rows(in_driver(ray.data.read_datasource(shards, **shards.read_options), _WRITTEN).to_pylist())


def regroup(shards: Shards, assign: Change, *rounds: Round) -> list[dict[str, Any]]:
    """Group rows across shards, in one round or several; returns the rows that the last round made.

    `assign` adds the first round's column to the table of a shard, and drops what is not needed.
    """
    if shards.fit_one_task and all(each.num_groups == 1 for each in rounds):  # a shuffle would take seconds
        whole = shards.as_one(assign, *(partial(_in_groups, each) for each in rounds))
        with own_errors():
            return list(ray.data.read_datasource(whole, **whole.read_options).take_all())
    shards = shards.then(lambda _, table: assign(table), num_cpus())
    with own_errors(), ray.data.DataContext.current(whole_block_context()):
        dataset = ray.data.read_datasource(shards, **shards.read_options)
        for each in rounds:
            grouped = dataset.groupby(each.column, num_partitions=min(each.num_groups, _MAX_PARTITIONS))
            dataset = grouped.map_groups(each.work, batch_format="pyarrow")
        return list(dataset.take_all())


def _in_groups(round_: Round, table: pa.Table) -> pa.Table:
    """What the round makes of the groups of a table."""
    numbers = table[round_.column]
    return pa.concat_tables(round_.work(table.filter(pc.equal(numbers, number))) for number in pc.unique(numbers))


def assign_part(table: pa.Table, column: str, num_parts: int) -> pa.Table:
    """Add the column `part`, a number below `num_parts` that is the same for equal values of a column of integers."""
    return table.append_column("part", pa.array(hash_parts(np.asarray(table[column]), num_parts)))


def exchange(
    shards: Shards,
    assign: Change,
    num_bins: int,
    write: Callable[[int, pa.Table], FileEntry],
    rounds_before: Sequence[Round] = (),
) -> list[FileEntry]:
    """Group the rows by bin and write each bin as one file; returns the entries, sorted by name.

    `assign`, or the last of the rounds before, adds the column `bin`; rows of a bin below 0 are not written.
    `write(number, rows)` gets a whole bin, in any order. It writes the file itself, because a Datasink would not see
    bins: blocks after map_groups may be split, merged or empty (2.60).
    """
    rows = regroup(shards, assign, *rounds_before, Round("bin", num_bins, partial(_write_bin, write)))
    return [written.entry for written in _from_rows(rows)]


def in_driver(dataset: ray.data.Dataset, schema: pa.Schema) -> pa.Table:
    """Execute a dataset of small tables with this schema; returns them as one table in the driver."""
    with own_errors():
        tables = ray.get(dataset.to_arrow_refs())
    # An empty block comes back without its columns (2.60).
    return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables if table.num_rows)])


def _write_bin(write: Callable[[int, pa.Table], FileEntry], rows: pa.Table) -> pa.Table:
    number = int(rows["bin"][0].as_py())
    return _to_row(Written(write(number, rows)) if number >= 0 else None)


def _to_row(written: Written | None) -> pa.Table:
    return pa.table([[None if written is None else json.dumps(asdict(written))]], _WRITTEN)


def _from_rows(rows: list[dict[str, Any]]) -> list[Written]:
    found = [json.loads(row["written"]) for row in rows if row["written"] is not None]
    written = [Written(FileEntry(**one["entry"]), one["facts"]) for one in found]
    return sorted(written, key=lambda one: one.entry.name)
