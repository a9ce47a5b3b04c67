"""prepare: sources → examples/ and rejects/. All formats, all bad input and all tokenisation meet this one door."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray.data

from davir_ray.config import PrepareConfig, Source
from davir_ray.data.examples import COUNTED, ShardWriter, TaskReport, example_row
from davir_ray.data.render import ChatTemplate, Rendered, RowError, render
from davir_ray.data.sources import Record, Reject, Slice, SourceFile, list_files, plan_tasks, read_records
from davir_ray.data.tokens import Encoder
from davir_ray.errors import DataError, IntegrityError
from davir_ray.models.checkpoint import Checkpoint, tokenizer_digest
from davir_ray.schema import RejectReason
from davir_ray.stages.cluster import configure_worker_logging, own_errors, pool_size
from davir_ray.stages.resume import clear, completed
from davir_ray.storage import Location, Manifest, digest, file_digest

log = logging.getLogger(__name__)

_TASK_BYTES = 32 * 2**20
_BATCH_ROWS = 512
_MOST_SHARDS = 20_000
_BYTES_PER_ROW = 256
"""A low guess at a source row's bytes on disk, to keep a large corpus below _MOST_SHARDS."""


@dataclass(frozen=True)
class Preparation:
    """Everything that the content of examples/ depends on, beside the sources."""

    base: Checkpoint
    config: PrepareConfig
    chat_template: str | None = None
    """Text of a chat template that replaces the tokenizer's."""
    keep_record: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Task:
    """What one call of a worker prepares: some slices of one source, into shards named by the task."""

    number: int
    source: Source
    slices: list[Slice]


def prepare(
    run: Location, sources: list[Source], preparation: Preparation, *, max_bad_fraction: float, overwrite: bool = False
) -> Manifest:
    """Turn the sources into tokenised shards and named rejects."""
    started = time.monotonic()
    files = {source.name: list_files(source) for source in sources}
    fingerprint = _fingerprint(sources, files, preparation)
    if done := completed(run, "prepare", fingerprint, overwrite=overwrite):
        return done
    clear(run, "prepare")
    tasks = _plan(sources, files, preparation)
    log.info("prepare: %d files in %d tasks", sum(map(len, files.values())), len(tasks))
    report = _run(run, tasks, preparation)
    manifest = _manifest(report, fingerprint, time.monotonic() - started)
    _check(manifest, max_bad_fraction)
    manifest.write(run)
    return manifest


def scoring_spec(preparation: Preparation) -> dict[str, Any]:
    """How text becomes scored tokens: travels with a reference and is compared before it is used."""
    tokenizer = preparation.base.tokenizer()
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "eos_scored": True,
        "max_tokens": preparation.config.max_tokens,
        "chat_template": digest(preparation.chat_template or tokenizer.chat_template or ""),
    }


def _fingerprint(sources: list[Source], files: dict[str, list[SourceFile]], preparation: Preparation) -> dict[str, Any]:
    return {
        "sources": {
            source.name: {
                "format": source.format,
                "columns": [source.prompt_column, source.response_column, source.messages_column],
                "files": {f.relative_path: file_digest(Location.of(f.uri)) for f in files[source.name]},
            }
            for source in sources
        },
        "order": [source.name for source in sources],
        "encoding": scoring_spec(preparation),
        "shard_rows": preparation.config.shard_rows,
        "keep_record": preparation.keep_record,
        "limit": preparation.limit,
    }


def _plan(sources: list[Source], files: dict[str, list[SourceFile]], preparation: Preparation) -> list[Task]:
    """Tasks in source order; with a limit, one for each source, which stops after that many records."""
    tasks: list[Task] = []
    for source in sources:
        target = _TASK_BYTES if preparation.limit is None else 2**62
        planned = plan_tasks(files[source.name], target)
        tasks += [Task(len(tasks) + i, source, slices) for i, slices in enumerate(planned)]
    return tasks


