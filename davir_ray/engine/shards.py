"""Shards as blocks: a Ray Data source in which one read task is one shard, or a few.

The code of reading tasks is here, apart from the models, so that a process that only moves columns need not import
torch, which takes seconds.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from davir_ray.errors import IntegrityError
from davir_ray.run.files import FileEntry, read_parquet, total_rows
from davir_ray.run.location import Location, each

_READ_CPUS = 0.5
"""Differs from an actor's CPUs on purpose: with equal ones Ray fuses reading into the actor, and nothing overlaps."""

_TASKS_PER_CPU = 4
_LEAST_TASK_BYTES = 2 * 2**20
"""Bytes on disk that take about as long to read as a task takes to start, where its worker runs."""

_TASK_BYTES = 32 * 2**20
"""Maximum bytes on disk that a task with several shards reads; they take a few times as many in memory."""

NAMED = ["shard", "shard_rows"]
"""Columns that are constant in a shard: its name, and how many rows it must have."""


class Shards(Datasource):  # type: ignore[misc]
    """Named shards of a run; `read(name)` gives the table of one. One read task makes one block.

    A block is one shard, unless tasks may read several.
    """

    def __init__(
        self,
        shards: list[FileEntry],
        read: Callable[[str], pa.Table],
        *,
        max_shards_per_task: int = 1,
        max_bytes_per_task: int = _TASK_BYTES,
    ) -> None:
        super().__init__()
        self._shards = shards
        self._read = read
        self._tasks = _grouped(shards, max_shards_per_task, max_bytes_per_task)

    def then(self, change: Callable[[str, pa.Table], pa.Table], num_cpus: float) -> "Shards":
        """The shards, each changed by `change(name, table)` in the task that reads it, several to a task and block.

        There are only as many tasks as keep the cluster busy, and none for less than it costs itself.
        """
        read = self._read
        num_tasks = min(_TASKS_PER_CPU * num_cpus, max(1, self.estimate_inmemory_data_size() / _LEAST_TASK_BYTES))
        max_shards = max(1, int(len(self._shards) / num_tasks))
        return Shards(self._shards, lambda name: change(name, read(name)), max_shards_per_task=max_shards)

    @property
    def num_tasks(self) -> int:
        """The number of tasks that read them."""
        return len(self._tasks)

    @property
    def fit_one_task(self) -> bool:
        """Whether one task may read all of them, as far as the size on disk tells."""
        return self.estimate_inmemory_data_size() <= _TASK_BYTES

    def as_one(self, *changes: Callable[[pa.Table], pa.Table]) -> "Shards":
        """One shard of all rows, changed by one function after another in the one task that reads it."""
        shards, read = self._shards, self._read
        whole = FileEntry(name="all", rows=total_rows(shards), bytes=self.estimate_inmemory_data_size(), sha256="")

        def read_whole(_: str) -> pa.Table:
            table = pa.concat_tables(each(lambda shard: read(shard.name), shards))
            for change in changes:
                table = change(table)
            return table

        return Shards([whole], read_whole)

    def estimate_inmemory_data_size(self) -> int:
        """The bytes on disk, a lower bound of those in memory."""
        return sum(shard.bytes for shard in self._shards)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """The tasks, independent of the requested parallelism."""
        return [
            ReadTask(
                partial(_read_all, self._read, [shard.name for shard in task]),
                BlockMetadata(
                    num_rows=sum(shard.rows for shard in task),
                    size_bytes=sum(shard.bytes for shard in task),
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for task in self._tasks
        ]

    @property
    def read_options(self) -> dict[str, float | int]:
        """Keywords for ray.data.read_datasource."""
        return {"num_cpus": _READ_CPUS, "override_num_blocks": len(self._tasks)}


def _grouped(shards: list[FileEntry], max_shards: int, max_bytes: int) -> list[list[FileEntry]]:
    """Neighbouring shards in groups of at most `max_shards` and, where there are several, `max_bytes`."""
    groups: list[list[FileEntry]] = []
    size = 0
    for shard in shards:
        if not groups or len(groups[-1]) == max_shards or size + shard.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.bytes
    return groups


def _read_all(read: Callable[[str], pa.Table], names: list[str]) -> Iterable[pa.Table]:
    return [pa.concat_tables([read(name) for name in names])]


def read_columns(folder: Location, columns: list[str] | None, name: str) -> pa.Table:
    """The columns of one shard; None: all of them."""
    return read_parquet(folder / name, columns)


def read_named(folder: Location, columns: list[str], name: str) -> pa.Table:
    """The columns of one shard, and the NAMED ones."""
    table = read_columns(folder, columns, name)
    for column, value in zip(NAMED, (name, table.num_rows), strict=True):
        table = table.append_column(column, pa.repeat(value, table.num_rows))
    return table


def whole_shards(block: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The shards that a block of named ones holds, by name; raises IntegrityError if one is not whole."""
    names = block["shard"].combine_chunks().dictionary_encode()
    starts = [0, *(np.flatnonzero(np.diff(np.asarray(names.indices))) + 1), block.num_rows]
    for start, end in pairwise(starts):
        shard = block.slice(start, end - start)
        rows = set(shard["shard_rows"].to_pylist())
        if rows != {shard.num_rows}:
            raise IntegrityError(f"of a shard of {rows or 'no'} rows {shard.num_rows} arrived in one block")
        yield names[start].as_py(), shard


def num_tokens(table: pa.Table) -> int:
    """Tokens of the rows of examples or scores, prompts included."""
    return int(sum(pc.sum(table[name]).as_py() or 0 for name in ("num_prompt_tokens", "num_response_tokens")))
