"""Tracking on Ray: rank 0 of a training reports its steps to the counter's actor, from which the driver logs them."""

import logging
import threading
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError

from davir_ray.config.run import Tracker
from davir_ray.engine.progress import counter_actor
from davir_ray.engine.trackers import Step, TrackingRun
from davir_ray.run.folder import Run
from davir_ray.text import one_line

log = logging.getLogger(__name__)

_EVERY_S = 5.0
"""Seconds between two looks of the driver for new steps."""

_ASK_S = 60.0
"""Seconds that the driver waits for them; the actor may take most of these to start on a busy machine."""

_REPORT_S = 1.0
"""Seconds that a worker waits for its report to arrive."""


class StepLog:
    """A handle to the steps of a training that are not logged yet."""

    def __init__(self) -> None:
        self._actor: Any = counter_actor()
        self._training = uuid.uuid4().hex
        self.take()  # the actor has started, so a report to it arrives in time

    def add(self, step: Step) -> None:
        """Report a step, on rank 0."""
        ray.wait([self._actor.add_step.remote(self._training, step)], timeout=_REPORT_S)

    def take(self) -> list[Step]:
        """The steps that were reported since the last call."""
        steps: list[Step] = ray.get(self._actor.take_steps.remote(self._training), timeout=_ASK_S)
        return steps


class Tracking:
    """The tracking of a run from here until it is closed; without a tracker it does nothing.

    A thread looks for new steps every few seconds, until the results are logged.
    """

    def __init__(self, run: Run, tracker: Tracker | None, name: str | None = None) -> None:
        self._tracked = None if tracker is None else TrackingRun(run, tracker, name or run.folder.name)
        self.steps = None if tracker is None else StepLog()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="tracking", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def log_results(self, results: Mapping[str, float]) -> None:
        """Log what the run came to; no steps follow."""
        self._end_steps()
        if self._tracked is not None:
            self._tracked.log_results(results)

    def close(self, *, failed: bool) -> None:
        """Log the last steps and end the session."""
        self._end_steps()
        if self._tracked is not None:
            self._tracked.close(failed=failed)

    def _end_steps(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self._pass_on()

    def _repeat(self) -> None:
        while self.steps is not None and not self._ended.wait(_EVERY_S):
            self._pass_on()

    def _pass_on(self) -> None:
        if self.steps is None or self._tracked is None:
            return
        try:
            steps = self.steps.take()
        except RayError as error:
            log.warning("the last steps may be missing in the tracking: %s", one_line(error))
        else:
            self._tracked.log(steps)


def counts_of(run: Run, *stages: str) -> dict[str, float]:
    """The counts of complete stages, by stage and name."""
    return {f"{stage}/{name}": count for stage in stages for name, count in run.require(stage).counts.items()}
