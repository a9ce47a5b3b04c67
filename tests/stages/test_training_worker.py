"""When a training writes a checkpoint: by steps, by the clock of rank 0, and not just before the model is written."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.progress import WorkDone
from davir_ray.models.training.loop import StepReport
from davir_ray.run.folder import Run
from davir_ray.stages import training_worker
from davir_ray.stages.finetune import Training

STEPS, STEPS_OF_AN_EPOCH = 24, 6


@dataclass
class Clock:
    """Stands for the module `time`; a step takes some seconds."""

    seconds_of_a_step: float
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Steps:
    """Stands for the trainer."""

    clock: Clock
    step: int = 0
    asked: list[bool] = field(default_factory=list)

    def steps(self) -> Iterator[StepReport]:
        for step in range(1, STEPS + 1):
            self.clock.now += self.clock.seconds_of_a_step
            yield StepReport(
                step=step, total_steps=STEPS, epoch=1, ends_epoch=step % STEPS_OF_AN_EPOCH == 0, loss=1.0,
                measures={"loss": 1.0}, grad_norm=1.0, learning_rate=1.0, tokens_per_second=1.0, num_tokens=1,
            )  # fmt: skip

    def agreed(self, own: bool) -> bool:
        self.asked.append(own)
        return own


class NobodyListens:
    """Stands for the counter."""

    def begin(self, key: str) -> None:
        """Nothing."""

    def report(self, key: str, work: WorkDone, total: int | None = None) -> None:
        """Nothing."""


def saved(monkeypatch: pytest.MonkeyPatch, seconds: float, *, uploaded: bool = True, **options: Any) -> list[int]:
    """The steps after which rank 0 writes a checkpoint; `uploaded`: whether an upload has ended at the next step."""
    found: list[int] = []
    clock = Clock(seconds)

    def save(self: training_worker.Checkpoints, report: StepReport) -> None:
        found.append(report.step)
        self._last = clock.now
        if not uploaded:
            self._idle.clear()

    monkeypatch.setattr(training_worker.Checkpoints, "save", save)
    monkeypatch.setattr(training_worker, "time", clock)
    training = Training(
        stage="finetune", run=Run.at("memory://run"), base=None, config=FinetuneConfig(**options),  # type: ignore[arg-type]
        objective=lambda: None, spec={}, folder="reference",  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    training_worker._take_steps(training, Steps(clock), NobodyListens(), is_first=True)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        (1, {}, []),  # neither ten minutes nor a minute at an epoch's end
        (11, {}, [6, 12, 18]),  # at the ends of epochs, but the last, after which the model is written
        (59, {"checkpoint_every_minutes": 5}, [6, 12, 18]),
        (59, {"checkpoint_every_minutes": 3}, [4, 6, 10, 12, 16, 18, 22]),
        (700, {}, [*range(1, STEPS)]),
        (1, {"checkpoint_every_steps": 5}, [5, 10, 15, 20]),
        (1, {"checkpoint_every_steps": 8}, [8, 16]),
        (700, {"checkpoint_every_minutes": None}, []),
        (700, {"checkpoint_every_minutes": None, "checkpoint_every_steps": 10}, [10, 20]),
    ],
)
def test_checkpoints_are_written_by_time_by_steps_and_at_an_epochs_end(
    monkeypatch: pytest.MonkeyPatch, seconds: float, options: dict[str, Any], expected: list[int]
) -> None:
    assert saved(monkeypatch, seconds, **options) == expected


def test_no_checkpoint_by_time_is_begun_while_the_last_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved(monkeypatch, 700, uploaded=False) == [1]
    assert saved(monkeypatch, 700, uploaded=False, checkpoint_every_steps=20) == [1, 20]
