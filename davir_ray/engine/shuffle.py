"""Operations over all shards, in plain Ray tasks: make a small table, write files, or group rows across shards.

A task reads a few shards, and only what it returns is moved: the driver sees summaries and the entries of files. Rows
that are grouped pass through Ray's object store, which spills to disk what does not fit. What a worker or a node that
dies had made is made again.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from davir_ray.engine.connect import own_errors
from davir_ray.engine.resources import num_cpus
from davir_ray.engine.shards import Shards, grouped
from davir_ray.engine.tasks import call, results_of
from davir_ray.errors import IntegrityError
from davir_ray.formulas.hashing import hash_parts
from davir_ray.run.files import FileEntry

_TASKS_PER_CPU = 4
_LEAST_TASK_BYTES = 2 * 2**20
"""Bytes on disk that take about as long to read as a task takes to start, where its worker runs."""

_MAX_TASKS = 500
"""Maximum number of tasks that read, unless they would keep too many bytes."""

_KEPT_BYTES = 128 * 2**20
"""Maximum bytes on disk of several shards whose rows a task keeps; they take a few times as many in memory."""

_MAX_OBJECTS = 100_000
"""Number of objects of a shuffle at most, if memory allows: each task that reads makes one for each task that groups,
and each costs the driver about 2 kB."""

_OBJECT_BYTES = 2**18
"""Least bytes of an object, if there are so many: Ray passes those below 100 kB through the driver."""

_GROUPED_BYTES = 2**28
"""Bytes on disk of the shards that a task which groups may take its rows from, even if that makes more objects."""

_READ_BYTES = 2**31
"""Maximum bytes on disk of several shards that a task reads one by one: it must end within the limit of no progress."""

_WIDE_BYTES = 2**30
"""Bytes of a table above which its text gets 64-bit offsets: 32-bit ones end at 2 GiB."""

_WIDE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}

Change = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Written:
    """A file that a task wrote, and what the task counted in it."""

    entry: FileEntry
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """Groups rows by the number in `column`, in any order; `work` gets each group that has rows.

    Rows with a number below 0 are dropped. What `work` returns is a table with the column of the next round, or after
    the last one anything small.
    """

    column: str
    num_groups: int
    work: Callable[[pa.Table], Any]


def collect(
    shards: Shards,
    summarise: Change,
    schema: pa.Schema,
    *,
    merge: Change | None = None,
    finish: Change | None = None,
) -> pa.Table:
    """Make a small table of each shard, with this schema; returns them as one table in the driver.

    `merge` makes a smaller table, with the same schema, of several; `finish` makes what the driver gets of the whole.
    Both work in tasks.
    """

    def merged(tables: Iterable[pa.Table]) -> pa.Table:
        whole = _concatenated(schema, tables)
        return whole if merge is None else merge(whole)

    summaries = _of_groups(shards, lambda names, read: merged(summarise(read(name)) for name in names))
    if merge is None and finish is None:
        return _concatenated(schema, _results(summaries))
    job = ray.put(lambda *tables: merged(tables) if finish is None else finish(merged(tables)))
    last = call.remote(job, *summaries)
    (found,) = _results([last], [*summaries, last])
    return found


def gather(shards: Shards, schema: pa.Schema) -> pa.Table:
    """Bring the rows of every shard, as they are read, into the driver; returns them as one table."""
    return collect(shards, lambda table: table, schema)


def write_shards(shards: Shards, write: Callable[[str, pa.Table], Written | None]) -> list[Written]:
    """Write a file for each shard in the task that reads it; returns what was written, sorted by name.

    `write(name, rows)` writes the file of one shard; it returns None where it has nothing to write.
    """
    written = _results(_of_groups(shards, lambda names, read: [write(name, read(name)) for name in names]))
    found = [one for group in written for one in group if one is not None]
    return sorted(found, key=lambda one: one.entry.name)


def regroup(shards: Shards, assign: Change, *rounds: Round, kept: float = 1.0) -> list[Any]:
    """Group rows across shards, in one round or several; returns what the last round made of each group.

    `assign` adds the first round's column to the table of a shard, and drops what is not needed; `kept` is the share of
    the shards' bytes that is left.
    """
    first, *following = rounds
    return scatter(shards, assign, first.column, first.num_groups, kept=kept).make(first.work, *following)


def scatter(
    shards: Shards, assign: Change, column: str, num_groups: int, *, num_needed: int | None = None, kept: float = 1.0
) -> "Scattered":
    """Start tasks that count the rows of each group, and send those of the first `num_needed` to tasks that group them.

    `assign` and `kept` are those of `regroup`. None: all groups are needed.
    """
    num_needed = num_groups if num_needed is None else num_needed
    num_bytes = kept * shards.num_bytes
    groups = _grouped_for_tasks(shards, max_bytes=_KEPT_BYTES / kept)
    parts = _Parts(column, _edges(num_needed, num_bytes, len(groups)))

    def work(names: list[str], read: Callable[[str], pa.Table]) -> list[Any]:
        rows_by_group, tables = np.zeros(num_groups, np.int64), []
        for name in names:
            table = assign(read(name))
            numbers = _group_numbers(table, column, num_groups)
            rows_by_group += np.bincount(numbers[numbers >= 0], minlength=num_groups)
            needed = numbers < num_needed
            tables.append(table if needed.all() else table.filter(pa.array(needed)))
        return [rows_by_group, *parts.cut(tables)]

    refs = _of_groups(shards, work, groups=groups, num_returns=1 + parts.num_tasks)
    return Scattered(num_groups=num_groups, num_bytes=num_bytes, parts=parts, refs=refs)


@dataclass(frozen=True, kw_only=True)
class Scattered:
    """Rows of shards in Ray's object store, in a part for each task that will group them."""

    num_groups: int
    """Number of groups, needed or not."""
    num_bytes: float
    """Bytes on disk of the rows."""
    parts: "_Parts"
    refs: list[Any]
    """For each task that reads, references to its counts and to each of its parts."""

    def rows_by_group(self) -> npt.NDArray[np.int64]:
        """The number of rows of each group, needed or not, when all shards are read."""
        rows_by_group = np.zeros(self.num_groups, np.int64)
        for counts in results_of([counts for counts, *_ in self.refs]):
            rows_by_group += counts
        return rows_by_group

    def make(self, work: Callable[[pa.Table], Any], *rounds: Round) -> list[Any]:
        """Call `work` on each needed group that has rows, and go on with the rounds; returns what the last one made."""
        works, parts, made = [work], [self.parts], self.refs
        for each in rounds:
            works.append(each.work)
            parts.append(_Parts(each.column, _edges(each.num_groups, self.num_bytes, len(self.refs))))
        tasks = [ended for ended, *_ in made]
        for of_round, grouped_by, following in zip(works, parts, [*parts[1:], None], strict=True):
            job = ray.put(partial(grouped_by.make, of_round, following))
            start = call if following is None else call.options(num_returns=1 + following.num_tasks)
            # Each task takes its part of what every task before it made.
            given = zip(*(of_task[1:] for of_task in made), strict=True)
            made = [start.remote(job, number, *of_all) for number, of_all in enumerate(given)]
            tasks += made if following is None else [ended for ended, *_ in made]
        return [result for results in _results(made, tasks) for result in results]


