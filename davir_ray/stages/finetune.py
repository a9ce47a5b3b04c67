"""finetune: examples → reference; and the training of any objective: Ray Train runs the loop of models/finetune.py."""

import dataclasses
import json
import logging
import posixpath
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device, prepare_model

from davir_ray import errors
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.connect import has_gpu, own_errors, own_interrupts
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.progress import Tally, Told, tallied
from davir_ray.errors import ClusterError, ConfigError, DavirError, IntegrityError, StorageError, UserError
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import (
    CONFIGS,
    SPEC_FILE,
    Checkpoint,
    resolve_dtype,
    uses_autocast,
    weights_precision,
)
from davir_ray.models.kernel.likelihood import NUMERICS_VERSION, Likelihood
from davir_ray.models.kernel.self_check import self_check
from davir_ray.models.training.examples import TRAINING_COLUMNS, Objective, TrainingSet
from davir_ray.models.training.loop import (
    StepReport,
    Trainer,
    freeze_what_text_does_not_reach,
    save_reference,
    switch_off_dropout,
)
from davir_ray.models.training.parallel import sharded, together
from davir_ray.run.files import FileEntry, digest, in_folder, put_folder, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location, each
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress
from davir_ray.run.storage_errors import storage_errors

log = logging.getLogger(__name__)

_OUTCOME = "outcome.json"
"""In checkpoints/: the last metrics, or the error that ended training. An error that is ours is not raised in a worker:
Ray Train would take it for a lost worker and train again."""

_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints."""

_MOST_REPORTS = 50
_MOST_CURVE_POINTS = 500

_NOT_CONTENT = (
    "tokens_per_pack",
    "gradient_checkpointing",
    "num_workers",
    "strategy",
    "num_cpus",
    "use_gpu",
    "checkpoint_every_steps",
    "max_failures",
)
"""Settings that change how the reference is computed but not, beyond rounding, what it is."""


@dataclass(frozen=True)
class Training:
    """What a worker needs to know."""

    stage: str
    run: Run
    base: Checkpoint
    config: FinetuneConfig
    objective: Callable[[], Objective]
    """Reads what is trained on; called in each worker."""
    spec: dict[str, Any]
    folder: str
    """Of the run, where the model goes."""
    dropout: bool = True
    """The base's own, where it has any."""


def finetune(
    run: Run,
    base: Checkpoint,
    config: FinetuneConfig,
    spec: dict[str, Any],
    *,
    examples: Run | None = None,
) -> Manifest:
    """Fine-tune the base on every prepared example; writes reference/, a Hugging Face folder with its scoring spec.

    `examples` is the run that holds the examples; None: this one.
    """
    holder = examples or run
    prepared = holder.require("prepare")
    shards = [entry.name for entry in prepared.files_in("examples")]
    training = Training(
        "finetune", run, base, config, partial(_read_examples, holder / "examples", shards), spec, "reference"
    )
    fingerprint = {"base": base.weights_digest(), "examples": prepared.content, **recipe_of(config)}
    return train(training, fingerprint, "examples", rejects=prepared.counts["rejected"])


def _read_examples(folder: Location, shards: list[str]) -> TrainingSet:
    return TrainingSet.of(each(lambda name: read_parquet(folder / name, TRAINING_COLUMNS), shards))


def train(training: Training, fingerprint: dict[str, Any], unit: str, *, rejects: int) -> Manifest:
    """Train on an objective, whose rows are called `unit`: to the end of what an earlier attempt began, or skipped."""
    started = time.monotonic()
    run, stage, checkpoints = training.run, training.stage, training.run / "checkpoints"
    if done := run.completed(stage, fingerprint):
        checkpoints.remove()  # left where the driver died just after the manifest
        return done
    if not run.continues_attempt(stage, "checkpoints", fingerprint):
        checkpoints.remove()
    run.note_attempt("checkpoints", fingerprint)
    try:
        with tallied(run, Progress(stage=stage, unit="steps", rejects=rejects)) as tally:
            metrics = _fit(training, tally, name=digest(fingerprint)[:16])
    except UserError:
        run.note_attempt("checkpoints", fingerprint, binding=False)  # the user is told to change the settings
        raise
    curves = metrics["by_step"]
    manifest = Manifest(
        stage=stage,
        fingerprint=fingerprint,
        counts={unit: metrics["num_rows"], "steps": metrics["step"]},
        files=in_folder(training.folder, [FileEntry(**entry) for entry in metrics["files"]]),
        details={
            "loss_by_step": curves.pop("loss"),
            "final_loss": metrics["loss"],
            "workers": training.config.num_workers,
            **({"measures_by_step": curves} if curves else {}),
            **metrics["details"],
        },
        seconds=time.monotonic() - started,
    )
    manifest = run.commit(manifest)
    # They are three times the model's size, and serve only a training that was not finished.
    checkpoints.remove()
    return manifest


