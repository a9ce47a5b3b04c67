"""Where a run finds its reference, or its references of folds: in the run itself, or in what the user gave."""

from pathlib import Path

from davir_ray.config.run import RunConfig
from davir_ray.errors import ConfigError, ModelError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.reference import Reference
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.storage_errors import user_errors
from davir_ray.stages.folds import REFERENCES, Folds


def trained_reference(run: Run, trust_remote_code: bool = False) -> Reference:
    """The reference that a run has fine-tuned."""
    folds = Folds.of(run.require("prepare"))
    if folds is None:
        return Checkpoint.find(str(run / "reference"), trust_remote_code)
    return {
        fold: Checkpoint.find(str(run / REFERENCES / str(fold)), trust_remote_code) for fold in range(folds.num_folds)
    }


def given_reference(config: RunConfig) -> Reference | None:
    """The reference that the user gave; None if there is none.

    With folds it must be a run that has fine-tuned one for each; raises ConfigError for anything else.
    """
    if config.reference is None:
        return None
    if config.prepare.folds == 1:
        return Checkpoint.find(config.reference, config.trust_remote_code)
    run = Run(_place(config.reference))
    trained = run.manifest("finetune")
    num_folds = None if trained is None else trained.fingerprint.get("folds")
    if num_folds != config.prepare.folds:
        has = "no references of folds" if num_folds is None else f"references of {num_folds} folds"
        raise ConfigError(
            f"prepare.folds is {config.prepare.folds}, but {config.reference} has {has}; give a run that was "
            f"fine-tuned with --prepare.folds {config.prepare.folds}, or leave --reference out to fine-tune them"
        )
    return trained_reference(run, config.trust_remote_code)


def check_same_folds(config: RunConfig, examples: Manifest) -> None:
    """Raise OutputError if references of another run were given, and not of the folds of these examples.

    A reference of other folds may have seen the rows that it would score.
    """
    if config.reference is None or Folds.of(examples) is None:
        return
    trained = Run(_place(config.reference)).require("finetune")
    if changed := differences({"examples": trained.fingerprint["examples"]}, {"examples": examples.content}):
        raise OutputError(
            f"the references in {config.reference} were trained on other folds ({changed[0]}), so they may have seen "
            "what they would score; give the same data and settings of prepare, or leave --reference out"
        )


def _place(reference: str) -> Location:
    with user_errors(reference, ModelError):
        return Location.of(reference if "://" in reference else Path(reference).expanduser().resolve())
