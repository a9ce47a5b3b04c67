"""When a training writes a checkpoint, what it waits for, and when a store that fails does not matter any more."""

import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
import ray.train
from fsspec.implementations.local import LocalFileSystem

from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.progress import WorkDone
from davir_ray.errors import StorageError
from davir_ray.models.training.loop import StepReport
from davir_ray.models.training.parallel import STATE_FILE
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


def training_of(**options: Any) -> Training:
    return Training(
        stage="finetune", run=Run.at("memory://run"), base=None, config=FinetuneConfig(**options),  # type: ignore[arg-type]
        write=lambda _: None, objective=lambda _: None, spec={}, folder="reference", name="name",  # type: ignore[arg-type, return-value]
    )  # fmt: skip


def saved(
    monkeypatch: pytest.MonkeyPatch, seconds: float, *, uploaded: bool = True, takes: float = 0.0, **options: Any
) -> list[int]:
    """The steps after which rank 0 writes a checkpoint.

    `uploaded`: whether an upload has ended at the next step; `takes`: seconds that training waits for each.
    """
    found: list[int] = []
    clock = Clock(seconds)

    def save(self: training_worker.Checkpoints, report: StepReport) -> None:
        found.append(report.step)
        clock.now += takes
        if not uploaded:
            self._idle.clear()

    monkeypatch.setattr(training_worker.Checkpoints, "_save", save)
    monkeypatch.setattr(training_worker, "_UPLOAD_S", 0)
    monkeypatch.setattr(training_worker, "time", clock)
    training, steps = training_of(**options), Steps(clock)
    checkpoints = training_worker.Checkpoints(training, steps, is_first=True)  # type: ignore[arg-type]
    training_worker._take_steps(training, steps, NobodyListens(), checkpoints, is_first=True)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("takes", "options", "expected"),
    [
        (10, {"checkpoint_every_minutes": 5}, [6, 12, 18]),  # 360 s apart: less than a twentieth
        (30, {"checkpoint_every_minutes": 5}, [6, 17]),  # 600 s of training for each but the first
        (30, {"checkpoint_every_minutes": 30}, [6, 18]),  # not after the second epoch, which took 360 s
        (300, {"checkpoint_every_steps": 5}, [5, 10, 15, 20]),  # as the user said
    ],
)
def test_saving_by_time_takes_a_twentieth_of_the_time_at_most(
    monkeypatch: pytest.MonkeyPatch, takes: float, options: dict[str, Any], expected: list[int]
) -> None:
    assert saved(monkeypatch, 60, takes=takes, **options) == expected


# --- uploads ---------------------------------------------------------------------------------------------------------

CONTENT = b"weights" * 100


class Full(LocalFileSystem):  # type: ignore[misc]
    """A store without room."""

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space left")


@dataclass(kw_only=True)
class RayTrain:
    """Stands for Ray Train, which calls `upload` in a thread while steps are taken."""

    store: pyarrow.fs.FileSystem
    folder: Path
    given: dict[str, Any] = field(default_factory=dict)

    def report(self, metrics: dict[str, Any], **given: Any) -> None:
        self.given = given

    def get_context(self) -> SimpleNamespace:
        return SimpleNamespace(get_storage=lambda: self)

    @property
    def storage_filesystem(self) -> pyarrow.fs.FileSystem:
        return self.store

    def build_checkpoint_path_from_name(self, name: str) -> str:
        return f"{self.folder}/{name}"

    @property
    def local(self) -> Path:
        return Path(self.given["checkpoint"].path)

    def upload(self) -> ray.train.Checkpoint:
        found: ray.train.Checkpoint = self.given["checkpoint_upload_fn"](self.given["checkpoint"], "checkpoint_1")
        return found


@dataclass
class Saves(Steps):
    """Stands for a trainer whose state is a small file."""

    every_rank_saves: bool = False

    def save_state(self, folder: Path) -> None:
        (folder / STATE_FILE).write_bytes(CONTENT)


def pending(
    monkeypatch: pytest.MonkeyPatch, folder: Path, store: pyarrow.fs.FileSystem
) -> tuple[training_worker.Checkpoints, RayTrain]:
    """Checkpoints of which one was saved and is not uploaded, and who uploads it."""
    stand_in, trainer = RayTrain(store=store, folder=folder), Saves(Clock(1))
    monkeypatch.setattr(ray.train, "report", stand_in.report)
    monkeypatch.setattr(ray.train, "get_context", stand_in.get_context)
    checkpoints = training_worker.Checkpoints(training_of(), trainer, is_first=True)  # type: ignore[arg-type]
    checkpoints.save(next(trainer.steps()))
    assert not checkpoints._idle.is_set()
    return checkpoints, stand_in


def test_a_step_waits_for_neither_the_checksum_nor_the_upload(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoints, ray_train = pending(monkeypatch, tmp_path, pyarrow.fs.LocalFileSystem())
    assert [file.name for file in ray_train.local.iterdir()] == [STATE_FILE]
    assert ray_train.given["checkpoint_upload_mode"] == ray.train.CheckpointUploadMode.ASYNC
    found = ray_train.upload()
    assert found.path == f"{tmp_path}/checkpoint_1"
    written = {file.name: file.read_bytes() for file in (tmp_path / "checkpoint_1").iterdir()}
    assert written == {
        STATE_FILE: CONTENT,
        "training_state.sha256": hashlib.sha256(CONTENT).hexdigest().encode(),
    }
    assert not ray_train.local.exists()
    assert checkpoints._idle.is_set()


@pytest.mark.parametrize("steps_are_taken", [False, True])
def test_an_upload_that_fails_ends_the_worker_unless_no_step_follows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps_are_taken: bool
) -> None:
    store = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(Full()))
    checkpoints, ray_train = pending(monkeypatch, tmp_path, store)
    checkpoints.steps_are_taken = steps_are_taken
    with pytest.raises(SystemExit if steps_are_taken else StorageError):
        ray_train.upload()
    warned = "the last checkpoint in memory:///run/checkpoints was not written; training ends without: no space is left"
    assert [warned in message for message in caplog.messages] == [True] * steps_are_taken
    assert not ray_train.local.exists()
    assert checkpoints._idle.is_set()


def test_an_upload_is_given_up_as_soon_as_the_model_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Slow(LocalFileSystem):  # type: ignore[misc]
        """A store that takes a few parts until the model is written."""

        def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
            file = super().open(path, mode)
            return SimpleNamespace(write=partial(self.write, file), close=file.close, closed=False, flush=file.flush)

        def write(self, file: Any, part: bytes) -> int:
            checkpoints.model_is_written = file.tell() >= 200
            return int(file.write(part))

    monkeypatch.setattr(training_worker, "_PART_BYTES", 100)
    checkpoints, ray_train = pending(monkeypatch, tmp_path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(Slow())))
    with pytest.raises(SystemExit):
        ray_train.upload()
    (written,) = (tmp_path / "checkpoint_1").iterdir()
    assert written.stat().st_size == 300 < len(CONTENT)
    assert not ray_train.local.exists()
