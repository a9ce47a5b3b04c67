"""The fine-tunes of a comparison: each trains on a set of rows and is measured on held-out data, side by side.

A trial is a small run of its own, made by the stages that make any run, so it goes on where it stopped; its own
manifest, written last, says that it has been measured, and only then may its model go.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from davir_ray.compare.answers import ANSWERS_VERSION
from davir_ray.compare.exact_match import match
from davir_ray.compare.generation import generate
from davir_ray.compare.outputs import write_outputs
from davir_ray.config.compare import TrialName
from davir_ray.config.run import GenerateConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.connect import actor_cpus, has_gpu, own_errors, room_for
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.pool import num_gpus_of
from davir_ray.errors import ConfigError, DavirError, OutputError, TrainingError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.generator import GENERATION_VERSION
from davir_ray.models.kernel.likelihood import NUMERICS_VERSION
from davir_ray.run.files import FileEntry, digest, in_folder
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest, differences
from davir_ray.stages.finetune import finetune, what_matters
from davir_ray.stages.score import score

log = logging.getLogger(__name__)

STAGE = "trial"
"""Of the manifest that says that a trial is complete."""

_CANCEL_S = 30
"""That a cancelled trial gets to end."""

ANSWERS = "answers"
"""In a trial: what its model answered to the instructions."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials of a comparison share."""

    base: Checkpoint
    spec: dict[str, Any]
    """How text became tokens."""
    chat_template: str | None
    """Text of the one that the examples were rendered with, if not the tokenizer's."""
    heldout: Run
    """A run that is prepared."""
    score: ScoreConfig
    generate: GenerateConfig
    matches: bool
    """Generate held-out answers and compare them."""
    instructions: Run | None
    """A run of `prepare_instructions`, to be answered, too. None: there are none."""
    keep_models: bool

    @cached_property
    def base_digest(self) -> dict[str, str]:
        """Of the base's weights; gigabytes are read for it, once for all trials."""
        return self.base.weights_digest()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fine-tune and its measurement."""

    name: TrialName
    place: Run
    examples: Run
    """A run that is prepared: what the trial trains on."""
    recipe: FinetuneConfig
    setting: Setting

    def trained_with(self) -> dict[str, Any]:
        """What the model depends on."""
        return {
            "base": self.setting.base_digest,
            "examples": self.examples.require("prepare").content,
            "recipe": what_matters(self.recipe),
        }

    def fingerprint(self) -> dict[str, Any]:
        """What the measurement depends on."""
        setting, instructions = self.setting, self.setting.instructions
        return self.trained_with() | {
            "heldout": setting.heldout.require("prepare").content,
            "precision": setting.score.precision,
            "matches": setting.matches,
            "instructions": None if instructions is None else instructions.require("prepare").content,
            "texts": _what_texts_depend_on(setting) if setting.matches or instructions else None,
            "numerics": NUMERICS_VERSION,
            "device": "cuda" if num_gpus_of(setting.score) else "cpu",
        }

    def completed(self) -> Manifest | None:
        """The manifest of a trial that has been measured; OutputError for one of other settings, or damaged.

        It is cleared here if it may be overwritten.
        """
        manifest = self.place.manifest(STAGE)
        if manifest is None:
            return None
        changed = differences(manifest.fingerprint, self.fingerprint()) or manifest.damage(self.place.folder)
        if not changed:
            return manifest
        told, has_model = "; ".join(changed[:5]), self._has_model(manifest)
        redone = "measure" if has_model else "train"
        if not self.place.overwrite:
            raise OutputError(
                f"{self.place} was made with something else ({told}). Add --overwrite to {redone} it again, or choose "
                "another --output"
            )
        log.info("%s differs (%s); to %s again", self.name, told, redone)
        (self.place / "manifests" / f"{STAGE}.json").remove()
        if not has_model:
            self.place.folder.remove()
        return None

    def _has_model(self, measured: Manifest) -> bool:
        """Whether the model that was measured was kept, is whole, and is still the one that is wanted."""
        trained = self.place.manifest("finetune")
        wanted = json.loads(json.dumps(self.trained_with()))
        same = {name: measured.fingerprint.get(name) for name in wanted} == wanted
        return same and trained is not None and not trained.damage(self.place.folder)

    def run(self) -> Manifest:
        """Fine-tune the base on the rows, measure the held-out examples, drop the model."""
        setting = self.setting
        trained = finetune(self.place, setting.base, self.recipe, setting.spec, examples=self.examples)
        model = Checkpoint.find(str(self.place / "reference"), setting.base.trust_remote_code)
        scored = score(self.place, setting.base, model, setting.score, keep_token_nll="none", examples=setting.heldout)
        files = scored.files + self._matches(model) + self._answers(model)
        counts = {"examples": trained.counts["examples"], "steps": trained.counts["steps"]}
        details = {name: trained.details[name] for name in ("final_loss", "loss_by_step")}
        details |= {"keep_model": setting.keep_models}
        seconds = trained.seconds + scored.seconds
        manifest = self.place.commit(
            Manifest(
                stage=STAGE,
                fingerprint=self.fingerprint(),
                counts=counts,
                files=files,
                details=details,
                seconds=seconds,
            )
        )
        self.drop_model(manifest)
        if model.files:
            _forget_everywhere(model)
        return manifest

    def _matches(self, model: Checkpoint) -> list[FileEntry]:
        """Generate held-out answers and compare them, if that is asked for; returns the files."""
        setting = self.setting
        if not setting.matches:
            return []
        generated = self._generate(self.place, model, setting.generate, setting.heldout)
        return generated.files + match(self.place, examples=setting.heldout).files

    def _answers(self, model: Checkpoint) -> list[FileEntry]:
        """Answer the instructions, if there are any; returns the files, in answers/."""
        setting, place = self.setting, self.place.within(ANSWERS)
        if setting.instructions is None:
            return []
        generated = self._generate(place, model, replace(setting.generate, sources=[]), setting.instructions)
        outputs = write_outputs(place, str(self.name), examples=setting.instructions)
        return in_folder(ANSWERS, [*generated.files, *outputs.files])

    def _generate(self, place: Run, model: Checkpoint, config: GenerateConfig, holder: Run) -> Manifest:
        setting = self.setting
        return generate(
            place, model, config, setting.score, examples=holder, base=setting.base if model.is_adapter else None,
            chat_template=setting.chat_template,
        )  # fmt: skip

    def drop_model(self, manifest: Manifest) -> None:
        """Delete the model of a trial that has been measured, unless the command that made it wanted it kept."""
        if not manifest.details["keep_model"]:
            (self.place / "reference").remove()


def _forget_everywhere(model: Checkpoint) -> None:
    """Delete the nodes' copies of a model in object storage: a comparison makes dozens, and each is used once."""
    forget: Any = ray.remote(num_cpus=0)(Checkpoint.forget)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    ray.get(
        [
            forget.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote(model)
            for node in nodes
        ]
    )


