"""prepare: sources → examples/ and rejects/. Every format, every bad record and all tokenisation pass through here."""

import logging
import operator
import os
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple

import ray
from ray import cloudpickle

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.chat import TODAY, ChatTemplate
from davir_ray.data.evaluation import EvaluationWords, decontamination, list_evaluation_sets
from davir_ray.data.files import Slice, SourceFile, list_files
from davir_ray.data.formats import are_pairs, columns, needs_chat, rendering, uses_chat
from davir_ray.data.reader import BYTES, NOT_FINITE, ExampleReader
from davir_ray.data.shards import SHARD_ROWS, ShardWriter, shard_tokens
from davir_ray.data.task_report import COUNTED, TEXT_BYTES, TaskReport
from davir_ray.data.tokens import Encoder
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.progress import ProgressCounter, WorkDone, tracked
from davir_ray.engine.tasks import in_tasks
from davir_ray.errors import DataError, IntegrityError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.tokenizer import class_name, tokenizer_digest
from davir_ray.run.files import FileEntry, digest, total_rows
from davir_ray.run.folder import Run
from davir_ray.run.location import Location, each
from davir_ray.run.manifest import Manifest, damaged
from davir_ray.run.progress import Progress
from davir_ray.schema import EXAMPLES, KEYED_EXAMPLES, PAIRS
from davir_ray.stages.deal import NEAR_DUPLICATES, Dealing, Dealt, dealing_settings, has_dealing, in_groups
from davir_ray.stages.ids import IDS_CHECKED, check_ids
from davir_ray.stages.lines import rows_of_parts
from davir_ray.stages.sources import digests, plan, read_evaluation
from davir_ray.versions import PREPARE_VERSION

log = logging.getLogger(__name__)

_TASK_BYTES = 32 * 2**20
TASKS = "prepare_tasks"
"""Folder of the reports of finished tasks while the stage runs; a restarted driver does not repeat these tasks."""

_UNDEALT, _DEALING = f"{TASKS}/undealt", f"{TASKS}/dealing"
"""Folders of the shards before they are dealt, and of what the dealing writes meanwhile."""

UNLIMITED = 2**62
"""A number above the rows or bytes of any source."""

_WORKER_BYTES = 4 * 2**20
"""Bytes of sources that take about as long to prepare as another worker takes to start, which imports transformers."""

_MAX_SHARDS = 20_000
_CHECK_ROWS = 1000
"""Rows between two checks of max_bad_fraction."""

TOKENIZER_CLASS = "tokenizer_class"
"""Key in the manifest's details of the class of the base's tokenizer, with which it is loaded without torch."""

EVALUATION_SETS = "evaluation_sets"
"""Key in the manifest's details of the counts of each evaluation set: EvaluationWords.counts, and `rows`, the number of
rows of the data that share words in a row with it (a row may share some with several)."""

_SHOWN_SOURCES = 4
"""Number of sources of which the manifest keeps examples, for the report to show."""

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
    tokenizer_class: str | None = None
    """The class of the base's tokenizer, where it is known; see Checkpoint.tokenizer."""
    evaluation_sets: tuple[str, ...] = ()
    """Paths of the evaluation sets that no example may come from."""

    def reader(self, sources: list[Source], evaluation: EvaluationWords | None = None) -> ExampleReader:
        """The reader that turns records of these sources into examples; `evaluation` has the evaluation sets."""
        tokenizer = self.base.tokenizer(self.tokenizer_class)
        has_template = (self.chat_template or tokenizer.chat_template) is not None
        # Strings need no template; conversations do, and a base without one is refused here.
        uses = any(
            needs_chat(source, self.config) or (has_template and uses_chat(source, self.config)) for source in sources
        )
        return ExampleReader(
            Encoder(tokenizer, self.config.max_tokens),
            ChatTemplate.from_tokenizer(tokenizer, self.chat_template) if uses else None,
            keep_record=self.keep_record,
            prompts_only=self.prompts_only,
            options=self.config,
            evaluation=evaluation,
        )