def assign_part(table: pa.Table, column: str, num_parts: int) -> pa.Table:
    """Add the column `part`, a number below `num_parts` that is the same for equal values of a column of integers."""
    return table.append_column("part", pa.array(hash_parts(np.asarray(table[column]), num_parts)))


def exchange(
    shards: Shards,
    assign: Change,
    num_bins: int,
    write: Callable[[int, pa.Table], FileEntry],
    rounds_before: Iterable[Round] = (),
    kept: float = 1.0,
) -> list[FileEntry]:
    """Group the rows by bin and write each bin as one file; returns the entries, sorted by name.

    `assign`, or the last of the rounds before, adds the column `bin`; rows of a bin below 0 are not written.
    `write(number, rows)` gets a whole bin, in any order.
    """

    def write_bin(rows: pa.Table) -> FileEntry:
        return write(int(rows["bin"][0].as_py()), rows)

    entries: list[FileEntry] = regroup(shards, assign, *rounds_before, Round("bin", num_bins, write_bin), kept=kept)
    return sorted(entries, key=lambda entry: entry.name)


@dataclass(frozen=True)
class _Parts:
    """The groups that a column numbers, in a part for each of the tasks that make them."""

    column: str
    edges: npt.NDArray[np.int64]
    """Task t makes the groups from edges[t] up to edges[t + 1]."""

    @property
    def num_tasks(self) -> int:
        return len(self.edges) - 1

    def cut(self, tables: list[pa.Table]) -> list[pa.Table | None]:
        """The rows for each task, sorted by group."""
        if not tables:
            return [None] * self.num_tasks
        table = _as_one(tables)
        numbers = _group_numbers(table, self.column, self.edges[-1])
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], self.edges)
        # Copies: a slice would be stored with all of its buffers.
        return [table.take(pa.array(order[start:end])) for start, end in pairwise(starts)]

    def make(
        self, work: Callable[[pa.Table], Any], following: "_Parts | None", part: int, *given: pa.Table | None
    ) -> list[Any]:
        """Make the groups of a task from its rows of all tasks before.

        Returns them, or None, which tells the driver that they are made, and the parts of them that follow.
        """
        tables = [table for table in given if table is not None]
        by_table = [np.asarray(table[self.column]) for table in tables]
        made = []
        for number in range(self.edges[part], self.edges[part + 1]):
            ends = [np.searchsorted(numbers, [number, number + 1]) for numbers in by_table]
            rows = [table.slice(start, end - start) for table, (start, end) in zip(tables, ends, strict=True)]
            if group := [table for table in rows if table.num_rows]:
                made.append(work(_as_one(group)))
        return made if following is None else [None, *following.cut(made)]


