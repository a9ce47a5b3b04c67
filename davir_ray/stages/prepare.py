"""prepare: sources → examples/ and rejects/. All formats, all bad input and all tokenisation meet this one door."""

import logging
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.data

from davir_ray.config import PrepareConfig, Source
from davir_ray.data.examples import COUNTED, ExampleReader, ShardWriter, TaskReport
from davir_ray.data.render import ChatTemplate, rendering
from davir_ray.data.sources import Reject, Slice, SourceFile, list_files, plan_tasks
from davir_ray.data.tokens import Encoder
from davir_ray.errors import DataError, IntegrityError
from davir_ray.models.checkpoint import Checkpoint, tokenizer_digest
from davir_ray.schema import RejectReason
from davir_ray.stages.cluster import configure_worker_logging, own_errors, pool_size
from davir_ray.stages.resume import FOLDERS, clear, completed
from davir_ray.storage import Location, Manifest, digest, file_digest

log = logging.getLogger(__name__)

_TASK_BYTES = 32 * 2**20
PREPARE_VERSION = 1
"""Raised when a change may make other examples of the same records; part of the stage's fingerprint."""

_NO_BOUND = 2**62
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
    _check_outside(run, files)
    clear(run, "prepare")
    tasks = _plan(sources, files, preparation)
    log.info("prepare: %d files in %d tasks", sum(map(len, files.values())), len(tasks))
    report = _run(run, tasks, preparation)
    manifest = _manifest(report, fingerprint, time.monotonic() - started)
    _check_books(manifest, max_bad_fraction)
    manifest.write(run)
    return manifest


def _check_outside(run: Location, files: dict[str, list[SourceFile]]) -> None:
    """Refuse sources inside the run's own folders, which are about to be cleared."""
    own = tuple(f"{(run / folder).path}/" for folders in FOLDERS.values() for folder in folders)
    for file in (file for source in files.values() for file in source):
        if Location.of(file.uri).path.startswith(own):
            raise DataError(f"{file.uri} lies in the output {run}, which this run writes; choose another --output")


def scoring_spec(preparation: Preparation, sources: list[Source]) -> dict[str, Any]:
    """How text becomes scored tokens: travels with a reference and is compared before it is used."""
    uses_chat = any(source.format == "messages" for source in sources)
    tokenizer = preparation.base.tokenizer()
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "eos_scored": True,
        "max_tokens": preparation.config.max_tokens,
        "chat_template": digest(preparation.chat_template or tokenizer.chat_template or "") if uses_chat else None,
    }


def _fingerprint(sources: list[Source], files: dict[str, list[SourceFile]], preparation: Preparation) -> dict[str, Any]:
    return {
        "sources": {
            source.name: {
                "format": source.format,
                "rendering": rendering(source),
                "files": {f.relative_path: file_digest(Location.of(f.uri)) for f in files[source.name]},
            }
            for source in sources
        },
        "order": [source.name for source in sources],
        "encoding": scoring_spec(preparation, sources),
        "version": PREPARE_VERSION,
        "shard_rows": preparation.config.shard_rows,
        "keep_record": preparation.keep_record,
        "limit": preparation.limit,
    }


def _plan(sources: list[Source], files: dict[str, list[SourceFile]], preparation: Preparation) -> list[Task]:
    """Tasks in source order; with a limit, one for each source, which stops after that many records."""
    tasks: list[Task] = []
    for source in sources:
        target = _TASK_BYTES if preparation.limit is None else _NO_BOUND
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
        compute=ray.data.ActorPoolStrategy(size=min(len(tasks), pool_size(None, 1, 0))),
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


def _check_books(manifest: Manifest, max_bad_fraction: float) -> None:
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


def preview(sources: list[Source], preparation: Preparation, num_records: int = 100, num_shown: int = 3) -> list[str]:
    """What the first records become, without Ray: lines of text, with the scored tokens between ⟦ and ⟧."""
    tokenizer = preparation.base.tokenizer()
    reader = _reader(preparation, sources)
    lines = []
    for source in sources:
        slices = [part for task in plan_tasks(list_files(source), _NO_BOUND) for part in task]
        items = list(reader.read(source, slices, num_records))
        rejects = [item for item in items if isinstance(item, Reject)]
        examples = [item for item in items if not isinstance(item, Reject)]
        lines.append(f"{source.name}: {len(examples)} of the first {len(items)} records can be prepared")
        lines += [f"  {r.source_file} row {r.source_row}: {r.reason} ({r.detail})" for r in rejects[:num_shown]]
        lines += [_marked(tokenizer, row["input_ids"], row["response_spans"]) for row in examples[:num_shown]]
    return lines


def _marked(tokenizer: Any, input_ids: npt.NDArray[np.int32], spans: list[int]) -> str:
    """The tokens as text, the scored ones between ⟦ and ⟧."""
    edges = [0, *spans, len(input_ids)]
    pieces = [tokenizer.decode(input_ids[start:end]) for start, end in pairwise(edges)]
    return "".join(f"⟦{piece}⟧" if number % 2 else piece for number, piece in enumerate(pieces))


def _reader(preparation: Preparation, sources: list[Source]) -> ExampleReader:
    tokenizer = preparation.base.tokenizer()
    uses_chat = any(source.format == "messages" for source in sources)
    chat = ChatTemplate.from_tokenizer(tokenizer, preparation.chat_template) if uses_chat else None
    return ExampleReader(Encoder(tokenizer, preparation.config.max_tokens), chat, keep_record=preparation.keep_record)


class Preparer:
    """Worker: reads one task at a time and writes its shards."""

    def __init__(self, run: Location, tasks: list[Task], preparation: Preparation, shard_rows: int) -> None:
        configure_worker_logging()
        self._run = run
        self._tasks = tasks
        self._limit = preparation.limit
        self._shard_rows = shard_rows
        self._reader = _reader(preparation, [task.source for task in tasks])

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Prepare the task numbered row['id']; returns one row, its report as JSON."""
        task = self._tasks[row["id"]]
        writer = ShardWriter(self._run, task.number, task.source.name, self._shard_rows)
        for item in self._reader.read(task.source, task.slices, self._limit):
            writer.write(item)
        return [{"id": row["id"], "report": writer.finish().to_json()}]
