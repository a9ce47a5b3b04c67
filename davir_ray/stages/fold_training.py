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

from davir_ray.config.run import Tracker
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.progress import ProgressCounter, WorkDone, tracked
from davir_ray.engine.tasks import call, results_of
from davir_ray.engine.tracking import Tracking
from davir_ray.errors import DavirError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.examples import TrainingSet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.progress import Progress
from davir_ray.stages.finetune import CHECKPOINTS, Training, recipe_of, run_training, train_once, write_shards_of
from davir_ray.stages.folds import REFERENCES, Folds
from davir_ray.stages.training_plan import share_plan

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
    prepared = run.require("prepare")
    fingerprint = {
        "base": base.weights_digest(), "examples": prepared.content, "folds": folds.num_folds, **recipe_of(config)
    }  # fmt: skip
    trainings = [
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
                checkpoints=f"{CHECKPOINTS}/{fold}",
                epochs_folder=f"{REFERENCES}_epochs/{fold}",
                part=f"fold {fold}",
            ),
            fingerprint={**fingerprint, "fold": fold},
        )
        for fold in range(folds.num_folds)
    ]

    def work() -> Manifest:
        started, start = time.monotonic(), Progress(stage="finetune", unit="steps", rejects=prepared.counts["rejected"])
        with tracked(run, start, num_parts=folds.num_folds) as counter:
            trained = _side_by_side(trainings, counter, track)
        counts = Counter[str]({"references": len(trained)})
        for manifest in trained:
            counts.update(manifest.counts)
        return Manifest(
            stage="finetune",
            fingerprint=fingerprint,
            counts=dict(counts),
            files=[entry for manifest in trained for entry in manifest.files],
            details={"by_fold": [manifest.details for manifest in trained]},
            seconds=time.monotonic() - started,
        )

    return train_once(run, "finetune", fingerprint, work)


@dataclass(frozen=True, kw_only=True)
class FoldTraining:
    """The training of the reference of one fold."""

    fold: int
    training: Training
    fingerprint: dict[str, Any]

    def __call__(self, counter: ProgressCounter) -> Manifest:
        """Train, in a task that waits for Ray Train's workers, unless that is done; returns the manifest."""
        configure_worker_logging()
        if done := self.finished():  # before this task's worker was lost
            return done
        training = self.training
        try:
            manifest = run_training(training, self.fingerprint, "examples", counter)
        except DavirError as error:
            raise type(error)(f"the reference of {training.part}: {error}") from error
        manifest = manifest.marked(training.run.folder)
        manifest.write(self._noted)
        (training.run / training.checkpoints).remove()
        return manifest

    def finished(self) -> Manifest | None:
        """The manifest of an earlier attempt that finished, if its model is unchanged."""
        training = self.training
        manifest = Manifest.read(self._noted, training.stage)
        if manifest is None or differences(manifest.fingerprint, self.fingerprint):
            return None
        if damage := manifest.damage(training.run.folder):
            log.warning("the reference of %s is trained again: %s", training.part, damage[0])
            return None
        return manifest

    @property
    def _noted(self) -> Location:
        """Where the manifest is until the references of all folds are trained."""
        return self.training.run / CHECKPOINTS / "trained" / str(self.fold)


def _side_by_side(trainings: Sequence[FoldTraining], counter: ProgressCounter, track: Tracker | None) -> list[Manifest]:
    """The manifests of all trainings, in their order; those that are not finished run side by side."""
    manifests = {each.fold: manifest for each in trainings if (manifest := each.finished())}
    for fold, manifest in manifests.items():
        steps = manifest.counts["steps"]
        counter.report(f"fold {fold}", WorkDone(0, before=steps), steps)
    pending = [each for each in trainings if each.fold not in manifests]
    config, at_once = share_plan(trainings[0].training.base, trainings[0].training.config, max(1, len(pending)))
    log.info(
        "finetune: %d references to train, each on the rows outside one fold, %d done, %d at a time (%d workers of %d "
        "CPUs each)", len(pending), len(manifests), at_once, config.num_workers or 1, config.num_cpus,
    )  # fmt: skip
    refs: list[Any] = []
    open_tracking: dict[int, Tracking] = {}

    def started() -> Iterator[Any]:
        for each in pending:
            training = each.training
            run = training.run.within(f"tracking_folds/{each.fold}") if track else training.run
            tracking = Tracking(run, track, f"{training.run.folder.name} {training.part}")
            open_tracking[each.fold] = tracking
            work = replace(each, training=replace(training, config=config, steps=tracking.steps))
            # A training's own task waits for its workers, and needs no CPU.
            refs.append(call.options(num_cpus=0).remote(train_fold, work, counter))
            yield refs[-1]

    try:
        with closing(results_of(started(), at_once, limit_s=0)) as results:
            for fold, manifest in results:
                manifests[fold] = manifest
                open_tracking.pop(fold).close(failed=False)
                log.info("finetune: the reference of fold %d is trained", fold)
    finally:
        if refs:  # after an error none may write once the lease is released
            ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_S)
        for tracking in open_tracking.values():
            tracking.close(failed=True)
    return [manifests[each.fold] for each in trainings]


def train_fold(training: FoldTraining, counter: ProgressCounter) -> tuple[int, Manifest]:
    """The task of a training; returns its fold and its manifest."""
    return training.fold, training(counter)