def _what_texts_depend_on(setting: Setting) -> dict[str, Any]:
    config, template = setting.generate, setting.chat_template
    return {
        "max_new_tokens": config.max_new_tokens,
        "sources": sorted(config.sources),
        "chat_template": digest(template) if template else None,
        "versions": [GENERATION_VERSION, ANSWERS_VERSION],
    }


def _run_trial(trial: Trial) -> None:
    configure_worker_logging()
    trial.run()


def run_trials(trials: list[Trial], at_once: int, tell: Callable[[int], None]) -> None:
    """Run those that are not complete, so many side by side; `tell` hears how many are complete.

    An arm whose fine-tune fails by itself (it diverges) lets the others end first; then its error names it, and how to
    leave it out. Any other error ends all of them.
    """
    pending = []
    for trial in trials:
        if (manifest := trial.completed()) is None:
            pending.append(trial)
        else:
            trial.drop_model(manifest)  # a driver may have died just before
    done = len(trials) - len(pending)
    log.info("compare: %d arms to train and measure, %d done, %d at a time", len(pending), done, at_once)
    tell(done)
    # Each waits for the workers of its own stages, and needs no CPU itself.
    start: Any = ray.remote(num_cpus=0)(_run_trial)
    running: dict[Any, Trial] = {}
    failed: list[TrainingError] = []
    try:
        while pending or running:
            while pending and len(running) < at_once:
                trial = pending.pop(0)
                running[start.options(name=str(trial.name)).remote(trial)] = trial
            (ended,), _ = ray.wait(list(running), num_returns=1)
            trial = running.pop(ended)
            if error := _failure(ended, trial):
                log.warning("compare: %s", error)
                failed.append(error)
                continue
            done += 1
            log.info("compare: %s is measured (%d of %d)", trial.name, done, len(trials))
            tell(done)
    finally:
        _cancel(list(running))
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(trials)} fine-tunes failed, the others are measured; {failed[0]}; or leave the arm "
            "out of --arms"
        )


def _failure(ended: Any, trial: Trial) -> TrainingError | None:
    """Why this fine-tune failed, if it did by itself; any other error is raised, with the trial's name."""
    try:
        with own_errors():
            ray.get(ended)
    except TrainingError as error:
        return TrainingError(f"{trial.name}: {error}")
    except DavirError as error:
        raise type(error)(f"{trial.name}: {error}") from error
    return None


def _cancel(tasks: list[Any]) -> None:
    """End these, and wait until they have: none may write once the lease is given back."""
    for task in tasks:
        ray.cancel(task)
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=_CANCEL_S)


def plan_trials(recipe: FinetuneConfig, config: ScoreConfig, wanted: int | None) -> tuple[int, ScoreConfig]:
    """How many trials run side by side, and the scoring pool of each.

    As many as the cluster has room for training workers, one place left for reading and writing; a scoring pool of one
    trial is a share of the cluster, or two of them would leave no place to read in. ConfigError if more are wanted.
    """
    use_gpu = has_gpu() if recipe.use_gpu is None else recipe.use_gpu
    training = room_for(recipe.num_cpus, 1.0 if use_gpu else 0.0) // recipe.num_workers
    scoring = room_for(actor_cpus(config.num_cpus), num_gpus_of(config))
    most = max(1, min(training, scoring))
    if wanted is not None and wanted > most:
        raise ConfigError(
            f"arms_at_once is {wanted}, but the cluster has room for {most}: {training} fine-tunes and {scoring} "
            "scoring actors, one place left for reading and writing; lower it, or leave it out"
        )
    at_once = wanted or most
    return at_once, replace(config, autoscale=None, num_actors=max(1, scoring // at_once))
