"""Progress of a stage: workers report to an actor, and the driver shows the user its totals every few seconds."""

import logging
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter as Metric

from davir_ray.engine.resources import driver_node
from davir_ray.run.folder import Run
from davir_ray.run.progress import Pace, Progress
from davir_ray.terminal import Bar

log = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two writes of progress.json, and between two log lines while there is something new."""

_IDLE_S = 30.0
"""Seconds between two log lines while nothing is new, and between two of a training."""

_MAX_POINTS = 200
"""Maximum number of points of the throughput curve."""

_ASK_S = 10.0
"""Seconds that the driver waits for the totals."""

_REPORT_S = 1.0
"""Seconds that a worker waits for its report to arrive."""


class WorkDone(NamedTuple):
    """What a worker has done of one shard, task or training so far; a later report replaces an earlier one."""

    done: int
    """Amount done, in the stage's unit."""
    rows: int = 0
    tokens: int = 0
    rejects: int = 0
    unscored: int = 0
    before: int = 0
    """Amount that an earlier attempt did, in the stage's unit: it counts as done, but not for any rate."""
    left_out: int = 0


_METRICS = ("rows", "tokens", "rejects", "left_out", "unscored", "retries")
"""Metrics that Ray exports for a stage."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The sum of all workers' reports."""

    work: WorkDone
    retries: int
    throughput: dict[str, list[float]]
    """Cumulative tokens at seconds since the stage began, at about _MAX_POINTS points at most."""
    total: int | None
    """Amount to do in all, in the stage's unit; None while it is not known."""


class _StageCounter:
    """Sums the workers' reports of one stage. A shard that is reported twice counts once: it was done again."""

    def __init__(self, total: int | None, num_parts: int) -> None:
        self._total = total
        self._num_parts = num_parts
        self._totals: dict[str, int] = {}
        self._work: dict[str, WorkDone] = {}
        self._begun = set[str]()
        self._retries = 0
        self._points: list[tuple[float, int]] = []
        self._last = (0.0, 0)
        self._num_reports, self._every = 0, 1
        self._tokens = 0
        self._started = time.monotonic()

    def begin(self, key: str) -> dict[str, int]:
        """Record that a worker begins this piece of work; returns what is new for the metrics."""
        is_retry = key in self._begun
        self._begun.add(key)
        self._retries += is_retry
        return {"retries": int(is_retry)}

    def report(self, key: str, work: WorkDone, total: int | None) -> dict[str, int]:
        """Record how much of this piece of work is done; returns what is new for the metrics."""
        before = self._work.get(key, WorkDone(0))
        self._work[key] = work
        if total is not None:
            self._totals[key] = total
        self._tokens += work.tokens - before.tokens
        self._last = (time.monotonic() - self._started, self._tokens)
        if self._num_reports % self._every == 0:
            self._points.append(self._last)
        self._num_reports += 1
        if len(self._points) > _MAX_POINTS:  # thinned evenly over the whole stage
            self._points, self._every = self._points[::2], 2 * self._every
        return {name: getattr(work, name) - getattr(before, name) for name in _METRICS if name != "retries"}

    def totals(self) -> Totals:
        """The sum of all reports."""
        work = WorkDone(*(sum(column) for column in zip(WorkDone(0), *self._work.values(), strict=True)))
        points = self._points if not self._points or self._points[-1] == self._last else [*self._points, self._last]
        total = self._total
        if self._totals:  # the parts that have not begun count as the others do
            total = round(sum(self._totals.values()) * max(1, self._num_parts / len(self._totals)))
        throughput = {"seconds": [at for at, _ in points], "tokens": [float(tokens) for _, tokens in points]}
        return Totals(work=work, retries=self._retries, throughput=throughput, total=total)


class _CounterActor:
    """Counts for every stage of a driver, several at a time in a comparison, and keeps the steps for its tracking.

    One process does both, because another would take seconds to start. After the loss of its node it is anew and empty.
    """

    def __init__(self) -> None:
        self._stages: dict[str, _StageCounter] = {}
        self._steps: dict[str, list[Any]] = {}
        self._metrics = {
            name: Metric(f"davir_ray_{name}", f"{name} of a stage of davir_ray", tag_keys=("stage",))
            for name in _METRICS
        }

    def start(self, stage: str, total: int | None, num_parts: int) -> None:
        self._stages[stage] = _StageCounter(total, num_parts)

    def begin(self, stage: str, key: str) -> None:
        self._count(stage, self._counter(stage).begin(key))

    def report(self, stage: str, key: str, work: WorkDone, total: int | None) -> None:
        self._count(stage, self._counter(stage).report(key, work, total))

    def totals(self, stage: str) -> Totals | None:
        return self._stages[stage].totals() if stage in self._stages else None

    def end(self, stage: str) -> None:
        self._stages.pop(stage, None)

    def add_step(self, training: str, step: Any) -> None:
        self._steps.setdefault(training, []).append(step)

    def take_steps(self, training: str) -> list[Any]:
        return self._steps.pop(training, [])

    def _counter(self, stage: str) -> _StageCounter:
        return self._stages.setdefault(stage, _StageCounter(None, 1))

    def _count(self, stage: str, news: dict[str, int]) -> None:
        for name, more in news.items():
            if more > 0:
                self._metrics[name].inc(more, {"stage": stage.partition(" ")[0]})


