"""A stage that sends shards of examples through a pool of Ray actors, which write a file for each, as scoring does.

The shard is the unit of work, commit and resume: a shard whose file exists is done. Scoring and generation are such
stages.
"""

import gc
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data

from davir_ray.config.scoring import ScoreConfig
from davir_ray.engine.blocks import NAMED, ShardBlocks, num_tokens, read_named, whole_shards
from davir_ray.engine.connect import own_errors, whole_block_context
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.progress import ProgressCounter, WorkDone, tracked
from davir_ray.engine.resources import actor_cpus, num_gpus_of, plan_pool, side_cpus
from davir_ray.engine.shards import grouped, read_columns, read_side_by_side
from davir_ray.errors import IntegrityError, StorageError
from davir_ray.run.commits import CommitNotes, CommittedShard, ShardFolder
from davir_ray.run.files import FileEntry, in_folder, total_rows
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.progress import Progress

log = logging.getLogger(__name__)

_GROUP_BYTES = 2**18
"""Maximum bytes on disk of several shards that are sent together: each group costs Ray Data as much time as a small
model takes for a few such shards."""

_GROUPS_PER_ACTOR = 16
"""Minimum number of groups for each actor, if the shards are enough: so all actors end at about the same time."""


class Model(Protocol):
    """The model in an actor, called with columns of examples; it returns columns of the stage."""

    @property
    def numerics(self) -> dict[str, Any]:
        """The arithmetic of the last call, such as types and versions, as JSON-ready values."""
        ...

    def __call__(self, examples: pa.Table) -> pa.Table:
        """Return one row for each example, in the same order."""
        ...


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
    ok_count: str
    """Name of the manifest's count of rows whose status is ok."""
    new_detail: str
    """Name of the manifest's detail that says how many shards this driver did."""
    turn_of: Mapping[str, int] = field(default_factory=dict)
    """Where the model changes between shards: those of a smaller number are sent first; those not named have 0."""
    score_columns: list[str] = field(default_factory=list)
    """Columns of the run's scores that are sent with them."""
    read: Callable[[str], pa.Table] | None = None
    """Reads what is sent of a shard, where that is not these columns of the files of its name."""
    count_tokens: Callable[[pa.Table], int] = num_tokens
    """Counts the tokens that the rows of a file took, for the progress."""

    def fill(self, load: Callable[[], Model], config: ScoreConfig) -> Manifest:
        """Process every shard that no earlier attempt did, with the model that each actor gets from `load`, and commit.

        Raises IntegrityError if rows were lost.
        """
        started = time.monotonic()
        folder = ShardFolder(place=self.run / self.folder, schema=self.schema, fingerprint=json.dumps(self.fingerprint))
        notes = CommitNotes(self.run / f"{self.folder}_commits", folder.fingerprint)
        committed = self._committed(folder, notes)
        done = {shard.entry.name for shard in committed}
        # Longest first, so that the pool does not end on one long shard.
        pending = sorted(
            (shard for shard in self.shards if shard.name not in done),
            key=lambda shard: (self.turn_of.get(shard.name, 0), -shard.bytes),
        )
        log.info("%s: %d shards to do, %d already done", self.stage, len(pending), len(committed))
        num_rows, rows_before = total_rows(self.shards), total_rows(shard.entry for shard in committed)
        start = Progress(
            stage=self.stage,
            unit="rows",
            done=rows_before,
            total=num_rows,
            rows=rows_before,
            rejects=self.examples.require("prepare").counts["rejected"],
            unscored=rows_before - sum(shard.statuses.get("ok", 0) for shard in committed),
        )
        with tracked(self.run, start) as counter:
            new = self._send(pending, load, config, counter, folder, notes) if pending else []
            totals = counter.totals()
        # A worker that outlives its node or its driver may have written a shard once more: that file is read.
        noted = {shard.entry.name: shard for shard in committed + new}
        shards = sorted(folder.committed(noted, self._rows), key=lambda shard: shard.entry.name)
        if foreign := [shard.entry.name for shard in shards if shard.fingerprint != folder.fingerprint]:
            raise IntegrityError(
                f"{folder.place / foreign[0]} was written with other settings meanwhile; delete it, find what else "
                "writes there, and give the same command again"
            )
        entries = [shard.entry for shard in shards]
        if total_rows(entries) != num_rows:
            raise IntegrityError(
                f"{num_rows} examples were prepared but {total_rows(entries)} rows of {self.folder} written"
            )
        statuses = Counter[str]()
        for shard in shards:
            statuses.update(shard.statuses)
        numerics = sorted({shard.numerics for shard in shards})
        details = {"numerics": [json.loads(text) for text in numerics], self.new_detail: len(new)}
        if totals is not None:
            details |= {"throughput": totals.throughput, "retries": totals.retries}
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            counts={"examples": num_rows, self.ok_count: statuses["ok"], **dict(sorted(statuses.items()))},
            files=in_folder(self.folder, entries),
            details=details,
            seconds=time.monotonic() - started,
        )
        manifest = self.run.commit(manifest)
        notes.remove()
        return manifest

    def _read(self, name: str) -> pa.Table:
        if self.read is not None:
            return self.read(name)
        examples = self.examples / "examples"
        if not self.score_columns:
            return read_columns(examples, self.columns, name)
        return read_side_by_side(examples, self.columns, self.run / "scores", self.score_columns, name)

    @property
    def _rows(self) -> dict[str, int]:
        """Number of rows of each shard, by name."""
        return {shard.name: shard.rows for shard in self.shards}

    def _committed(self, folder: ShardFolder, notes: CommitNotes) -> list[CommittedShard]:
        """The shards that earlier attempts have done, without damaged ones, which are done again.

        If they were done with other settings they are removed with --overwrite; else OutputError names what differs.
        """
        there = folder.committed(notes.read(), self._rows)
        now = json.loads(folder.fingerprint)
        fingerprints = {shard.fingerprint for shard in there}
        changed = [line for before in sorted(fingerprints) for line in differences(json.loads(before), now)]
        if not changed:
            return there
        if self.run.overwrite:
            self.run.clear(self.stage)
            return []
        raise self.run.other_attempt(self.stage, list(dict.fromkeys(changed)))

    def _send(
        self,
        pending: list[FileEntry],
        load: Callable[[], Model],
        config: ScoreConfig,
        counter: ProgressCounter,
        folder: ShardFolder,
        notes: CommitNotes,
    ) -> list[CommittedShard]:
        """Read each shard and send it whole to an actor, which commits it; returns the new shards."""
        num_cpus, num_gpus = actor_cpus(config.num_cpus), num_gpus_of(config)
        pool = plan_pool(config)
        max_shards = max(1, len(pending) // (_GROUPS_PER_ACTOR * pool.max_size))
        groups = grouped(pending, max_shards=max_shards, max_bytes=_GROUP_BYTES)
        source = ShardBlocks(groups, partial(read_named, self._read))
        pool = pool.at_most(len(groups))
        log.info("%s: %s of %g CPUs and %g GPUs", self.stage, pool, num_cpus, num_gpus)
        context = whole_block_context(config.no_progress_timeout_s)
        with own_errors("score.no_progress_timeout_s"), ray.data.DataContext.current(context):
            dataset = (
                ray.data.read_datasource(source, **source.read_options | {"num_cpus": side_cpus(num_cpus) / 2})
                # map_batches refuses whole blocks on GPUs (2.60); otherwise they are the same.
                .map_batches_internal(
                    ShardWorker,
                    fn_constructor_args=(replace(self, shards=[]), counter, folder, load),
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(
                        min_size=pool.min_size, max_size=pool.max_size, initial_size=pool.initial_size
                    ),
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                )
            )
            new: list[CommittedShard] = []
            try:
                for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    for text in batch["committed"].to_pylist():
                        new.append(CommittedShard.from_json(text, folder.fingerprint))
                        notes.add(new[-1])
            finally:
                try:
                    notes.write()
                except StorageError as error:  # a later driver reads these shards instead
                    log.warning("the last committed shards are not noted: %s", error)
        return new


class ShardWorker:
    """Actor: runs a model on shards and commits each as soon as it is done."""

    def __init__(
        self, stream: Stream, counter: ProgressCounter, folder: ShardFolder, load: Callable[[], Model]
    ) -> None:
        configure_worker_logging()
        self._stream, self._counter, self._folder = stream, counter, folder
        self._model = load()
        gc.freeze()  # or Python looks through all of torch's objects once more at its end, for a second
        log.info("%s: an actor is ready on node %s", stream.stage, ray.get_runtime_context().get_node_id()[:8])

    def __call__(self, block: pa.Table) -> pa.Table:
        """Process one whole shard, or several; returns a row for each, the CommittedShard as JSON."""
        shards = list(whole_shards(block))
        found = []
        for name, examples in shards:
            # An actor that died may have committed some shards of the group that it had.
            done = self._folder.read(name, examples.num_rows) if len(shards) > 1 else None
            if done is None or done.fingerprint != self._folder.fingerprint:  # of an actor of a driver before
                done = self._commit(name, examples)
            found.append(done)
        return pa.table({"committed": [shard.to_json() for shard in found]})

    def _commit(self, name: str, examples: pa.Table) -> CommittedShard:
        started, stream = time.monotonic(), self._stream
        self._counter.begin(name)
        table = self._model(examples.drop_columns(NAMED))
        shard = self._folder.commit(name, table, json.dumps(self._model.numerics))
        log.debug("%s: %s, %d rows, %.1f s", stream.stage, name, table.num_rows, time.monotonic() - started)
        unscored = table.num_rows - shard.statuses.get("ok", 0)
        tokens = stream.count_tokens(table)
        self._counter.report(name, WorkDone(table.num_rows, rows=table.num_rows, tokens=tokens, unscored=unscored))
        return shard
