"""One worker of a training: it loads the base, takes the steps of models/training/loop.py and exports the model.

It continues from a checkpoint if there is one.
"""

import dataclasses
import json
import logging
import math
import os
import posixpath
import shutil
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch
from ray.train.torch import get_device

from davir_ray.engine.progress import ProgressCounter, WorkDone
from davir_ray.engine.trackers import Step
from davir_ray.errors import ConfigError, IntegrityError, StorageError
from davir_ray.models.checkpoint import CONFIGS, SPEC_FILE
from davir_ray.models.device import device_name, resolve_dtype, uses_autocast, weights_precision, worker_device
from davir_ray.models.training.examples import Objective
from davir_ray.models.training.loop import StepReport, Trainer
from davir_ray.models.training.model import save_reference, trainable
from davir_ray.models.training.parallel import add_checksums, from_all, replicated, sharded, together
from davir_ray.run.files import FileEntry, digest, put_folder
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import explain, storage_errors
from davir_ray.stages.finetune import Training

log = logging.getLogger(__name__)

_NUM_LOGGED = 50
"""Approximate number of steps of a training that are logged."""

_UPLOAD_S = 3600
"""Seconds that a checkpoint waits for the upload of the one before."""

_MAX_SHARE = 0.05
"""Maximum share of the time that a training stands still for checkpoints by time."""

_PART_BYTES = 2**24
"""Bytes that are uploaded between two looks whether the checkpoint is still needed."""

_MAX_CURVE_POINTS = 500
"""Maximum number of points of a loss curve in the manifest."""


