"""Shards as blocks of Ray Data: a source whose read tasks read one shard each, or a few small ones.

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
from davir_ray.run.files import FileEntry

_READ_CPUS = 0.5
"""Differs from an actor's CPUs on purpose: with equal ones Ray fuses reading into the actor, and nothing overlaps."""

NAMED = ["shard", "shard_rows"]
"""Columns that are constant in a shard: its name, and how many rows it must have."""


class ShardBlocks(Datasource):  # type: ignore[misc]
    """Groups of shards; `read(name)` gives the table of one. One read task makes one block, of a whole group."""

    def __init__(self, groups: list[list[FileEntry]], read: Callable[[str], pa.Table]) -> None:
        super().__init__()
        self._groups = groups
        self._read = read

    def estimate_inmemory_data_size(self) -> int:
        """The bytes on disk, a lower bound of those in memory."""
        return sum(shard.bytes for group in self._groups for shard in group)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """The tasks, independent of the requested parallelism."""
        return [
            ReadTask(
                partial(_read_group, self._read, [shard.name for shard in group]),
                BlockMetadata(
                    num_rows=sum(shard.rows for shard in group),
                    size_bytes=sum(shard.bytes for shard in group),
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for group in self._groups
        ]

    @property
    def read_options(self) -> dict[str, float | int]:
        """Keywords for ray.data.read_datasource."""
        return {"num_cpus": _READ_CPUS, "override_num_blocks": len(self._groups)}


def _read_group(read: Callable[[str], pa.Table], names: list[str]) -> Iterable[pa.Table]:
    return [pa.concat_tables([read(name) for name in names])]


def read_named(read: Callable[[str], pa.Table], name: str) -> pa.Table:
    """One shard as it is read, and the NAMED columns."""
    table = read(name)
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