def counter_actor() -> Any:
    """The counter's actor of this process's connection to Ray."""
    context = ray.get_runtime_context()
    return _actor_of(f"{context.gcs_address} {context.get_job_id()}")


@cache
def _actor_of(job: str) -> Any:
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=driver_node())(_CounterActor).remote()


class ProgressCounter:
    """A handle to the counter of a stage, for workers and the driver. A lost report only makes the progress inexact."""

    def __init__(self, stage: str, total: int | None, num_parts: int = 1) -> None:
        self._actor: Any = counter_actor()
        self._stage = f"{stage} {uuid.uuid4().hex}"
        self._actor.start.remote(self._stage, total, num_parts)

    def begin(self, key: str) -> None:
        """Report that a piece of work begins; if it has begun before, this is a retry."""
        self._actor.begin.remote(self._stage, key)

    def report(self, key: str, work: WorkDone, total: int | None = None) -> None:
        """Report how much of a piece of work is done, and its `total` where the driver cannot know the stage's."""
        # Waits, so that the last report arrives before the stage ends, but only briefly for an actor without answer.
        ray.wait([self._actor.report.remote(self._stage, key, work, total)], timeout=_REPORT_S)

    def totals(self) -> Totals | None:
        """The sum of all reports; None after the end, and if the actor does not answer."""
        try:
            answer: Totals | None = ray.get(self._actor.totals.remote(self._stage), timeout=_ASK_S)
        except RayError:
            return None
        return answer

    def end(self) -> None:
        """Forget the stage after the pending reports."""
        self._actor.end.remote(self._stage)


@contextmanager
def tracked(run: Run, start: Progress, *, num_parts: int = 1) -> Iterator[ProgressCounter]:
    """A counter for a stage; during the block its totals go to progress.json, and to a bar or log lines.

    `start` names the stage, its unit and total, and holds what was done before. Where the total is not known, it is
    that of `num_parts` pieces of work, which report their own.
    """
    counter = ProgressCounter(start.stage, start.total, num_parts)
    display = _Display(run, start, counter)
    try:
        yield counter
        display.show_last()
    finally:
        display.close()
        counter.end()


class _Display:
    """Asks the counter every few seconds, in a thread, and shows the user what it answers."""

    def __init__(self, run: Run, start: Progress, counter: ProgressCounter) -> None:
        self._run, self._first, self._counter = run, start, counter
        self._pace = Pace()
        self._started = time.monotonic()
        self._logged_done, self._logged_at = -1, 0.0
        self._ended = threading.Event()
        self._bar = Bar(start) if sys.stderr.isatty() else None
        self._show(start)
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)
        self._thread.start()

    def _repeat(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._update()

    def show_last(self) -> None:
        """Show the final totals."""
        self._ended.set()
        self._thread.join()
        self._update()

    def close(self) -> None:
        """Show nothing more: after an error the run may be another driver's by now, or its store unreachable."""
        self._ended.set()
        self._thread.join(EVERY_S)
        if self._bar is not None:
            self._bar.close()

    def _update(self) -> None:
        totals = self._counter.totals()
        if totals is None or (self._ended.is_set() and self._thread.is_alive()):
            return
        first, work, now = self._first, totals.work, time.monotonic()
        done = first.done + work.before + work.done
        self._pace.add(now, work.done, work.tokens)
        self._show(
            replace(
                first,
                done=done,
                total=totals.total,
                rows=first.rows + work.rows,
                tokens=work.tokens,
                tokens_per_second=self._pace.tokens_per_second,
                seconds=now - self._started,
                seconds_left=self._pace.seconds_left(None if totals.total is None else totals.total - done),
                rejects=first.rejects + work.rejects,
                left_out=first.left_out + work.left_out,
                unscored=first.unscored + work.unscored,
                retries=totals.retries,
            )
        )

    def _show(self, progress: Progress) -> None:
        if self._bar is None:
            self._log(progress)
        else:
            self._bar.show(progress)
        self._run.write_progress(progress)

    def _log(self, progress: Progress) -> None:
        now = time.monotonic()
        # The first worker of a training logs its steps itself; these lines add the remaining time.
        is_new = progress.done != self._logged_done and progress.unit != "steps"
        if is_new or now - self._logged_at > _IDLE_S:
            log.info("%s", progress)
            self._logged_done, self._logged_at = progress.done, now
