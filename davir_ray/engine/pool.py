"""A stage that sends shards of examples through a pool of Ray actors and writes a file for each, as scoring does.

The shard is the unit of work, commit and resume: a shard whose file exists is done. Scoring and generation are such
stages.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import ray
import ray.data

from davir_ray.config.scoring import ScoreConfig
from davir_ray.engine.connect import (
    actor_cpus,
    has_gpu,
    own_errors,
    pool_size,
    room_for,
    side_cpus,
    whole_block_context,
)
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.progress import ProgressCounter, Totals, tracked
from davir_ray.engine.shards import (
    NAMED,
    NUMERICS_KEY,
    CommittedShard,
    Shards,
    ShardSink,
    count_statuses,
    num_tokens,
    read_named,
    sealed,
)
from davir_ray.errors import IntegrityError
from davir_ray.run.files import FINGERPRINT_KEY, FileEntry, committed_parquet, in_folder, total_rows
from davir_ray.run.folder import Run
from davir_ray.run.location import Location, each
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.progress import Progress
from davir_ray.text import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stage that makes one file of each shard, with the same name and one row for each example."""

    stage: str
    run: Run
    folder: str
    """Folder of the run that the files are written to."""
    schema: pa.Schema
    """Schema of the files; one of the columns is `status`."""
    fingerprint: dict[str, Any]
    """What the content depends on; it is in the footer of every file."""
    examples: Run
    """The run whose examples are read; it may be another one than `run`."""
    shards: list[FileEntry]
    """The shards of examples to process."""
    columns: list[str]
    """Columns of the examples that are sent to the workers."""
    count_tokens: Callable[[pa.Table], int] = num_tokens
    """Counts the tokens that the rows of a file took, for the progress."""

    def fill(self, worker: type, arguments: dict[str, Any], config: ScoreConfig) -> "Filled":
        """Process every shard that no earlier attempt did; `arguments` go to the constructor of `worker`."""
        committed = self._committed()
        done = {shard.entry.name for shard in committed}
        # Longest first, so that the pool does not end on one long shard.
        pending = sorted((shard for shard in self.shards if shard.name not in done), key=lambda shard: -shard.bytes)
        log.info("%s: %d shards to do, %d already done", self.stage, len(pending), len(committed))
        with tracked(self.run, self._progress(committed)) as counter:
            new = self._send(pending, worker, arguments, config, counter) if pending else []
            totals = counter.totals()
        return Filled(sorted(committed + new, key=lambda shard: shard.entry.name), len(new), totals)

    def _committed(self) -> list[CommittedShard]:
        """The shards that earlier attempts have done, without damaged ones, which are done again.

        If they were done with other settings they are removed with --overwrite; else OutputError names what differs.
        """
        folder = self.run / self.folder
        rows = {shard.name: shard.rows for shard in self.shards}
        found = each(lambda name: describe(folder / name, self.schema, rows.get(name)), folder.names(".parquet"))
        there = [shard for shard in found if shard is not None]
        now = json.loads(json.dumps(self.fingerprint))
        changed = [line for shard in there for line in differences(shard.fingerprint, now)]
        if not changed:
            return [shard.committed for shard in there]
        if self.run.overwrite:
            self.run.clear(self.stage)
            return []
        raise self.run.other_attempt(self.stage, list(dict.fromkeys(changed)))

    def _progress(self, committed: list[CommittedShard]) -> Progress:
        """The progress at the start: what earlier attempts committed."""
        rows = total_rows([shard.entry for shard in committed])
        return Progress(
            stage=self.stage,
            unit="rows",
            done=rows,
            total=total_rows(self.shards),
            rows=rows,
            rejects=self.examples.require("prepare").counts["rejected"],
            unscored=rows - sum(shard.statuses.get("ok", 0) for shard in committed),
        )

    def _send(
        self,
        pending: list[FileEntry],
        worker: type,
        arguments: dict[str, Any],
        config: ScoreConfig,
        counter: ProgressCounter,
    ) -> list[CommittedShard]:
        """Read each shard, send it whole to an actor, and write its file; returns the new shards."""
        num_cpus, num_gpus = actor_cpus(config.num_cpus), num_gpus_of(config)
        pool = plan_pool(config).at_most(len(pending))
        log.info("%s: %s of %g CPUs and %g GPUs", self.stage, pool, num_cpus, num_gpus)
        source = Shards(pending, partial(read_named, self.examples / "examples", self.columns))
        fingerprint = json.dumps(self.fingerprint)
        sink = ShardSink(self.run / self.folder, self.schema, fingerprint, counter.report, self.count_tokens)
        context = whole_block_context(config.no_progress_timeout_s)
        with own_errors("score.no_progress_timeout_s"), ray.data.DataContext.current(context):
            (
                ray.data.read_datasource(source, **source.read_options | {"num_cpus": side_cpus(num_cpus) / 2})
                # map_batches refuses whole blocks on GPUs (2.60); otherwise they are the same.
                .map_batches_internal(
                    worker,
                    fn_constructor_kwargs=arguments | {"counter": counter},
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(
                        min_size=pool.min_size, max_size=pool.max_size, initial_size=pool.initial_size
                    ),
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                )
                .write_datasink(sink, ray_remote_args={"num_cpus": side_cpus(num_cpus)})
            )
        return sink.shards

    def manifest(self, filled: "Filled", done: str, details: dict[str, Any]) -> Manifest:
        """The manifest of the stage, with `done` as the name of the count of ok rows.

        Raises IntegrityError if rows were lost.
        """
        num_rows = total_rows(self.shards)
        statuses = Counter[str]()
        for shard in filled.shards:
            statuses.update(shard.statuses)
        entries = [shard.entry for shard in filled.shards]
        if total_rows(entries) != num_rows:
            raise IntegrityError(
                f"{num_rows} examples were prepared but {total_rows(entries)} rows of {self.folder} written"
            )
        numerics = sorted({shard.numerics for shard in filled.shards})
        counts = {"examples": num_rows, done: statuses["ok"], **dict(sorted(statuses.items()))}
        details = {"numerics": [json.loads(text) for text in numerics]} | details
        if filled.totals is not None:
            details |= {"throughput": filled.totals.throughput, "retries": filled.totals.retries}
        return Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            counts=counts,
            files=in_folder(self.folder, entries),
            details=details,
        )


