"""Shards as blocks: a Ray Data source in which one read task is one shard, and a sink in which one block is one file.

The code of reading and writing tasks is here, apart from the models, so that a process that only moves columns need not
import torch, which takes seconds.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import DataContext
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask, WriteResult

from davir_ray.engine.progress import WorkDone
from davir_ray.errors import IntegrityError
from davir_ray.run.files import (
    FINGERPRINT_KEY,
    FileEntry,
    committed_parquet,
    digest,
    read_parquet,
    total_rows,
    write_parquet,
)
from davir_ray.run.location import Location, each
from davir_ray.text import one_line

log = logging.getLogger(__name__)

_READ_CPUS = 0.5
"""Differs from an actor's CPUs on purpose: with equal ones Ray fuses reading into the actor, and nothing overlaps."""

_TASKS_PER_CPU = 4
_LEAST_TASK_BYTES = 2 * 2**20
"""Bytes on disk that take about as long to read as a task takes to start, where its worker runs."""

_TASK_BYTES = 32 * 2**20
"""Maximum bytes on disk that a task with several shards reads; they take a few times as many in memory."""

NAMED = ["shard", "shard_rows"]
"""Constant columns that tell the sink which shard a block is, and how many rows it must have."""

_NUMERICS_KEY = b"davir_numerics"
"""Key in the footer of a file of scores: the arithmetic that made it, as JSON."""

_SEAL_KEY = b"davir_seal"


class Shards(Datasource):  # type: ignore[misc]
    """Named shards of a run; `read(name)` gives the table of one. One read task makes one block.

    A block is one shard, unless tasks may read several.
    """

    def __init__(
        self, shards: list[FileEntry], read: Callable[[str], pa.Table], *, max_shards_per_task: int = 1
    ) -> None:
        super().__init__()
        self._shards = shards
        self._read = read
        self._tasks = _grouped(shards, max_shards_per_task)

    def then(self, change: Callable[[str, pa.Table], pa.Table], num_cpus: float) -> "Shards":
        """The shards, each changed by `change(name, table)` in the task that reads it, several to a task and block.

        There are only as many tasks as keep the cluster busy, and none for less than it costs itself.
        """
        read = self._read
        num_tasks = min(_TASKS_PER_CPU * num_cpus, max(1, self.estimate_inmemory_data_size() / _LEAST_TASK_BYTES))
        max_shards = max(1, int(len(self._shards) / num_tasks))
        return Shards(self._shards, lambda name: change(name, read(name)), max_shards_per_task=max_shards)

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


def _grouped(shards: list[FileEntry], max_shards: int) -> list[list[FileEntry]]:
    """Neighbouring shards in groups of at most `max_shards` and, where there are several, _TASK_BYTES."""
    groups: list[list[FileEntry]] = []
    size = 0
    for shard in shards:
        if not groups or len(groups[-1]) == max_shards or size + shard.bytes > _TASK_BYTES:
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


@dataclass(frozen=True, kw_only=True)
class CommittedShard:
    """A shard that a write task committed; the last two are JSON from the file's footer."""

    entry: FileEntry
    statuses: dict[str, int]
    numerics: str
    fingerprint: str


class ShardSink(Datasink[list[CommittedShard]]):  # type: ignore[misc]
    """Writes each block, which must be a whole shard, into a folder under the shard's name, and reports its counts."""

    def __init__(
        self,
        folder: Location,
        schema: pa.Schema,
        fingerprint: str,
        report: Callable[[str, WorkDone], None],
        count_tokens: Callable[[pa.Table], int],
    ) -> None:
        self.shards: list[CommittedShard] = []
        self._folder = folder
        self._schema = schema
        self._report = report
        self._count_tokens = count_tokens
        self._fingerprint = fingerprint

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[CommittedShard]:
        """Commit each block under its shard's name; raises IntegrityError if a block is not the whole shard."""
        return [self._write_shard(BlockAccessor.for_block(block).to_arrow()) for block in blocks]

    def _write_shard(self, block: pa.Table) -> CommittedShard:
        names, rows = set(block["shard"].to_pylist()), set(block["shard_rows"].to_pylist())
        if len(names) != 1 or rows != {block.num_rows}:
            raise IntegrityError(
                f"a block of {block.num_rows} rows is not one whole shard ({sorted(names)}, {rows} rows)"
            )
        table = block.select(self._schema.names).cast(self._schema)
        numerics = str(block["numerics"][0])
        footer = _sealed({FINGERPRINT_KEY: self._fingerprint.encode(), _NUMERICS_KEY: numerics.encode()})
        entry = write_parquet(self._folder / names.pop(), table, footer)
        statuses = _count_statuses(table)
        unscored = table.num_rows - statuses.get("ok", 0)
        self._report(entry.name, WorkDone(table.num_rows, table.num_rows, self._count_tokens(table), unscored=unscored))
        return CommittedShard(entry=entry, statuses=statuses, numerics=numerics, fingerprint=self._fingerprint)

    def on_write_complete(self, write_result: WriteResult[list[CommittedShard]]) -> None:
        """Keep what the write tasks committed."""
        self.shards = [shard for shards in write_result.write_returns for shard in shards]


def committed_shard(place: Location, schema: pa.Schema, num_rows: int | None) -> CommittedShard | None:
    """The shard committed in a file; None if the file is damaged or lacks rows, so that it must be done again."""
    try:
        entry, table = committed_parquet(place)
        metadata = table.schema.metadata or {}
        if not table.schema.equals(schema) or num_rows not in (None, table.num_rows) or _sealed(metadata) != metadata:
            raise IntegrityError(f"{table.num_rows} rows")
        return CommittedShard(
            entry=entry,
            statuses=_count_statuses(table),
            numerics=metadata[_NUMERICS_KEY].decode(),
            fingerprint=metadata[FINGERPRINT_KEY].decode(),
        )
    except (IntegrityError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s) and is done again", place, one_line(error))
        return None


def _sealed(footer: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Add a digest of a footer's entries to it, because page checksums do not cover the footer."""
    texts = [footer[key].decode(errors="replace") for key in (FINGERPRINT_KEY, _NUMERICS_KEY)]
    return {**footer, _SEAL_KEY: digest(texts).encode()}


def num_tokens(table: pa.Table) -> int:
    """Tokens of the rows of examples or scores, prompts included."""
    return int(sum(pc.sum(table[name]).as_py() or 0 for name in ("num_prompt_tokens", "num_response_tokens")))


def _count_statuses(table: pa.Table) -> dict[str, int]:
    """The number of rows of each status."""
    return dict(Counter(table["status"].to_pylist()))
