"""finetune with folds: a reference for each fold, trained on the rows of all others.

The references are trained side by side, as many as the cluster has room for, and each is continued by itself.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.data

from davir_ray.config.run import Tracker
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.connect import whole_block_context
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.progress import ProgressCounter, tracked
from davir_ray.engine.ray_train import room_for_workers, trains_on_gpus
from davir_ray.engine.tasks import call, results_of
from davir_ray.engine.tracking import Tracking
from davir_ray.errors import DavirError, UserError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.examples import TrainingSet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.progress import Progress
from davir_ray.stages.finetune import Training, recipe_of, run_training, write_shards_of
from davir_ray.stages.folds import REFERENCES, Folds

log = logging.getLogger(__name__)

_CANCEL_S = 30
"""Seconds that a cancelled training may take to stop."""


def finetune_folds(
    run: Run,
    base: Checkpoint,
    config: FinetuneConfig,
    spec: dict[str, Any],
    folds: Folds,
    *,
    track: Tracker | None = None,
) -> Manifest:
    """Fine-tune the base once for each fold, on the examples outside of it; writes reference_folds/<fold>/.

    With a tracker, each training has a tracking run of its own.
    """
    started, prepared, checkpoints = time.monotonic(), run.require("prepare"), run / "checkpoints"
    fingerprint = {
        "base": base.weights_digest(), "examples": prepared.content, "folds": folds.num_folds, **recipe_of(config)
    }  # fmt: skip
    if done := run.completed("finetune", fingerprint):
        checkpoints.remove()  # left behind if the driver died just after writing the manifest
        return done
    if not run.continues_attempt("finetune", "checkpoints", fingerprint):
        checkpoints.remove()
    run.note_attempt("checkpoints", fingerprint)
    config, at_once = _share(config, folds.num_folds)
    log.info("finetune: %d references, each of the rows outside one fold, %d at a time", folds.num_folds, at_once)
    pending = [
        FoldTraining(
            fold=fold,
            training=Training(
                stage="finetune",
                run=run,
                base=base,
                config=config,
                write=partial(
                    write_shards_of, run / "examples", [entry.name for entry in folds.files_outside(prepared, fold)]
                ),
                objective=TrainingSet.mapped,
                spec=spec,
                folder=f"{REFERENCES}/{fold}",
                checkpoints=f"checkpoints/{fold}",
                part=f"fold {fold}",
            ),
            fingerprint={**fingerprint, "fold": fold},
        )
        for fold in range(folds.num_folds)
    ]
    try:
        with tracked(run, Progress(stage="finetune", unit="steps", rejects=prepared.counts["rejected"])) as counter:
            trained = _side_by_side(pending, counter, at_once, track)
    except UserError:
        run.note_attempt("checkpoints", fingerprint, binding=False)  # the error asks for other settings
        raise
    counts = Counter[str]({"references": len(trained)})
    for manifest in trained:
        counts.update(manifest.counts)
    manifest = run.commit(
        Manifest(
            stage="finetune",
            fingerprint=fingerprint,
            counts=dict(counts),
            files=[entry for manifest in trained for entry in manifest.files],
            details={**trained[0].details, "by_fold": [manifest.details for manifest in trained]},
            seconds=time.monotonic() - started,
        )
    )
    checkpoints.remove()
    return manifest


def _share(config: FinetuneConfig, num_folds: int) -> tuple[FinetuneConfig, int]:
    """The settings of each training, and how many run at a time: on GPUs each gets an equal share, at least one."""
    use_gpu = trains_on_gpus(config)
    room = room_for_workers(config.num_cpus, use_gpu=use_gpu)
    num_workers = config.num_workers or (max(1, room // num_folds) if use_gpu else 1)
    return replace(config, use_gpu=use_gpu, num_workers=num_workers), max(1, min(num_folds, room // num_workers))


@dataclass(frozen=True, kw_only=True)
class FoldTraining:
    """The training of the reference of one fold."""

    fold: int
    training: Training
    fingerprint: dict[str, Any]

    def __call__(self, counter: ProgressCounter) -> Manifest:
        """Train, in a task that waits for Ray Train's workers; notes the manifest where a later driver finds it."""
        configure_worker_logging()
        training, folder = self.training, self.training.run / self.training.checkpoints
        try:
            manifest = run_training(training, self.fingerprint, "examples", counter)
        except DavirError as error:
            raise type(error)(f"the reference of {training.part}: {error}") from error
        folder.remove()  # the checkpoints, which have three times the model's size
        manifest.write(folder)
        return manifest

    def finished(self) -> Manifest | None:
        """The manifest of an earlier attempt that finished, if its model is unchanged."""
        training = self.training
        manifest = Manifest.read(training.run / training.checkpoints, training.stage)
        if manifest is None or differences(manifest.fingerprint, self.fingerprint):
            return None
        if damage := manifest.damage(training.run.folder):
            log.warning("the reference of %s is trained again: %s", training.part, damage[0])
            return None
        return manifest


def _side_by_side(
    trainings: Sequence[FoldTraining], counter: ProgressCounter, at_once: int, track: Tracker | None
) -> list[Manifest]:
    """The manifests of all trainings, in their order; those that are not finished are run, `at_once` at a time."""
    manifests = {each.fold: manifest for each in trainings if (manifest := each.finished())}
    if manifests:
        log.info("finetune: %d of %d references are there already", len(manifests), len(trainings))
    refs: list[Any] = []
    open_tracking: dict[int, Tracking] = {}

    def started() -> Iterator[Any]:
        for each in trainings:
            if each.fold not in manifests:
                run = each.training.run.within(f"tracking_folds/{each.fold}") if track else each.training.run
                tracking = open_tracking[each.fold] = Tracking(run, track, each.training.part)
                work = replace(each, training=replace(each.training, steps=tracking.steps))
                # A training's own task waits for its workers, and needs no CPU.
                refs.append(call.options(num_cpus=0).remote(train_fold, work, counter))
                yield refs[-1]

    failed = True
    try:
        # A training may take longer than a task may that makes no progress.
        with ray.data.DataContext.current(whole_block_context(0)), closing(results_of(started(), at_once)) as results:
            for fold, manifest in results:
                manifests[fold] = manifest
                open_tracking.pop(fold).close(failed=False)
                done = len(manifests)
                log.info("finetune: the reference of fold %d is trained (%d of %d)", fold, done, len(trainings))
        failed = False
    finally:
        if failed and refs:  # none may write once the lease is released
            ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_S)
        for tracking in open_tracking.values():
            tracking.close(failed=True)
    return [manifests[each.fold] for each in trainings]


def train_fold(training: FoldTraining, counter: ProgressCounter) -> tuple[int, Manifest]:
    """The task of a training; returns its fold and its manifest."""
    return training.fold, training(counter)
