"""Trials, the fine-tunes of a comparison: each trains on a set of rows and is measured on held-out data.

A trial is a small run of its own, made by the same stages as any run, so it can be resumed. Its stage `trial` is
complete when the model has been measured; only then may the model be deleted. Several trials run in parallel.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from davir_ray.compare.answers import ANSWERS_VERSION
from davir_ray.compare.arms import RowSet
from davir_ray.compare.exact_match import match
from davir_ray.compare.generation import generate
from davir_ray.compare.outputs import write_outputs
from davir_ray.config.compare import TrialName
from davir_ray.config.run import GenerateConfig, Tracker
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.connect import own_errors
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.resources import actor_cpus, device_of, has_gpu, num_gpus_of, room_for
from davir_ray.engine.tracking import StepLog, Tracking
from davir_ray.errors import ConfigError, DavirError, OutputError, TrainingError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.generator import GENERATION_VERSION
from davir_ray.run.files import digest, in_folder
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest, differences
from davir_ray.stages.finetune import finetune, what_matters
from davir_ray.stages.score import score
from davir_ray.versions import NUMERICS_VERSION

log = logging.getLogger(__name__)

_CANCEL_S = 30
"""Seconds that a cancelled trial may take to stop."""

ANSWERS = "answers"
"""Folder in a trial with the model's answers to the instructions."""


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What all trials of a comparison share."""

    base: Checkpoint
    spec: dict[str, Any]
    """How text was encoded as tokens: the reference's scoring spec."""
    chat_template: str | None
    """Text of the template that the examples were rendered with; None: the tokenizer's."""
    heldout: Run
    """Run with the held-out data as its prepared examples."""
    score: ScoreConfig
    generate: GenerateConfig
    matches: bool
    """Whether answers to the held-out prompts are generated and compared with the responses."""
    instructions: Run | None
    """Run of `prepare_instructions` with instructions to answer; None if there are none."""
    keep_models: bool
    """Whether a model is kept after it has been measured."""

    @cached_property
    def base_digest(self) -> dict[str, str]:
        """Digest of the base's weights; computed once for all trials, as gigabytes are read for it."""
        return self.base.weights_digest()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fine-tune and its measurement."""

    name: TrialName
    run: Run
    """Folder of the trial's own stages."""
    rows: RowSet
    """The training rows."""
    recipe: FinetuneConfig
    settings: TrialSettings
    steps: StepLog | None = None
    """Where the fine-tune reports its steps for tracking."""

    @property
    def examples(self) -> Run:
        """Run with the training rows as its prepared examples."""
        return self.rows.examples

    def trained_with(self) -> dict[str, Any]:
        """The part of the fingerprint that determines the model."""
        return {
            "base": self.settings.base_digest,
            "examples": self.examples.require("prepare").content,
            "recipe": what_matters(self.recipe),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the measurements depend on, by name."""
        settings, instructions = self.settings, self.settings.instructions
        config, template = settings.generate, settings.chat_template
        texts = {
            "max_new_tokens": config.max_new_tokens,
            "sources": sorted(config.sources),
            "chat_template": digest(template) if template else None,
            "versions": [GENERATION_VERSION, ANSWERS_VERSION],
        }
        compiled = {"compile": True} if settings.score.compile else {}  # earlier versions compiled nothing
        return self.trained_with() | {
            "heldout": settings.heldout.require("prepare").content,
            "precision": settings.score.precision,
            "matches": settings.matches,
            "instructions": None if instructions is None else instructions.require("prepare").content,
            "texts": texts if settings.matches or instructions else None,
            "numerics": NUMERICS_VERSION,
            "device": device_of(settings.score),
            **compiled,
        }

    def completed(self) -> Manifest | None:
        """The manifest of the trial if it has been measured, else None.

        A trial that is damaged or was made with other settings is cleared here if it may be overwritten; otherwise an
        OutputError is raised.
        """
        manifest = self.run.manifest("trial")
        if manifest is None:
            return None
        changed = differences(manifest.fingerprint, self.fingerprint()) or manifest.damage(self.run.folder)
        if not changed:
            return manifest
        listed, has_model = "; ".join(changed[:5]), self._has_model(manifest)
        redone = "measure" if has_model else "train"
        if not self.run.overwrite:
            raise OutputError(
                f"{self.run} was made with other settings ({listed}). Add --overwrite to {redone} it again, or choose "
                "another --output"
            )
        log.info("%s differs (%s); to %s again", self.name, listed, redone)
        self.run.uncommit("trial")
        if not has_model:
            self.run.folder.remove()
        return None

    def _has_model(self, measured: Manifest) -> bool:
        """Whether the measured model was kept, is undamaged, and was trained with the current settings."""
        trained = self.run.manifest("finetune")
        wanted = json.loads(json.dumps(self.trained_with()))
        same = {name: measured.fingerprint.get(name) for name in wanted} == wanted
        return same and trained is not None and not trained.damage(self.run.folder)

    def train_and_measure(self) -> Manifest:
        """Fine-tune the base on the rows, measure it on the held-out examples, and delete the model unless kept.

        The answers to the instructions, if there are any, are in answers/.
        """
        settings = self.settings
        trained = finetune(
            self.run, settings.base, self.recipe, settings.spec, examples=self.examples, steps=self.steps
        )
        model = Checkpoint.find(str(self.run / "reference"), settings.base.trust_remote_code)
        scored = score(self.run, settings.base, model, settings.score, keep_token_nll="none", examples=settings.heldout)
        files = list(scored.files)
        write = partial(
            generate, model=model, pool=settings.score, base=settings.base if model.is_adapter else None,
            chat_template=settings.chat_template,
        )  # fmt: skip
        if settings.matches:
            texts = write(self.run, config=settings.generate, examples=settings.heldout)
            files += texts.files + match(self.run, examples=settings.heldout).files
        if settings.instructions is not None:
            run, every = self.run.within(ANSWERS), replace(settings.generate, sources=[])
            texts = write(run, config=every, examples=settings.instructions)
            outputs = write_outputs(run, str(self.name), examples=settings.instructions)
            files += in_folder(ANSWERS, [*texts.files, *outputs.files])
        details = {name: trained.details[name] for name in ("final_loss", "loss_by_step")}
        manifest = self.run.commit(
            Manifest(
                stage="trial",
                fingerprint=self.fingerprint(),
                counts={name: trained.counts[name] for name in ("examples", "steps")},
                files=files,
                details=details | {"keep_model": settings.keep_models},
                seconds=trained.seconds + scored.seconds,
            )
        )
        self.drop_model(manifest)
        if model.files:
            _forget_everywhere(model)
        return manifest

    def drop_model(self, manifest: Manifest) -> None:
        """Delete the model of a trial that has been measured, unless the trial was made with keep_models."""
        if not manifest.details["keep_model"]:
            (self.run / "reference").remove()


def _forget_everywhere(model: Checkpoint) -> None:
    """Delete the nodes' local copies of a model in object storage: a comparison makes dozens, each used once."""
    forget: Any = ray.remote(num_cpus=0)(Checkpoint.forget)
    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in ray.nodes() if node["Alive"]]
    ray.get([forget.options(scheduling_strategy=node).remote(model) for node in nodes])


