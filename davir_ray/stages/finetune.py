"""finetune: examples → reference. `train` trains on any objective; preference training uses it, too.

The driver decides whether there is anything to do, starts the workers and commits the model. What a worker does is in
training_worker.py.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.progress import ProgressCounter, tracked
from davir_ray.engine.ray_train import run_on_workers
from davir_ray.engine.tracking import StepLog
from davir_ray.errors import UserError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.examples import TRAINING_COLUMNS, Objective, TrainingSet, write_examples
from davir_ray.run.files import FileEntry, digest, in_folder, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location, each_in_turn
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress
from davir_ray.stages.training_plan import plan_training
from davir_ray.versions import NUMERICS_VERSION

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of a run for what unfinished trainings need."""

_NOT_CONTENT = (
    "tokens_per_pack",
    "gradient_checkpointing",
    "num_workers",
    "strategy",
    "num_cpus",
    "use_gpu",
    "checkpoint_every_minutes",
    "checkpoint_every_steps",
    "max_failures",
)
"""Settings that change how the reference is computed, but not the result, except for rounding."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training: the model, the data, the recipe and where the result is written; every worker gets a copy."""

    stage: str
    run: Run
    base: Checkpoint
    config: FinetuneConfig
    write: Callable[[Path], None]
    """Writes the training data to a local folder; called by one worker of each node."""
    objective: Callable[[Path], Objective]
    """Maps the data of such a folder; called in each worker."""
    spec: dict[str, Any]
    """The scoring spec that is saved with the model."""
    folder: str
    """Folder of the run that the model is written to."""
    dropout: bool = True
    """Whether the base keeps its dropout, if it has any."""
    steps: StepLog | None = None
    """Where rank 0 reports its steps for tracking."""
    checkpoints: str = CHECKPOINTS
    """Folder of the run for what an unfinished training needs."""
    epochs_folder: str | None = None
    """Folder of the run with the models after each epoch. None: that of the model, with `_epochs`."""
    part: str = ""
    """Tells the trainings of one stage apart in logs and progress, such as `fold 1`."""
    name: str = ""
    """Digest of all that the result depends on; given by `train`."""


def finetune(
    run: Run,
    base: Checkpoint,
    config: FinetuneConfig,
    spec: dict[str, Any],
    *,
    examples: Run | None = None,
    steps: StepLog | None = None,
) -> Manifest:
    """Fine-tune the base on every prepared example; writes reference/, a Hugging Face folder with its scoring spec.

    `examples` is the run that holds the examples; None: this one. The steps are reported to `steps`.
    """
    holder = examples or run
    prepared = holder.require("prepare")
    shards = [entry.name for entry in prepared.files_in("examples")]
    training = Training(
        stage="finetune",
        run=run,
        base=base,
        config=config,
        write=partial(write_shards_of, holder / "examples", shards),
        objective=TrainingSet.mapped,
        spec=spec,
        folder="reference",
        steps=steps,
    )
    fingerprint = {"base": base.weights_digest(), "examples": prepared.content, **recipe_of(config)}
    return train(training, fingerprint, "examples", rejects=prepared.counts["rejected"])


def write_shards_of(examples: Location, shards: list[str], folder: Path) -> None:
    """Write the training data of these shards of examples to a local folder."""
    write_examples(folder, each_in_turn(lambda name: read_parquet(examples / name, TRAINING_COLUMNS), shards))


def recipe_of(config: FinetuneConfig) -> dict[str, Any]:
    """What a trained model depends on apart from the base and the data, for a fingerprint."""
    return {"recipe": what_matters(config), "numerics": NUMERICS_VERSION}


def what_matters(config: FinetuneConfig) -> dict[str, Any]:
    """Settings that the reference depends on."""
    return {name: value for name, value in asdict(config).items() if name not in _NOT_CONTENT}


def train(training: Training, fingerprint: dict[str, Any], unit: str, *, rejects: int) -> Manifest:
    """Train on an objective and commit the model, unless that is already done; `unit` names its rows.

    A training that an earlier attempt began is continued.
    """

    def work() -> Manifest:
        with tracked(training.run, Progress(stage=training.stage, unit="steps", rejects=rejects)) as counter:
            return run_training(training, fingerprint, unit, counter)

    return train_once(training.run, training.stage, fingerprint, work)


def train_once(run: Run, stage: str, fingerprint: dict[str, Any], work: Callable[[], Manifest]) -> Manifest:
    """Commit the manifest that `work` returns, unless the stage is complete; checkpoints are kept until then."""
    checkpoints = run / CHECKPOINTS
    if done := run.completed(stage, fingerprint):
        checkpoints.remove()  # left behind if the driver died just after writing the manifest
        return done
    if not run.continues_attempt(stage, CHECKPOINTS, fingerprint):
        checkpoints.remove()
    run.note_attempt(CHECKPOINTS, fingerprint)
    try:
        manifest = work()
    except UserError:
        run.note_attempt(CHECKPOINTS, fingerprint, binding=False)  # the error asks for other settings
        raise
    manifest = run.commit(manifest)
    # Checkpoints have three times the model's size, and only an unfinished training needs them.
    checkpoints.remove()
    return manifest


def run_training(training: Training, fingerprint: dict[str, Any], unit: str, counter: ProgressCounter) -> Manifest:
    """Train on Ray Train's workers, by a plan for this cluster; returns the manifest, which is not committed yet."""
    started, checkpoints = time.monotonic(), training.run / training.checkpoints
    # The name is also that of Ray Train's folder: the same training continues, another one starts over.
    name = digest(fingerprint)[:16]
    config = planned(training, checkpoints, name)
    work = partial(_train_on_rank, replace(training, name=name, config=config), counter)
    result = run_on_workers(work, config, checkpoints, name)
    curves = result["by_step"]
    return Manifest(
        stage=training.stage,
        fingerprint=fingerprint,
        counts={unit: result["num_rows"], "steps": result["step"]},
        files=in_folder(training.folder, [FileEntry(**entry) for entry in result["files"]]),
        details={
            "loss_by_step": curves.pop("loss"),
            "final_loss": result["loss"],
            "workers": config.num_workers,
            "strategy": config.strategy,
            "gradient_checkpointing": config.gradient_checkpointing,
            **({"measures_by_step": curves} if curves else {}),
            **result["details"],
        },
        seconds=time.monotonic() - started,
    )


def planned(training: Training, checkpoints: Location, name: str) -> FinetuneConfig:
    """The settings of the plan. Unless it is given, the strategy is that which this training began with, as noted:
    checkpoints of another could not be continued from, and the cluster may be another now.
    """
    config, noted = training.config, checkpoints / f"{name}.strategy"
    has_begun = (checkpoints / name).exists()  # a plan whose workers did not fit the cluster binds no other
    if config.strategy is None and has_begun and noted.exists():
        config = replace(config, strategy="fsdp" if noted.read_text() == "fsdp" else "ddp")
    config = plan_training(training.base, config).config
    noted.write_text(str(config.strategy))
    return config


def _train_on_rank(training: Training, counter: ProgressCounter) -> dict[str, Any]:
    """`train_on_rank`, imported by the worker alone: torch's code for training takes seconds, which no driver waits."""
    from davir_ray.stages.training_worker import train_on_rank

    return train_on_rank(training, counter)