class Task(NamedTuple):
    """One call of a worker: slices of one source, which become shards named by the task's number."""

    source: Source
    slices: list[Slice]

    def with_rows(self, rows: dict[Slice, range]) -> "Task":
        """The task with the rows of those slices that are byte ranges."""
        return self._replace(slices=[part._replace(rows=rows.get(part)) for part in self.slices])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every task is given."""

    run: Run
    reports: Location
    """Folder that a task writes its report to when it has finished."""
    sources: list[Source]
    preparation: Preparation
    evaluation: Any
    """Reference to the EvaluationWords in Ray's object store, which a node holds once; None without evaluation sets."""
    max_bad_fraction: float
    total_bytes: int
    """Bytes of all sources as they are stored, compressed or not."""
    counter: ProgressCounter


def prepare(
    run: Run,
    sources: list[Source],
    preparation: Preparation,
    *,
    max_bad_fraction: float,
    written: Sequence[Location] = (),
    files: Sequence[list[SourceFile]] | None = None,
    there: Collection[str] | None = None,
) -> Manifest:
    """Turn the sources into tokenised shards and named rejects.

    `files` are those of each source. None: they are listed, without those in the run or in other places `written` by
    the job. `there` are the names of what is in the run's folder, which is listed if they are not given.
    """
    started = time.monotonic()
    there = run.folder.entries() if there is None else there
    if files is None:
        files = [list_files(source, [run.folder, *written]) for source in sources]
    evaluation_sets = list_evaluation_sets(preparation.evaluation_sets, [run.folder, *written])
    fingerprint = _fingerprint(sources, files, preparation) | decontamination(evaluation_sets)
    if "manifests" in there and (complete := run.completed("prepare", fingerprint)):
        if TASKS in there:  # a driver died after writing the manifest and before this
            (run / TASKS).remove()
        return complete
    evaluation = read_evaluation(evaluation_sets)
    tasks = _tasks(sources, files, preparation.limit)
    attempt = _attempt(fingerprint, tasks)
    reports = run / TASKS / digest(attempt)[:16]
    continues = TASKS in there and run.continues_attempt("prepare", TASKS, attempt)
    if not continues:
        # After an attempt, its tasks may have gone on writing since the listing.
        run.clear("prepare", None if TASKS in there else there)
    run.note_attempt(TASKS, attempt)
    done = _finished(run, reports) if continues else {}
    sizes = [file.num_bytes for listed in files for file in listed]
    log.info("prepare: %d tasks (%d already done), %d input files", len(tasks), len(done), len(sizes))
    tokenizer_class = class_name(preparation.base.tokenizer())
    before = _sum(done)
    start = Progress(
        stage="prepare",
        unit="bytes",
        done=before.num_bytes,
        total=sum(sizes) if preparation.limit is None else None,  # with a limit the end is not known
        rows=before.num_read,
        rejects=before.reasons.total(),
        left_out=before.num_left_out,
    )
    try:
        slices = [part for task in tasks for part in task.slices]
        rows = rows_of_parts(run, slices, run / TASKS / f"{reports.name}-lines.json")
        with tracked(run, start) as counter:
            work = Work(
                run=run,
                reports=reports,
                sources=sources,
                preparation=replace(preparation, tokenizer_class=tokenizer_class),
                evaluation=None if evaluation is None else ray.put(evaluation),
                max_bad_fraction=max_bad_fraction,
                total_bytes=sum(sizes),
                counter=counter,
            )
            reports_of_tasks = _run(work, [task.with_rows(rows) for task in tasks], done)
        report = _sum(reports_of_tasks)
        counts = _checked_counts(report, max_bad_fraction, rows_per_record=2 if are_pairs(sources) else 1)
        check_ids(run.folder, _shards(report))
        by_source = _by_source(sources, preparation.config, tasks, reports_of_tasks)
        results, details = report.files, dict[str, Any]()
        if has_dealing(preparation.config):
            dealt = _deal(run, sources, preparation.config, tasks, reports_of_tasks)
            results = [entry for entry in results if entry.name.startswith("rejects/")] + dealt.files
            _count_dropped(dealt, counts, by_source)
            details |= dealt.details
    except (DataError, IntegrityError):
        run.note_attempt(TASKS, attempt, binding=False)  # the user is about to correct the data
        raise
    manifest = Manifest(
        stage="prepare",
        fingerprint=fingerprint,
        counts=counts,
        files=sorted(results, key=lambda entry: entry.name),
        details={
            IDS_CHECKED: True,
            TOKENIZER_CLASS: tokenizer_class,
            TEXT_BYTES: max(report.text_bytes_per_row, report.sums["text_bytes"] // total_rows(_shards(report))),
            "first_reject": report.first_reject,
            "by_source": by_source,
            **details,
            **({} if evaluation is None else {EVALUATION_SETS: _evaluation_counts(evaluation, report)}),
        },
        seconds=time.monotonic() - started,
    )
    manifest = run.commit(manifest)
    (run / TASKS).remove()
    return manifest


def _tasks(sources: list[Source], files: Sequence[list[SourceFile]], limit: int | None) -> list[Task]:
    """What the workers are to do; with a limit each source is one task, which stops after that many records."""
    task_bytes = _TASK_BYTES if limit is None else UNLIMITED
    return [
        Task(source, slices)
        for source, listed in zip(sources, files, strict=True)
        for slices in plan(listed, task_bytes)
    ]


def _evaluation_counts(evaluation: EvaluationWords, report: TaskReport) -> dict[str, dict[str, int]]:
    return {name: {**counts, "rows": report.in_evaluation_sets[name]} for name, counts in evaluation.counts.items()}


def _finished(run: Run, reports: Location) -> dict[int, TaskReport]:
    """Reports of the tasks that an earlier attempt finished and whose files are unchanged, by number."""
    read: dict[str, TaskReport | None] = {}
    for name, text in each(lambda name: (name, (reports / name).read_bytes()), reports.names(".json")):
        try:
            read[name] = TaskReport.from_json(text.decode())
        except (ValueError, KeyError, TypeError):
            read[name] = None
    changed = damaged(run.folder, [entry for report in read.values() if report for entry in report.files])
    found = {}
    for name, report in read.items():
        if report is None or any(entry.name in changed for entry in report.files):
            log.warning("the files that %s lists are lost or damaged; its task is done again", reports / name)
        else:
            found[int(name.removesuffix(".json"))] = report
    return found


def scoring_spec(preparation: Preparation, sources: list[Source]) -> dict[str, Any]:
    """How text becomes scored tokens: saved with a reference, and compared before the reference is used."""
    uses = any(uses_chat(source, preparation.config) for source in sources)
    tokenizer = preparation.base.tokenizer()
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "eos_scored": True,
        "max_tokens": preparation.config.max_tokens,
        "chat_template": digest(preparation.chat_template or tokenizer.chat_template or "") if uses else None,
    }