def recipe_of(config: FinetuneConfig) -> dict[str, Any]:
    """What a trained model depends on beside the base and the data, for a fingerprint."""
    return {"recipe": what_matters(config), "numerics": NUMERICS_VERSION}


def what_matters(config: FinetuneConfig) -> dict[str, Any]:
    """Settings that the reference depends on."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_CONTENT}


def _fit(training: Training, tally: Tally, name: str) -> dict[str, Any]:
    """Run Ray Train. The fingerprint names its folder: the same fine-tune continues by itself, another starts anew."""
    config = training.config
    use_gpu = trains_on_gpus(config)
    check_workers(config)
    storage = training.run / "checkpoints"
    if storage.is_local:
        with storage_errors(storage):
            Path(storage.path).mkdir(parents=True, exist_ok=True)
    _remove_torn_state(storage / name)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"training": training, "tally": tally},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.num_cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else _arrow_filesystem(storage),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        with own_errors(), own_interrupts():
            trainer.fit()
    except ray.train.ControllerError as error:  # which keeps Ray Train's list of checkpoints in the run
        failure = error.controller_failure
        if isinstance(failure, TimeoutError | ConnectionError):  # the cluster's; a store's are of classes of their own
            raise
        with storage_errors(storage):
            raise failure from error
    outcome = json.loads((training.run / "checkpoints" / _OUTCOME).read_bytes())
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    return dict(outcome)


def _remove_torn_state(folder: Location) -> None:
    """Clear what Ray Train cannot continue from: it writes its list of checkpoints in place (2.60), so a driver that
    dies there leaves half of it, and every later start would fail.
    """
    try:
        listed = json.loads((folder / _SNAPSHOT).read_bytes())
        results = listed["checkpoint_results"]
        whole = all((folder / result["checkpoint_dir_name"]).exists() for result in results)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("%s was left half-written by a driver that died; training starts anew", folder)
        folder.remove()


def _arrow_filesystem(place: Location) -> pyarrow.fs.FileSystem:
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(place.fs))


def trains_on_gpus(config: FinetuneConfig) -> bool:
    """Whether each worker has a GPU."""
    return has_gpu() if config.use_gpu is None else config.use_gpu


def check_workers(config: FinetuneConfig) -> None:
    """ClusterError if the cluster cannot hold the workers."""
    use_gpu = trains_on_gpus(config)
    resources = ray.cluster_resources()
    for name, wanted in {"CPU": config.num_cpus, "GPU": 1 if use_gpu else 0}.items():
        if wanted * config.num_workers > resources.get(name, 0):
            smaller = "--finetune.num_cpus" if name == "CPU" else "give --finetune.use_gpu false"
            raise ClusterError(
                f"{config.num_workers} training workers of {wanted} {name} do not fit a cluster of "
                f"{resources.get(name, 0):g}; lower --finetune.num_workers or {smaller}"
            )


def _train_worker(settings: dict[str, Any]) -> None:
    """Runs on every worker; rank 0 leaves the outcome where the driver finds it."""
    configure_worker_logging()
    training: Training = settings["training"]
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, training.config.num_cpus))
    is_first = ray.train.get_context().get_world_rank() == 0
    try:
        outcome = _train(training, settings["tally"], is_first)
    except StorageError:  # of one rank, perhaps: Ray Train ends the others, and begins again as often as it may
        raise
    except DavirError as error:  # of the model, a checkpoint or the loss, the same on every rank: all of them end here
        outcome = {"error": type(error).__name__, "message": str(error)}
    if is_first:
        (training.run / "checkpoints" / _OUTCOME).write_text(json.dumps(outcome))


def _train(training: Training, tally: Tally, is_first: bool) -> dict[str, Any]:
    """Train to the end; rank 0 writes the model.

    An error of ours must be every rank's, as long as they have steps before them: a rank that ends with one that it met
    alone leaves the others waiting. So what may fail on one of them, as reading and writing do, is done `together`.
    """
    objective = together(training.objective)
    model = _load(training)
    trainer = together(lambda: Trainer(model, objective, training.config))
    if checkpoint := ray.train.get_checkpoint():
        with ExitStack() as opened:
            with storage_errors(checkpoint.path):
                state = opened.enter_context(checkpoint.as_directory())
            together(partial(_continue, trainer, Path(state), checkpoint.path))
    trainer.train(_Reporter(training, tally, trainer, is_first=is_first))
    files = _export(training, trainer, training.folder, is_first=is_first)  # for which nobody waits
    facts = {"num_rows": len(objective), "details": objective.details}
    return {**trainer.summary(_MOST_CURVE_POINTS), **facts, "files": [dataclasses.asdict(entry) for entry in files]}


def _continue(trainer: Trainer, state: Path, told_as: str) -> None:
    anew = f"delete the folder {posixpath.dirname(told_as)} to train from the start"
    try:
        trainer.load_state(state)
    except IntegrityError as error:
        raise IntegrityError(f"the checkpoint {told_as} is damaged ({error}); {anew}") from error
    except ConfigError as error:
        raise ConfigError(f"the checkpoint {told_as} cannot be continued from: {error}, or {anew}") from error


def _load(training: Training) -> Any:
    """The base, ready to be trained, and spread over the workers as the strategy says."""
    config, device = training.config, get_device()
    dtype = resolve_dtype(weights_precision(config), device)
    if config.strategy == "ddp":
        return prepare_model(together(partial(_make, training, dtype, device)))
    make = partial(_make, training, dtype, torch.device("cpu"))
    return sharded(make, device, autocast=uses_autocast(config.precision, device))


def _make(training: Training, dtype: torch.dtype, device: torch.device) -> Likelihood:
    """The base, checked, with its adapter if it gets one, and frozen where text does not reach."""
    likelihood = Likelihood(training.base.model(dtype, device))
    self_check(likelihood)
    if not training.dropout:
        switch_off_dropout(likelihood.model)
    if training.config.lora_rank is not None:
        add_adapter(likelihood.model, training.config, training.config.lora_rank)
    freeze_what_text_does_not_reach(likelihood.model)
    return likelihood


class _Reporter:
    """After each step: log a line, save a checkpoint, export an epoch, as the settings ask."""

    def __init__(self, training: Training, tally: Tally, trainer: Trainer, *, is_first: bool) -> None:
        self._training = training
        self._tally = tally
        self._trainer = trainer
        self._is_first = is_first
        self._steps = self._tokens = 0
        if is_first:
            tally.begin("steps")
            tally.tell("steps", Told(0, before=trainer.step))

    def __call__(self, report: StepReport) -> None:
        """Every rank reports at the same steps: Ray Train waits for all of them."""
        config = self._training.config
        if self._is_first:
            self._tell(report)
        if config.export_epochs and report.ends_epoch:
            name = f"{self._training.folder}_epochs/{report.epoch}"
            together(partial(_export, self._training, self._trainer, name, is_first=self._is_first))
        last = report.step == report.total_steps
        if report.step % config.checkpoint_every_steps == 0 or last:
            self._report_with_checkpoint(report)
        if last or report.step % max(1, report.total_steps // _MOST_REPORTS) == 0:
            self._log(report)

    def _report_with_checkpoint(self, report: StepReport) -> None:
        metrics = dataclasses.asdict(report)
        if not (self._is_first or self._trainer.every_rank_saves):
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            with storage_errors(folder):
                self._trainer.save_state(Path(folder))
            with storage_errors(self._training.run / "checkpoints"):
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _tell(self, report: StepReport) -> None:
        self._steps += 1
        self._tokens += report.num_tokens
        told = Told(self._steps, tokens=self._tokens, before=report.step - self._steps)
        self._tally.tell("steps", told, report.total_steps)

    def _log(self, report: StepReport) -> None:
        if self._is_first:
            log.info(
                "%s: step %d of %d, epoch %d, %s, %.0f tokens/s",
                self._training.stage, report.step, report.total_steps, report.epoch,
                ", ".join(f"{name} {value:.4f}" for name, value in report.measures.items()), report.tokens_per_second,
            )  # fmt: skip


def _export(training: Training, trainer: Trainer, name: str, *, is_first: bool) -> list[FileEntry]:
    """Write the model as a Hugging Face folder of the run, whole or not at all; returns its files.

    Called on every rank, for sharded weights must be gathered; rank 0 writes.
    """
    weights = trainer.gathered_weights()
    if not is_first:
        return []
    with tempfile.TemporaryDirectory() as folder:
        with storage_errors(folder):
            save_reference(trainer.likelihood, training.base.tokenizer(), Path(folder), weights)
            Path(folder, SPEC_FILE).write_text(json.dumps(training.spec, indent=1))
        return put_folder(training.run / name, Path(folder), last=CONFIGS)