class Filled(NamedTuple):
    """The result of a stage: its committed shards, sorted by name."""

    shards: list[CommittedShard]
    num_new: int
    """Shards done by this driver."""
    totals: Totals | None


class Described(NamedTuple):
    """A committed shard, and the fingerprint it was made with."""

    committed: CommittedShard
    fingerprint: dict[str, Any]


def describe(place: Location, schema: pa.Schema, num_rows: int | None) -> Described | None:
    """The shard committed in a file; None if the file is damaged or lacks rows, so that it must be done again."""
    try:
        entry, table = committed_parquet(place)
        metadata = table.schema.metadata or {}
        fingerprint = json.loads(metadata[FINGERPRINT_KEY])
        numerics = json.dumps(json.loads(metadata[NUMERICS_KEY]))
        whole = table.schema.equals(schema) and num_rows in (None, table.num_rows) and sealed(metadata) == metadata
    except (IntegrityError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s) and is done again", place, one_line(error))
        return None
    if not whole:
        log.warning("%s is damaged (%d rows) and is done again", place, table.num_rows)
        return None
    return Described(CommittedShard(entry, count_statuses(table), numerics), fingerprint)


class Model(Protocol):
    """The model in an actor, called with columns of examples; it returns columns of the stage."""

    numerics: dict[str, Any]
    """The arithmetic used, such as types and versions, as JSON-ready values."""

    def __call__(self, examples: pa.Table) -> pa.Table:
        """Return one row for each example, in the same order."""
        ...


class ShardWorker:
    """Actor: runs a model on blocks, each of which is a whole shard."""

    def __init__(self, stage: str, counter: ProgressCounter, columns: list[str], load: Callable[[], Model]) -> None:
        configure_worker_logging()
        self._stage, self._counter, self._columns = stage, counter, columns
        self._model = load()
        self._numerics = json.dumps(self._model.numerics)
        log.info("%s: an actor is ready on node %s", stage, ray.get_runtime_context().get_node_id()[:8])

    def __call__(self, block: pa.Table) -> pa.Table:
        """Columns of examples in; columns of the stage out, with the shard's name and the numerics."""
        started, shard = time.monotonic(), str(block["shard"][0])
        self._counter.begin(shard)
        done = self._model(block.select(self._columns))
        log.debug("%s: %s, %d rows, %.1f s", self._stage, shard, block.num_rows, time.monotonic() - started)
        for name in NAMED:
            done = done.append_column(name, block[name])
        return done.append_column("numerics", pa.repeat(self._numerics, done.num_rows))


class Pool(NamedTuple):
    """The number of actors that work."""

    min_size: int
    max_size: int
    initial_size: int

    def at_most(self, num_shards: int) -> "Pool":
        """The pool with no more actors than there are shards."""
        return Pool(*(min(size, num_shards) for size in self))

    def __str__(self) -> str:
        growth = f" ({self.min_size} to {self.max_size})" if self.min_size < self.max_size else ""
        return f"{self.initial_size} actors{growth}"


def plan_pool(config: ScoreConfig) -> Pool:
    """The pool that the settings give on this cluster; it starts at full size, because loading models takes long.

    Raises ClusterError if it does not fit; a pool that grows may wait for nodes that have not joined yet.
    """
    num_cpus, num_gpus = actor_cpus(config.num_cpus), num_gpus_of(config)
    if config.autoscale is None:
        size = pool_size(config.num_actors, num_cpus, num_gpus)
        return Pool(size, size, size)
    min_size, max_size = config.autoscale
    room = room_for(num_cpus, num_gpus)
    # Without room yet, pending actors make the autoscaler add nodes.
    initial_size = min(max_size, room) if room > 0 else min_size
    return Pool(min(min_size, initial_size), max_size, initial_size)


def num_gpus_of(config: ScoreConfig) -> float:
    """GPUs of one actor."""
    return (1.0 if has_gpu() else 0.0) if config.num_gpus is None else config.num_gpus
