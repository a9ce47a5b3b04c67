"""prepare: sources → examples/ and rejects/. Every format, every bad record and all tokenisation pass through here."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray.data

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.files import Slice, SourceFile, list_files, plan_tasks
from davir_ray.data.formats import rendering
from davir_ray.data.reader import BYTES, NOT_FINITE, ExampleReader
from davir_ray.data.shards import COUNTED, ShardWriter, TaskReport
from davir_ray.data.tokens import Encoder
from davir_ray.engine.connect import own_errors
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.progress import ProgressCounter, WorkDone, tracked
from davir_ray.engine.resources import actor_cpus, pool_size
from davir_ray.errors import DataError, IntegrityError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.tokenizer import tokenizer_digest
from davir_ray.run.files import content_digest, digest, file_digest
from davir_ray.run.folder import Run
from davir_ray.run.location import Location, each
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress
from davir_ray.schema import EXAMPLES, PAIRS

log = logging.getLogger(__name__)

_TASK_BYTES = 32 * 2**20
PREPARE_VERSION = 2
"""To be increased with any change that may make other examples of the same records; part of the fingerprint."""

TASKS = "prepare_tasks"
"""Folder of the reports of finished tasks while the stage runs; a restarted driver does not repeat these tasks."""

UNLIMITED = 2**62
"""A number above the rows or bytes of any source."""

_MAX_SHARDS = 20_000
_CHECK_ROWS = 1000
"""Rows between two checks of max_bad_fraction."""

_BYTES_PER_ROW = 256
"""A low guess at the bytes of a source row on disk, to keep a large corpus below _MAX_SHARDS."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that the content of examples/ depends on, apart from the sources."""

    base: Checkpoint
    config: PrepareConfig
    chat_template: str | None = None
    """A chat template, as text, that replaces the tokenizer's."""
    keep_record: bool = True
    limit: int | None = None
    prompts_only: bool = False
    """The records are instructions without a response, of the format alpaca or messages (see render_prompt)."""

    def reader(self, sources: list[Source]) -> ExampleReader:
        """The reader that turns records of these sources into examples."""
        tokenizer = self.base.tokenizer()
        formats = {source.format for source in sources}
        has_template = (self.chat_template or tokenizer.chat_template) is not None
        # Pairs of strings need no template; messages do, and a base without one is refused here.
        uses_chat = "messages" in formats or ("preference" in formats and has_template)
        chat = ChatTemplate.from_tokenizer(tokenizer, self.chat_template) if uses_chat else None
        encoder = Encoder(tokenizer, self.config.max_tokens)
        return ExampleReader(encoder, chat, keep_record=self.keep_record, prompts_only=self.prompts_only)


def are_pairs(sources: list[Source]) -> bool:
    """Whether each record of the sources becomes two examples, one after the other."""
    return any(source.format == "preference" for source in sources)


@dataclass(frozen=True)
class Task:
    """One call of a worker: it prepares slices of one source into shards named by the task's number."""

    number: int
    source: Source
    slices: list[Slice]


class _Limits(NamedTuple):
    """The limit of bad rows, and what is needed to check it early."""

    max_bad_fraction: float
    total_bytes: int
    """Bytes of all sources as they are stored, compressed or not."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The arguments of a worker."""

    run: Run
    reports: Location
    """Folder that a task writes its report to when it has finished."""
    tasks: list[Task]
    preparation: Preparation
    limits: _Limits
    counter: ProgressCounter


