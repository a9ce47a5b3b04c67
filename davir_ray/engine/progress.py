"""Progress of a stage: workers tell an actor what they did, the driver asks it every few seconds and tells the user."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter as Metric
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from davir_ray.run.folder import Run
from davir_ray.run.progress import Pace, Progress
from davir_ray.terminal import Bar

log = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two writes of progress.json, and between two lines where something was done."""

_STILL_S = 30.0
"""Seconds between two lines while nothing is done, and between two lines of a training."""

_MOST_POINTS = 200
_ASK_S = 10.0
_HEARD_S = 1.0


class Told(NamedTuple):
    """What a worker has done of one shard, task or step; told again, the last word counts."""

    done: int
    """In the stage's unit."""
    rows: int = 0
    tokens: int = 0
    rejects: int = 0
    unscored: int = 0
    before: int = 0
    """Done by an earlier attempt, in the stage's unit: it counts as done, and for no rate."""


_COUNTED = ("rows", "tokens", "rejects", "unscored", "retries")
"""Ray's metrics of a stage."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What all workers have told."""

    told: Told
    retries: int
    throughput: dict[str, list[float]]
    """Cumulative tokens at seconds since the stage began, at most some hundred points."""
    total: int | None


class _Counts:
    """The actor. What is told twice counts once: a worker that is lost may have told of what it did not commit."""

    def __init__(self, stage: str, total: int | None) -> None:
        self._total = total
        self._told: dict[str, Told] = {}
        self._begun = set[str]()
        self._retries = 0
        self._points: list[tuple[float, int]] = []
        self._last = (0.0, 0)
        self._num_told, self._every = 0, 1
        self._tokens = 0
        self._started = time.monotonic()
        self._metrics = {
            name: Metric(f"davir_ray_{name}", f"{name} of a stage of davir_ray", tag_keys=("stage",))
            for name in _COUNTED
        }
        for metric in self._metrics.values():
            metric.set_default_tags({"stage": stage})

    def begin(self, key: str) -> None:
        """A worker begins this piece of work."""
        if key in self._begun:
            self._retries += 1
            self._metrics["retries"].inc(1)
        self._begun.add(key)

    def tell(self, key: str, told: Told, total: int | None) -> None:
        """A worker has done so much of this piece of work."""
        before = self._told.get(key, Told(0))
        self._told[key] = told
        self._total = total or self._total
        for name in _COUNTED:
            if (more := getattr(told, name, 0) - getattr(before, name, 0)) > 0:
                self._metrics[name].inc(more)
        self._tokens += told.tokens - before.tokens
        self._last = (time.monotonic() - self._started, self._tokens)
        if self._num_told % self._every == 0:
            self._points.append(self._last)
        self._num_told += 1
        if len(self._points) > _MOST_POINTS:  # evenly thinned over the whole stage
            self._points, self._every = self._points[::2], 2 * self._every

    def sums(self) -> Sums:
        """All that was told."""
        told = Told(*(sum(column) for column in zip(Told(0), *self._told.values(), strict=True)))
        points = self._points if not self._points or self._points[-1] == self._last else [*self._points, self._last]
        throughput = {"seconds": [at for at, _ in points], "tokens": [float(tokens) for _, tokens in points]}
        return Sums(told=told, retries=self._retries, throughput=throughput, total=self._total)


class Tally:
    """What workers hold: they tell and go on. A lost word only makes the progress wrong."""

    def __init__(self, stage: str, total: int | None) -> None:
        # Beside the driver, so that it is not lost with a worker's node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(_Counts)
        self._actor: Any = actor.remote(stage, total)

    def begin(self, key: str) -> None:
        """A piece of work begins; one that has begun before is a retry."""
        self._actor.begin.remote(key)

    def tell(self, key: str, told: Told, total: int | None = None) -> None:
        """So much of this piece of work is done; `total` where the driver cannot know the stage's."""
        # So that the last word is heard before the stage ends; a tally that does not answer holds nobody up.
        ray.wait([self._actor.tell.remote(key, told, total)], timeout=_HEARD_S)

    def sums(self) -> Sums | None:
        """All that was told; None if the actor does not answer."""
        try:
            answer: Sums = ray.get(self._actor.sums.remote(), timeout=_ASK_S)
        except RayError:
            return None
        return answer

    def end(self) -> None:
        """Ends the actor, once it has heard what was told: with handles in Ray Data's operators it outlives its stage.

        Not ray.kill, which would lose what its metrics counted last.
        """
        self._actor.__ray_terminate__.remote()


@contextmanager
def tallied(run: Run, start: Progress) -> Iterator[Tally]:
    """A tally for a stage; while the block runs its sums go to progress.json, and to a bar or lines for the user.

    `start` names the stage, its unit and total, and holds what was done before.
    """
    tally = Tally(start.stage, start.total)
    teller = _Teller(run, start, tally)
    teller.start()
    try:
        yield tally
    except BaseException:
        teller.stop()
        raise
    else:
        teller.finish()
    finally:
        tally.end()


class _Teller:
    """Asks the tally every few seconds and tells the user."""

    def __init__(self, run: Run, start: Progress, tally: Tally) -> None:
        self._run, self._first, self._tally = run, start, tally
        self._pace = Pace()
        self._started = time.monotonic()
        self._told_done, self._told_at = -1, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)
        self._bar = Bar(start) if sys.stderr.isatty() else None

    def start(self) -> None:
        """Begin to tell."""
        self._tell(self._first)
        self._thread.start()

    def _repeat(self) -> None:
        while not self._ended.wait(EVERY_S):
            self._ask()

    def stop(self) -> None:
        """Tell no more: the run may be another driver's by now, or its store away."""
        self._ended.set()
        self._thread.join(EVERY_S)
        if self._bar is not None:
            self._bar.close()

    def finish(self) -> None:
        """The last word."""
        self._ended.set()
        self._thread.join()
        self._ask()
        self.stop()

    def _ask(self) -> None:
        sums = self._tally.sums()
        if sums is None or (self._ended.is_set() and self._thread.is_alive()):
            return
        first, told, now = self._first, sums.told, time.monotonic()
        done = first.done + told.before + told.done
        self._pace.add(now, told.done, told.tokens)
        self._tell(
            replace(
                first,
                done=done,
                total=sums.total,
                rows=first.rows + told.rows,
                tokens=told.tokens,
                tokens_per_second=self._pace.tokens_per_second,
                seconds=now - self._started,
                seconds_left=self._pace.seconds_left(None if sums.total is None else sums.total - done),
                rejects=first.rejects + told.rejects,
                unscored=first.unscored + told.unscored,
                retries=sums.retries,
            )
        )

    def _tell(self, progress: Progress) -> None:
        if self._bar is None:
            self._log(progress)
        else:
            self._bar.show(progress)
        self._run.write_progress(progress)

    def _log(self, progress: Progress) -> None:
        now = time.monotonic()
        # Of a training the first worker logs the steps; these lines add the time that is left.
        is_news = progress.done != self._told_done and progress.unit != "steps"
        if is_news or now - self._told_at > _STILL_S:
            log.info("%s", progress)
            self._told_done, self._told_at = progress.done, now