def train_on_rank(training: Training, counter: ProgressCounter) -> dict[str, Any]:
    """Train to the end; rank 0 writes the model.

    Until the last step, a DavirError must be raised on every rank: if one rank stopped alone, the others would wait for
    it. So whatever may fail on a single rank, such as reading and writing, is done `together`.
    """
    config = training.config
    if not config.use_gpu:
        torch.set_num_threads(config.num_cpus)
    objective = _objective(training)
    model = _load(training)
    trainer = together(lambda: Trainer(model, objective, config))
    noted = _noted_budget(training, model)
    if together(noted.exists):
        trainer.limit_budget(int(together(noted.read_bytes)))
    if checkpoint := ray.train.get_checkpoint():
        with ExitStack() as opened:
            with storage_errors(checkpoint.path):
                state = opened.enter_context(checkpoint.as_directory())
            together(partial(_continue, trainer, Path(state), checkpoint.path))
    is_first = ray.train.get_context().get_world_rank() == 0
    checkpoints = Checkpoints(training, trainer, is_first=is_first)
    try:
        if config.use_gpu:
            trainer.fit_budget()
        _take_steps(training, trainer, counter, checkpoints, is_first=is_first)
    except torch.OutOfMemoryError:  # Ray Train starts the workers again, and they continue from the last checkpoint
        noted.write_text(str(max(1, trainer.budget // 2)))
        raise
    checkpoints.steps_are_taken = True
    files = _export(training, trainer, training.folder, is_first=is_first)  # not `together`: no step follows
    checkpoints.model_is_written = is_first
    return {
        **trainer.summary(_MAX_CURVE_POINTS),
        "num_rows": len(objective),
        "details": objective.details,
        "files": [dataclasses.asdict(entry) for entry in files],
    }


def _objective(training: Training) -> Objective:
    """The objective over one copy of the data on this node, which the node's first worker writes.

    Every worker maps the files; then they are removed, so that workers that die later leave none behind.
    """
    node = ray.get_runtime_context().get_node_id()  # Ray Train's ranks of nodes are by address, which two may share
    nodes, rank = from_all(node), ray.train.get_context().get_world_rank()
    with ExitStack() as written:
        own = together(lambda: _written(training, node, written) if nodes.index(node) == rank else None)
        folder = from_all(own)[nodes.index(node)]
        return together(lambda: training.objective(folder))


def _written(training: Training, node: str, written: ExitStack) -> Path:
    """A new folder with the training data, which is removed when `written` is closed.

    What an attempt left on this node that was killed while it wrote is removed first.
    """
    prefix = f"davir-training-{digest([str(training.run), training.name, node])[:16]}-"
    with storage_errors(os.environ.get("TMPDIR", "/tmp")):
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        # On NFS a file that is mapped cannot be removed: it goes with the last process.
        made = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        folder = Path(written.enter_context(made))
        training.write(folder)
    return folder


def _noted_budget(training: Training, model: Any) -> Location:
    """Where a worker that runs out of memory notes a smaller budget, for workers of the same kind alone."""
    device = next(model.parameters()).device
    kind = [training.name, training.config.strategy, training.config.num_workers, device_name(device)]
    return training.run / training.checkpoints / f"{digest(kind)[:16]}.tokens_per_pack"


def _load(training: Training) -> Any:
    """The base, ready to be trained, and distributed over the workers as the strategy says."""
    config = training.config
    device = worker_device("cuda" if config.use_gpu else "cpu")
    if config.use_gpu:  # else Ray Train's device is a GPU, too, wherever the machine has one (2.60)
        device = get_device()
    dtype = resolve_dtype(weights_precision(config), device)
    make = partial(trainable, training.base, config, dtype, dropout=training.dropout)
    if config.strategy != "fsdp":
        return replicated(together(partial(make, device)))
    return sharded(partial(make, torch.device("cpu")), device, autocast=uses_autocast(config.precision, device))


def _continue(trainer: Trainer, state: Path, uri: str) -> None:
    """Continue from a checkpoint of Ray Train, a copy of which is in `state`."""
    start_over = f"delete the folder {posixpath.dirname(uri)} to train from the start"
    try:
        trainer.load_state(state)
    except IntegrityError as error:
        raise IntegrityError(f"the checkpoint {uri} is damaged ({error}); {start_over}") from error
    except ConfigError as error:
        raise ConfigError(f"the checkpoint {uri} cannot be continued from: {error}, or {start_over}") from error


def _take_steps(
    training: Training, trainer: Trainer, counter: ProgressCounter, checkpoints: "Checkpoints", *, is_first: bool
) -> None:
    """Take the remaining steps; after each, export the epoch, save a checkpoint and log, when due."""
    config, before, num_tokens = training.config, trainer.step, 0
    key = training.part or "steps"
    if is_first:
        counter.begin(key)
        counter.report(key, WorkDone(0, before=before))
    for report in trainer.steps():
        is_last = report.step == report.total_steps
        num_tokens += report.num_tokens
        if is_first:
            work = WorkDone(report.step - before, tokens=num_tokens, before=before)
            counter.report(key, work, report.total_steps)
            if training.steps is not None:
                training.steps.add(Step(training.name, report.step, _tracked_values(report)))
        if config.export_epochs and report.ends_epoch:
            name = f"{training.epochs_folder or f'{training.folder}_epochs'}/{report.epoch}"
            together(partial(_export, training, trainer, name, is_first=is_first))
        if not is_last and checkpoints.is_due(report):  # after the last step the model itself is written
            checkpoints.save(report)
        if is_first and (is_last or report.step % max(1, report.total_steps // _NUM_LOGGED) == 0):
            log.info(
                "%s: step %d of %d, epoch %d, %s, %.0f tokens/s",
                f"{training.stage} {training.part}".strip(), report.step, report.total_steps, report.epoch,
                ", ".join(f"{name} {value:.4f}" for name, value in report.measures.items()), report.tokens_per_second,
            )  # fmt: skip


def _tracked_values(report: StepReport) -> dict[str, float]:
    """What a tracker shows of a step."""
    names = ("learning_rate", "grad_norm", "tokens_per_second")
    values = report.measures | {name: getattr(report, name) for name in names}
    return {f"train/{name}": value for name, value in values.items()}


class Checkpoints:
    """The checkpoints of a training, which Ray Train keeps; every rank has one, and they are saved on all at once."""

    def __init__(self, training: Training, trainer: Trainer, *, is_first: bool) -> None:
        self._training = training
        self._trainer = trainer
        self._is_first = is_first
        self._last = time.monotonic()
        self._last_s = 0.0
        """Seconds that training stood still for the last one."""
        self._idle = threading.Event()
        """Set unless an upload of this rank goes on."""
        self._idle.set()
        self._given_up = False
        """An upload failed after the last step."""
        self.steps_are_taken = False
        """No step follows: an upload that fails is no reason to train again."""
        self.model_is_written = False
        """No checkpoint is needed: an upload that goes on is given up."""

    def is_due(self, report: StepReport) -> bool:
        """Whether to save after this step: the same on every rank, by the clock of rank 0.

        By time, or at the end of an epoch if a minute of training would be lost; by time never before the last upload
        has ended, nor so often that the saving takes a twentieth of the time.
        """
        config = self._training.config
        if config.checkpoint_every_steps and report.step % config.checkpoint_every_steps == 0:
            return True
        if config.checkpoint_every_minutes is None:
            return False
        seconds = 60 * min(config.checkpoint_every_minutes, 1 if report.ends_epoch else math.inf)
        seconds = max(seconds, self._last_s / _MAX_SHARE)
        late = time.monotonic() - self._last > seconds or not self._is_first
        return self._trainer.agreed(late and self._idle.is_set())

    def save(self, report: StepReport) -> None:
        """Write the state to a local folder, and upload it while training goes on."""
        self._idle.wait(_UPLOAD_S)  # else the uploads to a slow store would fill the disk
        started = time.monotonic()
        self._save(report)
        self._last = time.monotonic()
        self._last_s = self._last - started

    def _save(self, report: StepReport) -> None:
        metrics = dataclasses.asdict(report)
        if not (self._is_first or self._trainer.every_rank_saves):
            ray.train.report(metrics, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
            return
        folder = tempfile.mkdtemp(prefix=f"davir-{self._training.name}-")
        with ExitStack() as failed:
            failed.callback(shutil.rmtree, folder, ignore_errors=True)
            with storage_errors(folder):
                self._trainer.save_state(Path(folder))
            self._idle.clear()
            with storage_errors(self._training.run / self._training.checkpoints):
                ray.train.report(
                    metrics,
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                    checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
                    checkpoint_upload_fn=self._upload,
                    delete_local_checkpoint_after_upload=False,
                )
            failed.pop_all()  # the upload deletes it

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Add the checksums, upload and delete the local folder; called in a thread.

        Raises StorageError, which ends the worker; or SystemExit, which ends the upload alone, where the checkpoint is
        not needed: Ray Train (2.60) passes on what is an Exception.
        """
        storage = ray.train.get_context().get_storage()
        filesystem, target = storage.storage_filesystem, storage.build_checkpoint_path_from_name(name)
        try:
            self._end_if_not_needed()
            with storage_errors(checkpoint.path):
                add_checksums(Path(checkpoint.path))
            with storage_errors(self._training.run / self._training.checkpoints):
                filesystem.create_dir(target, recursive=False)  # Ray Train's folder exists on every node
                for file in sorted(Path(checkpoint.path).iterdir()):
                    self._copy(file, filesystem, f"{target}/{file.name}")
        except StorageError as error:
            if not self.steps_are_taken:
                raise
            place = self._training.run / self._training.checkpoints
            log.warning("the last checkpoint in %s was not written; training ends without: %s", place, explain(error))
            self._given_up = True
            raise SystemExit from error
        finally:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
            self._idle.set()
        return ray.train.Checkpoint(target, filesystem)

    def _end_if_not_needed(self) -> None:
        """Raise SystemExit if the model is written, or an earlier upload was given up, which Ray Train counts."""
        if self.model_is_written or self._given_up:
            raise SystemExit

    def _copy(self, file: Path, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
        """Copy a file to the store; SystemExit as soon as the model is written."""
        with file.open("rb") as source, filesystem.open_output_stream(path) as copy:
            while part := source.read(_PART_BYTES):
                self._end_if_not_needed()
                copy.write(part)


def _export(training: Training, trainer: Trainer, name: str, *, is_first: bool) -> list[FileEntry]:
    """Write the model as a Hugging Face folder in the run, completely or not at all; returns its files.

    Called on every rank, because sharded weights must be gathered; rank 0 writes.
    """
    weights = trainer.gathered_weights()
    if not is_first:
        return []
    with tempfile.TemporaryDirectory() as folder:
        with storage_errors(folder):
            save_reference(trainer.likelihood, training.base.tokenizer(), Path(folder), weights)
            Path(folder, SPEC_FILE).write_text(json.dumps(training.spec, indent=1))
        return put_folder(training.run / name, Path(folder), last=CONFIGS)