def _shard_rows(config: PrepareConfig, tasks: list[Task]) -> int:
    num_bytes = sum(file.num_bytes for file in {s.file for task in tasks for s in task.slices})
    return max(config.shard_rows, num_bytes // _BYTES_PER_ROW // _MOST_SHARDS)


def _run(run: Location, tasks: list[Task], preparation: Preparation) -> TaskReport:
    dataset = ray.data.range(len(tasks), override_num_blocks=len(tasks)).flat_map(
        Preparer,
        fn_constructor_kwargs={
            "run": run,
            "tasks": tasks,
            "preparation": preparation,
            "shard_rows": _shard_rows(preparation.config, tasks),
        },
        compute=ray.data.ActorPoolStrategy(size=pool_size(None, 1, 0, len(tasks))),
    )
    with own_errors():
        rows = sorted(dataset.iter_rows(), key=lambda row: row["id"])
    total = TaskReport()
    for row in rows:
        total += TaskReport.from_json(row["report"])
    return total


def _manifest(report: TaskReport, fingerprint: dict[str, Any], seconds: float) -> Manifest:
    prepared = sum(entry.rows for entry in report.files if entry.name.startswith("examples/"))
    counts = {"read": report.num_read, "prepared": prepared, "rejected": report.reasons.total()}
    counts |= {name: report.sums[name] for name in COUNTED} | dict(sorted(report.reasons.items()))
    details = {"first_reject": report.first_reject}
    files = sorted(report.files, key=lambda entry: entry.name)
    return Manifest("prepare", fingerprint, counts, files, details, seconds=seconds)


def _check(manifest: Manifest, max_bad_fraction: float) -> None:
    counts = manifest.counts
    reasons = {reason: counts[reason] for reason in RejectReason if reason in counts}
    if counts["read"] != counts["prepared"] + counts["rejected"]:
        raise IntegrityError(f"rows were lost in prepare: {counts}")
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    first = f"; the first: {manifest.details['first_reject']}" if reasons else ""
    if counts["prepared"] == 0:
        raise DataError(f"no example could be prepared from {counts['read']} records ({told or 'no records'}){first}")
    if counts["rejected"] > max_bad_fraction * counts["read"]:
        raise DataError(
            f"{counts['rejected']} of {counts['read']} rows are bad ({told}), more than --max_bad_fraction "
            f"{max_bad_fraction:g}{first}. Mend the data (rejects/ names every row) or raise the fraction"
        )
    log.info(
        "prepare: %d read, %d prepared, %d rejected %s", counts["read"], counts["prepared"], counts["rejected"], told
    )


class Preparer:
    """Worker: reads, renders, encodes and writes the shards of one task at a time."""

    def __init__(self, run: Location, tasks: list[Task], preparation: Preparation, shard_rows: int) -> None:
        configure_worker_logging()
        self._run = run
        self._tasks = tasks
        self._preparation = preparation
        self._shard_rows = shard_rows
        tokenizer = preparation.base.tokenizer()
        self._encoder = Encoder(tokenizer, preparation.config.max_tokens)
        uses_chat = any(task.source.format == "messages" for task in tasks)
        self._chat = ChatTemplate.from_tokenizer(tokenizer, preparation.chat_template) if uses_chat else None

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Prepare the task numbered row['id']; returns one row, its report as JSON."""
        task = self._tasks[row["id"]]
        writer = ShardWriter(self._run, task.number, task.source.name, self._shard_rows)
        batch: list[tuple[Record, Rendered]] = []
        for item in _records(task, self._preparation.limit):
            writer.report.num_read += 1
            if isinstance(item, Reject):
                writer.reject(item)
                continue
            try:
                batch.append((item, render(item.fields, task.source, self._chat)))
            except RowError as error:
                writer.reject(Reject(item.source_file, item.source_row, error.reason, error.detail))
            if len(batch) == _BATCH_ROWS:
                self._encode(batch, task.source, writer)
                batch = []
        self._encode(batch, task.source, writer)
        return [{"id": row["id"], "report": writer.finish().to_json()}]

    def _encode(self, batch: list[tuple[Record, Rendered]], source: Source, writer: ShardWriter) -> None:
        encoded = self._encoder.encode([rendered for _, rendered in batch], templated=source.format == "messages")
        for (record, rendered), result in zip(batch, encoded, strict=True):
            if isinstance(result, RowError):
                writer.reject(Reject(record.source_file, record.source_row, result.reason, result.detail))
            else:
                writer.add(example_row(source.name, record, rendered, result, self._preparation.keep_record))


def _records(task: Task, limit: int | None) -> Iterator[Record | Reject]:
    """What a task reads, in order, cut at the limit."""
    return islice((item for part in task.slices for item in read_records(part)), limit)