def _group_numbers(table: pa.Table, column: str, num_groups: int) -> npt.NDArray[np.int64]:
    """The group of each row; IntegrityError if there is a number that no group has."""
    numbers = np.asarray(table[column])
    if len(numbers) and not numbers.max() < num_groups:
        raise IntegrityError(f"the column {column} has {numbers.max()}, above its {num_groups} groups")
    return numbers


def _edges(num_groups: int, num_bytes: float, num_reading: int) -> npt.NDArray[np.int64]:
    """The first group of each task that groups rows of so many bytes on disk, and the end."""
    few_objects = min(_MAX_OBJECTS, num_bytes / _OBJECT_BYTES) / max(1, num_reading)
    num_tasks = max(1, min(_TASKS_PER_CPU * num_cpus(), few_objects), num_bytes / _GROUPED_BYTES)
    return np.linspace(0, num_groups, min(num_groups, int(num_tasks)) + 1).astype(np.int64)


def _grouped_for_tasks(shards: Shards, *, max_bytes: float = _READ_BYTES) -> list[list[FileEntry]]:
    """The shards of each task: as many tasks as keep the cluster busy, and none for less than it costs itself."""
    num_tasks = min(_TASKS_PER_CPU * num_cpus(), _MAX_TASKS, max(1, shards.num_bytes / _LEAST_TASK_BYTES))
    max_shards = math.ceil(len(shards.entries) / max(1, num_tasks))
    return grouped(shards.entries, max_shards=max(1, max_shards), max_bytes=min(max_bytes, _READ_BYTES))


def _of_groups(
    shards: Shards,
    work: Callable[[list[str], Callable[[str], pa.Table]], Any],
    *,
    groups: list[list[FileEntry]] | None = None,
    num_returns: int = 1,
) -> list[Any]:
    """Start tasks that call `work(names, read)` for the names of a few shards; returns their references."""
    read = shards.read
    job = ray.put(lambda names: work(names, read))
    start = call.options(num_returns=num_returns)
    groups = _grouped_for_tasks(shards) if groups is None else groups
    return [start.remote(job, [shard.name for shard in group]) for group in groups]


def _results(refs: list[Any], tasks: list[Any] | None = None) -> list[Any]:
    """What tasks return, in their order; `tasks` has a small result of each task that they depend on, and of theirs."""
    for _ in results_of(refs if tasks is None else tasks):
        pass
    with own_errors():
        return list(ray.get(refs))


def _as_one(tables: list[pa.Table]) -> pa.Table:
    """All rows in one chunk for each column, with 64-bit offsets where 32-bit ones might not do."""
    table = pa.concat_tables(tables, promote_options="permissive")
    if table.nbytes > _WIDE_BYTES:
        table = table.cast(pa.schema([field.with_type(_WIDE.get(field.type, field.type)) for field in table.schema]))
    return table.combine_chunks()


def _concatenated(schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)]).combine_chunks()