def prepare(
    run: Run,
    sources: list[Source],
    preparation: Preparation,
    *,
    max_bad_fraction: float,
    written: Sequence[Location] = (),
) -> Manifest:
    """Turn the sources into tokenised shards and named rejects.

    Files in the run, or in other places `written` by the job, are not read as data.
    """
    started = time.monotonic()
    files = {source.name: list_files(source, [run.folder, *written]) for source in sources}
    fingerprint = _fingerprint(sources, files, preparation)
    if complete := run.completed("prepare", fingerprint):
        (run / TASKS).remove()  # a driver may have died after writing the manifest and before this
        return complete
    reports = run / TASKS / digest(fingerprint)[:16]
    if not run.continues_attempt("prepare", TASKS, fingerprint):
        run.clear("prepare")
    run.note_attempt(TASKS, fingerprint)
    done = _finished(run, reports)
    tasks, num_files = _plan(sources, files, preparation), sum(map(len, files.values()))
    log.info("prepare: %d tasks (%d already done), %d input files", len(tasks), len(done), num_files)
    limits = _Limits(max_bad_fraction, sum(file.num_bytes for source in files.values() for file in source))
    try:
        total = limits.total_bytes if preparation.limit is None else None  # with a limit the end is not known
        with tracked(run, _before(done, total)) as counter:
            work = Work(run=run, reports=reports, tasks=tasks, preparation=preparation, limits=limits, counter=counter)
            report = _run(work, done)
        _check_counts(report, limits, rows_per_record=2 if are_pairs(sources) else 1)
    except DataError:
        run.note_attempt(TASKS, fingerprint, binding=False)  # the user is about to correct the data
        raise
    manifest = run.commit(_manifest(report, fingerprint, time.monotonic() - started))
    (run / TASKS).remove()
    return manifest


def _before(done: dict[int, TaskReport], total: int | None) -> Progress:
    """The progress at the start: what an earlier attempt finished."""
    return Progress(
        stage="prepare",
        unit="bytes",
        done=sum(report.num_bytes for report in done.values()),
        total=total,
        rows=sum(report.num_read for report in done.values()),
        rejects=sum(report.reasons.total() for report in done.values()),
    )


def _finished(run: Run, reports: Location) -> dict[int, TaskReport]:
    """Reports of the tasks that an earlier attempt finished and whose files are unchanged, by number."""
    found = {}
    for name in reports.names(".json"):
        try:
            report = TaskReport.from_json((reports / name).read_bytes().decode())
            written = [entry.sha256 for entry in report.files]
            whole = each(lambda entry: content_digest(run / entry.name), report.files) == written
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            found[int(name.removesuffix(".json"))] = report
        else:
            log.warning("the files that %s lists are lost or damaged; its task is done again", reports / name)
    return found


def scoring_spec(preparation: Preparation, sources: list[Source]) -> dict[str, Any]:
    """How text becomes scored tokens: saved with a reference, and compared before the reference is used."""
    uses_chat = any(source.format in ("messages", "preference") for source in sources)
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
        **({"prompts_only": True} if preparation.prompts_only else {}),
    }


def _plan(sources: list[Source], files: dict[str, list[SourceFile]], preparation: Preparation) -> list[Task]:
    """The tasks, in source order; with a limit each source is one task, which stops after that many records."""
    tasks: list[Task] = []
    for source in sources:
        target = _TASK_BYTES if preparation.limit is None else UNLIMITED
        planned = plan_tasks(files[source.name], target)
        tasks += [Task(len(tasks) + i, source, slices) for i, slices in enumerate(planned)]
    return tasks