def _fingerprint(sources: list[Source], files: Sequence[list[SourceFile]], preparation: Preparation) -> dict[str, Any]:
    score_turns = preparation.config.score_turns
    return {
        "sources": {
            source.name: {
                "format": source.format,
                "rendering": rendering(source),
                "files": digests(listed),
            }
            for source, listed in zip(sources, files, strict=True)
        },
        "order": [source.name for source in sources],
        "encoding": scoring_spec(preparation, sources),
        "version": PREPARE_VERSION,
        "shard_rows": preparation.config.shard_rows,
        "keep_record": preparation.keep_record,
        "limit": preparation.limit,
        **({"prompts_only": True} if preparation.prompts_only else {}),
        **({"chat": TODAY.isoformat()} if preparation.config.chat else {}),
        **({"score_turns": score_turns} if score_turns != "marked" else {}),
        **dealing_settings(preparation.config),
    }


def _attempt(fingerprint: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
    """What identifies an attempt: its files and reports are named by the numbers of tasks, so the plan of these, too.

    Without byte ranges the plan follows from the fingerprint, and versions that cut no lines had the same.
    """
    if not any(part.byte_range for task in tasks for part in task.slices):
        return fingerprint
    plan = [
        [
            (part.file.source, part.file.relative_path, str(part.row_groups), str(part.byte_range))
            for part in task.slices
        ]
        for task in tasks
    ]
    return {**fingerprint, "plan": f"{len(tasks)} tasks, {digest(plan)[:16]}"}


def _sum(reports: dict[int, TaskReport]) -> TaskReport:
    """The sum of the reports in the order of the tasks' numbers."""
    return reduce(operator.iadd, (reports[number] for number in sorted(reports)), TaskReport())


def _by_source(
    sources: list[Source], config: PrepareConfig, tasks: list[Task], reports: dict[int, TaskReport]
) -> dict[str, dict[str, Any]]:
    """How each source was read, by name."""
    numbers: dict[str, list[int]] = {source.name: [] for source in sources}
    for number in sorted(reports):
        numbers[tasks[number].source.name].append(number)
    return {
        source.name: _understood(
            source,
            config,
            _sum({number: reports[number] for number in numbers[source.name]}),
            shows=at < _SHOWN_SOURCES,
        )
        for at, source in enumerate(sources)
    }


def _understood(source: Source, config: PrepareConfig, report: TaskReport, *, shows: bool) -> dict[str, Any]:
    """How a source was read and what became of its rows, for the reader of the report; `shows` keeps examples."""
    read = columns(source).keys() - set(source.ignore_columns)
    chat = "always" if needs_chat(source, config) else "where_messages" if uses_chat(source, config) else "never"
    return {
        "format": source.format,
        "chat": chat,
        "read": report.num_read,
        "prepared": total_rows(_shards(report)),
        "left_out": report.num_left_out,
        "rejected": report.reasons.total(),
        "turns_left_out": report.num_turns_left_out,
        **{name: report.sums[name] for name in COUNTED},
        "columns_used": {name: count for name, count in report.columns.items() if name in read},
        "columns_not_used": {name: count for name, count in report.columns.items() if name not in read},
        "sampled": report.num_sampled,
        "role_tokens": dict(report.role_tokens),
        "shown": report.shown if shows else [],
    }


def _shards(report: TaskReport) -> list[FileEntry]:
    """The files of examples that tasks wrote."""
    return [entry for entry in report.files if not entry.name.startswith("rejects/")]


def _deal(
    run: Run, sources: list[Source], config: PrepareConfig, tasks: list[Task], reports: dict[int, TaskReport]
) -> Dealt:
    """Write examples/ from the shards of the tasks: dealt to folds, or without near duplicates."""
    shards: dict[str, list[FileEntry]] = {}
    for number in sorted(reports):
        named = [replace(entry, name=entry.name.removeprefix(f"{_UNDEALT}/")) for entry in _shards(reports[number])]
        shards.setdefault(tasks[number].source.name, []).extend(named)
    return Dealing(
        run=run,
        scratch=run / _DEALING,
        undealt=run / _UNDEALT,
        groups=in_groups(shards, config),
        sources=sources,
        config=config,
    ).deal()


def _count_dropped(dealt: Dealt, counts: dict[str, int], by_source: dict[str, dict[str, Any]]) -> None:
    """Take the near duplicates that were dropped out of the counts, and count them instead."""
    if NEAR_DUPLICATES not in dealt.counts:
        return
    counts[NEAR_DUPLICATES] = dealt.counts[NEAR_DUPLICATES]
    for name, lost in dealt.dropped.items():
        for counted in (counts, by_source[name]):
            counted["prepared"] -= lost["rows"]
            for column in COUNTED:
                counted[column] -= lost[column]
        by_source[name][NEAR_DUPLICATES] = lost["rows"]
    log.info("prepare: %d near duplicates dropped, %d rows left", counts[NEAR_DUPLICATES], counts["prepared"])


def _run(work: Work, tasks: list[Task], done: dict[int, TaskReport]) -> dict[int, TaskReport]:
    """Prepare the tasks that are not done; returns the reports of all, by number."""
    reports, so_far = dict(done), _sum(done)
    pending = [(number, task) for number, task in enumerate(tasks) if number not in done]
    if pending:
        at_once = 1 + work.total_bytes // _WORKER_BYTES
        with closing(in_tasks(partial(_prepare_task, cloudpickle.dumps(work)), pending, at_once=at_once)) as results:
            for index, text in results:
                number, _ = pending[index]
                reports[number] = TaskReport.from_json(text)
                so_far += reports[number]
                so_far.check_rejects(work.max_bad_fraction, work.total_bytes)
    return reports


def _checked_counts(report: TaskReport, max_bad_fraction: float, rows_per_record: int) -> dict[str, int]:
    """The manifest's counts. Raises IntegrityError if rows were lost, DataError if none is left or too many are bad."""
    prepared = total_rows(_shards(report))
    rejected, left_out = report.reasons.total(), report.num_left_out
    if (report.num_read - left_out - rejected) * rows_per_record != prepared:
        raise IntegrityError(
            f"rows were lost in prepare: {report.num_read} read, {prepared} prepared, {left_out} left out, "
            f"{rejected} rejected"
        )
    if prepared == 0:
        raise DataError(
            f"no example could be prepared from {report.num_read} records ({report.reason_counts or 'no records'}"
            f"{f', {left_out} left out by marks of the data' if left_out else ''}); the first: {report.first_reject}"
        )
    report.check_rejects(max_bad_fraction)
    log.info(
        "prepare: %d read, %d prepared, %d left out, %d rejected %s",
        report.num_read, prepared, left_out, rejected, report.reason_counts,
    )  # fmt: skip
    if report.num_turns_left_out:
        log.info("prepare: %d turns of the assistant are not scored", report.num_turns_left_out)
    if report.replaced:
        log.warning(
            "prepare: JSON has no NaN, infinity or bytes, so in the column record %d numbers became null and %d values "
            "of bytes became base64 text",
            report.replaced[NOT_FINITE], report.replaced[BYTES],
        )  # fmt: skip
    counts = {"read": report.num_read, "prepared": prepared, "left_out": left_out, "rejected": rejected}
    counts["turns_left_out"] = report.num_turns_left_out
    counts |= {name: report.sums[name] for name in COUNTED} | dict(sorted(report.reasons.items()))
    return counts | dict(sorted(report.replaced.items()))


def _prepare_task(work: bytes, numbered: tuple[int, Task]) -> str:
    """Prepare one task, given with its number, of a pickled Work; returns its report as JSON."""
    return _preparer(work)(*numbered)


@lru_cache(maxsize=1)
def _preparer(work: bytes) -> "Preparer":
    """The preparer of this process: it serves all tasks that run here, and the process then serves later stages."""
    return Preparer(cloudpickle.loads(work))


class Preparer:
    """Prepares one task at a time; it writes the task's shards and, last, its report."""

    def __init__(self, work: Work) -> None:
        configure_worker_logging()
        # A task has one CPU, and a tokenizer would start a thread for each CPU of the machine.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._work = work
        evaluation = None if work.evaluation is None else ray.get(work.evaluation)
        self._reader = work.preparation.reader(work.sources, evaluation)
        config = work.preparation.config
        self._schema = PAIRS if are_pairs(work.sources) else EXAMPLES if config.fold_by is None else KEYED_EXAMPLES
        self._folder = _UNDEALT if has_dealing(config) else "examples"
        given = work.preparation.config.shard_rows
        self._shard_rows = max(given or SHARD_ROWS, work.total_bytes // _BYTES_PER_ROW // _MAX_SHARDS)
        # With a limit of rows the bytes say nothing of what will be read.
        total_bytes = work.total_bytes if work.preparation.limit is None else 0
        self._limits = {} if given else {"shard_tokens": shard_tokens(total_bytes)}

    def __call__(self, number: int, task: Task) -> str:
        """Prepare one task; returns its report as JSON."""
        work, reader = self._work, self._reader
        reader.report = TaskReport()
        work.counter.begin(str(number))
        writer = ShardWriter(
            work.run.folder, number, task.source.name, self._shard_rows, self._schema,
            folder=self._folder, report=reader.report, **self._limits,
        )  # fmt: skip
        for item in reader.read(task.source, task.slices, work.preparation.limit):
            writer.write(item)
            if writer.report.num_read % _CHECK_ROWS == 0:
                self._report(number, writer.report)
                try:  # stops as soon as too many rows are bad, instead of reading a large file to its end
                    writer.report.check_rejects(work.max_bad_fraction, work.total_bytes)
                except DataError:
                    writer.finish()  # the user will want to see the rejects
                    raise
        report = writer.finish()
        self._report(number, report)
        text = report.to_json()
        (work.reports / f"{number:05d}.json").write_text(text)
        return text

    def _report(self, number: int, report: TaskReport) -> None:
        done = WorkDone(
            report.num_bytes, rows=report.num_read, rejects=report.reasons.total(), left_out=report.num_left_out
        )
        self._work.counter.report(str(number), done)
