"""Shards as blocks: a Ray Data source in which one read task is one shard, whole."""

from collections.abc import Callable, Iterable
from functools import partial

import pyarrow as pa
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from davir_ray.storage import FileEntry

_READ_CPUS = 0.5
"""Differs from an actor's CPUs on purpose: with equal ones Ray fuses reading into the actor, and nothing overlaps."""


class Shards(Datasource):  # type: ignore[misc]
    """Named shards of a run; `read(name)` gives the table of one."""

    def __init__(self, shards: list[FileEntry], read: Callable[[str], pa.Table]) -> None:
        super().__init__()
        self._shards = shards
        self._read = read

    def estimate_inmemory_data_size(self) -> int:
        """Bytes on disk, as a lower bound."""
        return sum(shard.bytes for shard in self._shards)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task for each shard, whatever parallelism is asked for."""
        return [
            ReadTask(
                partial(_read_one, self._read, shard.name),
                BlockMetadata(num_rows=shard.rows, size_bytes=shard.bytes, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for shard in self._shards
        ]

    @property
    def read_options(self) -> dict[str, float | int]:
        """Keywords for ray.data.read_datasource."""
        return {"num_cpus": _READ_CPUS, "override_num_blocks": len(self._shards)}


def _read_one(read: Callable[[str], pa.Table], name: str) -> Iterable[pa.Table]:
    return [read(name)]
