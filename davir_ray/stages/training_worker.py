"""One worker of a training: it loads the base, takes the steps of models/training/loop.py and exports the model.

It continues from a checkpoint if there is one.
"""

import dataclasses
import json
import logging
import posixpath
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device

from davir_ray.engine.progress import ProgressCounter, WorkDone
from davir_ray.engine.trackers import Step
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.models.checkpoint import CONFIGS, SPEC_FILE
from davir_ray.models.device import resolve_dtype, uses_autocast, weights_precision, worker_device
from davir_ray.models.training.loop import StepReport, Trainer
from davir_ray.models.training.model import save_reference, trainable
from davir_ray.models.training.parallel import replicated, sharded, together
from davir_ray.run.files import FileEntry, put_folder
from davir_ray.run.storage_errors import storage_errors
from davir_ray.stages.finetune import Training

log = logging.getLogger(__name__)

_NUM_LOGGED = 50
"""Approximate number of steps of a training that are logged."""

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
    objective = together(training.objective)
    model = _load(training)
    trainer = together(lambda: Trainer(model, objective, config))
    if checkpoint := ray.train.get_checkpoint():
        with ExitStack() as opened:
            with storage_errors(checkpoint.path):
                state = opened.enter_context(checkpoint.as_directory())
            together(partial(_continue, trainer, Path(state), checkpoint.path))
    is_first = ray.train.get_context().get_world_rank() == 0
    _take_steps(training, trainer, counter, is_first=is_first)
    files = _export(training, trainer, training.folder, is_first=is_first)  # not `together`: no step follows
    return {
        **trainer.summary(_MAX_CURVE_POINTS),
        "num_rows": len(objective),
        "details": objective.details,
        "files": [dataclasses.asdict(entry) for entry in files],
    }


def _load(training: Training) -> Any:
    """The base, ready to be trained, and distributed over the workers as the strategy says."""
    config = training.config
    # Ray Train's device is a GPU wherever the machine has one, also for a worker that was given none (2.60).
    device = get_device() if config.use_gpu and worker_device("cuda") else torch.device("cpu")
    dtype = resolve_dtype(weights_precision(config), device)
    make = partial(trainable, training.base, config, dtype, dropout=training.dropout)
    if config.strategy == "ddp":
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


def _take_steps(training: Training, trainer: Trainer, counter: ProgressCounter, *, is_first: bool) -> None:
    """Take the remaining steps; after each, export the epoch, save a checkpoint and log, when due."""
    config, before, num_tokens = training.config, trainer.step, 0
    if is_first:
        counter.begin("steps")
        counter.report("steps", WorkDone(0, before=before))
    for report in trainer.steps():
        is_last = report.step == report.total_steps
        num_tokens += report.num_tokens
        if is_first:
            work = WorkDone(report.step - before, tokens=num_tokens, before=before)
            counter.report("steps", work, report.total_steps)
            if training.steps is not None:
                training.steps.add(Step(training.name, report.step, _tracked_values(report)))
        if config.export_epochs and report.ends_epoch:
            name = f"{training.folder}_epochs/{report.epoch}"
            together(partial(_export, training, trainer, name, is_first=is_first))
        if is_last or report.step % config.checkpoint_every_steps == 0:
            _save_checkpoint(training, trainer, report, is_first=is_first)
        if is_first and (is_last or report.step % max(1, report.total_steps // _NUM_LOGGED) == 0):
            log.info(
                "%s: step %d of %d, epoch %d, %s, %.0f tokens/s",
                training.stage, report.step, report.total_steps, report.epoch,
                ", ".join(f"{name} {value:.4f}" for name, value in report.measures.items()), report.tokens_per_second,
            )  # fmt: skip


def _tracked_values(report: StepReport) -> dict[str, float]:
    """What a tracker shows of a step."""
    names = ("learning_rate", "grad_norm", "tokens_per_second")
    values = report.measures | {name: getattr(report, name) for name in names}
    return {f"train/{name}": value for name, value in values.items()}


def _save_checkpoint(training: Training, trainer: Trainer, report: StepReport, *, is_first: bool) -> None:
    """Report a checkpoint to Ray Train, which waits for all ranks: they must call this at the same steps."""
    metrics = dataclasses.asdict(report)
    if not (is_first or trainer.every_rank_saves):
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        with storage_errors(folder):
            trainer.save_state(Path(folder))
        with storage_errors(training.run / "checkpoints"):
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


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