def _shard_rows(config: PrepareConfig, total_bytes: int) -> int:
    return max(config.shard_rows, total_bytes // _BYTES_PER_ROW // _MAX_SHARDS)


def _run(work: Work, done: dict[int, TaskReport]) -> TaskReport:
    """Prepare the tasks that are not done; returns the sum of all reports in task order."""
    reports = dict(done)
    pending = [task.number for task in work.tasks if task.number not in done]
    so_far = TaskReport()
    for report in done.values():
        so_far += report
    if pending:
        num_cpus = actor_cpus(1)
        dataset = ray.data.from_items(pending, override_num_blocks=len(pending)).flat_map(
            Preparer,
            fn_constructor_kwargs={"work": work},
            compute=ray.data.ActorPoolStrategy(size=min(len(pending), pool_size(None, num_cpus, 0))),
            num_cpus=num_cpus,
        )
        with own_errors():
            for row in dataset.iter_rows():
                reports[row["number"]] = TaskReport.from_json(row["report"])
                so_far += reports[row["number"]]
                so_far.check_rejects(work.limits.max_bad_fraction, work.limits.total_bytes)
    total = TaskReport()
    for number in sorted(reports):
        total += reports[number]
    return total


def _manifest(report: TaskReport, fingerprint: dict[str, Any], seconds: float) -> Manifest:
    prepared = sum(entry.rows for entry in report.files if entry.name.startswith("examples/"))
    counts = {"read": report.num_read, "prepared": prepared, "rejected": report.reasons.total()}
    counts |= {name: report.sums[name] for name in COUNTED} | dict(sorted(report.reasons.items()))
    counts |= dict(sorted(report.replaced.items()))
    details = {"first_reject": report.first_reject}
    files = sorted(report.files, key=lambda entry: entry.name)
    return Manifest(
        stage="prepare", fingerprint=fingerprint, counts=counts, files=files, details=details, seconds=seconds
    )


def _check_counts(report: TaskReport, limits: _Limits, rows_per_record: int) -> None:
    prepared = sum(entry.rows for entry in report.files if entry.name.startswith("examples/"))
    if (report.num_read - report.reasons.total()) * rows_per_record != prepared:
        raise IntegrityError(
            f"rows were lost in prepare: {report.num_read} read, {prepared} prepared, {report.reasons.total()} rejected"
        )
    if prepared == 0:
        raise DataError(
            f"no example could be prepared from {report.num_read} records ({report.reason_counts or 'no records'}); "
            f"the first: {report.first_reject}"
        )
    report.check_rejects(limits.max_bad_fraction)
    log.info(
        "prepare: %d read, %d prepared, %d rejected %s",
        report.num_read, prepared, report.reasons.total(), report.reason_counts,
    )  # fmt: skip
    if report.replaced:
        log.warning(
            "prepare: JSON has no NaN, infinity or bytes, so in the column record %d numbers became null and %d values "
            "of bytes became base64 text",
            report.replaced[NOT_FINITE], report.replaced[BYTES],
        )  # fmt: skip


class Preparer:
    """Worker: prepares one task at a time; it writes the task's shards and, last, its report."""

    def __init__(self, work: Work) -> None:
        configure_worker_logging()
        self._work = work
        sources = [task.source for task in work.tasks]
        self._reader = work.preparation.reader(sources)
        self._schema = PAIRS if are_pairs(sources) else EXAMPLES
        self._shard_rows = _shard_rows(work.preparation.config, work.limits.total_bytes)

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Prepare the task with the number row['item']; returns one row with its report as JSON."""
        work = self._work
        task, reader = work.tasks[row["item"]], self._reader
        reader.bytes_read = 0
        reader.replaced.clear()
        work.counter.begin(str(task.number))
        writer = ShardWriter(work.run.folder, task.number, task.source.name, self._shard_rows, self._schema)
        for item in reader.read(task.source, task.slices, work.preparation.limit):
            writer.write(item)
            if writer.report.num_read % _CHECK_ROWS == 0:
                writer.report.num_bytes = reader.bytes_read
                self._report(task.number, writer.report)
                self._stop_early(writer)
        report = writer.finish()
        report.num_bytes = reader.bytes_read
        report.replaced = reader.replaced
        self._report(task.number, report)
        text = report.to_json()
        (work.reports / f"{task.number:05d}.json").write_text(text)
        return [{"number": task.number, "report": text}]

    def _report(self, number: int, report: TaskReport) -> None:
        done = WorkDone(report.num_bytes, rows=report.num_read, rejects=report.reasons.total())
        self._work.counter.report(str(number), done)

    def _stop_early(self, writer: ShardWriter) -> None:
        """Raise DataError as soon as too many rows are bad, instead of reading a large file to its end."""
        limits = self._work.limits
        try:
            writer.report.check_rejects(limits.max_bad_fraction, limits.total_bytes)
        except DataError:
            writer.finish()  # the user will want to see the rejects
            raise