def _run_trial(trial: Trial) -> None:
    configure_worker_logging()
    trial.train_and_measure()


def run_trials(
    trials: list[Trial], at_once: int, on_progress: Callable[[int], None], track: Tracker | None = None
) -> None:
    """Run the trials that are not complete, `at_once` in parallel; calls `on_progress` with the number complete.

    With a tracker, each trial has a tracking run of its own, to which this process logs its steps.

    If a fine-tune diverges, the others still run to the end; then a TrainingError names it and says how to leave it
    out. Any other error stops all trials.
    """
    pending = []
    for trial in trials:
        if (manifest := trial.completed()) is None:
            pending.append(trial)
        else:
            trial.drop_model(manifest)  # the previous driver may have died before it deleted the model
    done = len(trials) - len(pending)
    log.info("compare: %d arms to train and measure, %d done, %d at a time", len(pending), done, at_once)
    on_progress(done)
    # A trial's own task waits for the workers of its stages, and needs no CPU.
    start: Any = ray.remote(num_cpus=0)(_run_trial)
    running: dict[Any, tuple[Trial, Tracking]] = {}
    failed: list[TrainingError] = []
    try:
        while pending or running:
            while pending and len(running) < at_once:
                trial = pending.pop(0)
                tracking = Tracking(trial.run, track, str(trial.name))
                task = start.options(name=str(trial.name)).remote(replace(trial, steps=tracking.steps))
                running[task] = trial, tracking
            (ended,), _ = ray.wait(list(running), num_returns=1)
            error = _failure(ended, running[ended][0])
            trial, tracking = running.pop(ended)
            tracking.close(failed=error is not None)
            if error:
                log.warning("compare: %s", error)
                failed.append(error)
                continue
            done += 1
            log.info("compare: %s is measured (%d of %d)", trial.name, done, len(trials))
            on_progress(done)
    finally:
        for task in running:
            ray.cancel(task)
        if running:  # none may write once the lease is released
            ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_S)
        for _, tracking in running.values():
            tracking.close(failed=True)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(trials)} fine-tunes failed, the others are measured; {failed[0]}; or leave the arm "
            "out of --arms"
        )


def _failure(ended: Any, trial: Trial) -> TrainingError | None:
    """The error of a fine-tune that diverged, None if it did not; any other error is raised with the trial's name."""
    try:
        with own_errors():
            ray.get(ended)
    except TrainingError as error:
        return TrainingError(f"{trial.name}: {error}")
    except DavirError as error:
        raise type(error)(f"{trial.name}: {error}") from error
    return None


def plan_trials(recipe: FinetuneConfig, config: ScoreConfig, wanted: int | None) -> tuple[int, ScoreConfig]:
    """How many trials run in parallel, and the scoring pool of each.

    The number of trials is limited by the training workers that fit the cluster, with one CPU kept free for reading and
    writing. Each trial's scoring pool is its share of the cluster: larger pools would leave no CPU for reading.
    ConfigError if more trials are wanted.
    """
    use_gpu = has_gpu() if recipe.use_gpu is None else recipe.use_gpu
    training = room_for(recipe.num_cpus, 1.0 if use_gpu else 0.0) // (recipe.num_workers or 1)
    scoring = room_for(actor_cpus(config.num_cpus), num_gpus_of(config))
    limit = max(1, min(training, scoring))
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"arms_at_once is {wanted}, but the cluster has room for {limit}: {training} fine-tunes and {scoring} "
            "scoring actors, one CPU kept free for reading and writing; lower it, or leave it out"
        )
    at_once = wanted or limit
    return at_once, replace(config, autoscale=None, num_actors=max(1, scoring // at_once))
