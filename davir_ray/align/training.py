"""align: pairs + frozen log-probabilities → policy, with the training loop, packing and kernel of the fine-tune."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from davir_ray.config.align import AlignConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.ray_train import trains_on_gpus
from davir_ray.engine.resources import num_gpus_of
from davir_ray.engine.tracking import StepLog
from davir_ray.errors import ConfigError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.pairs import FROZEN_COLUMNS, PAIR_COLUMNS, PairSet, write_pairs
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import each_in_turn
from davir_ray.run.manifest import Manifest
from davir_ray.stages.finetune import Training, recipe_of, train


def align(
    run: Run,
    base: Checkpoint,
    config: FinetuneConfig,
    objective: AlignConfig,
    spec: dict[str, Any],
    steps: StepLog | None = None,
) -> Manifest:
    """Train the base on every pair that is not held out; writes policy/, a Hugging Face model or adapter.

    The steps are reported to `steps`.
    """
    prepared, frozen = run.require("prepare"), run.require("freeze")
    shards = [entry.name for entry in prepared.files_in("examples")]
    training = Training(
        stage="align",
        run=run,
        base=base,
        config=config,
        write=partial(_write_pairs, run, shards, objective.heldout_fraction),
        objective=partial(PairSet.mapped, config=objective),
        spec=spec,
        folder="policy",
        dropout=False,
        steps=steps,
    )
    fingerprint = {
        "base": base.weights_digest(),
        "examples": prepared.content,
        "frozen": frozen.content,
        "objective": asdict(objective),
        **recipe_of(config),
    }
    return train(training, fingerprint, "pairs", rejects=prepared.counts["rejected"])


def check_arithmetic(training: FinetuneConfig, scoring: ScoreConfig) -> None:
    """ConfigError if training and scoring would use different arithmetic: at the first step the policy's losses would
    differ from the frozen ones.
    """
    training_kind = "GPUs" if trains_on_gpus(training) else "CPUs"
    scoring_kind = "GPUs" if num_gpus_of(scoring) > 0 else "CPUs"
    if training.precision == "auto" and training_kind != scoring_kind:
        raise ConfigError(
            "finetune.precision is auto, which may be bfloat16 on one and float32 on the other: the policy is trained "
            f"on {training_kind}, its frozen losses are computed on {scoring_kind}; give "
            "--finetune.precision float32, or the same devices (--finetune.use_gpu, --score.num_gpus)"
        )


def _write_pairs(run: Run, shards: list[str], heldout_fraction: float, folder: Path) -> None:
    examples = each_in_turn(lambda name: read_parquet(run / "examples" / name, PAIR_COLUMNS), shards)
    frozen = each_in_turn(lambda name: read_parquet(run / "frozen" / name, FROZEN_COLUMNS), shards)
    write_pairs(folder, zip(examples, frozen, strict=True), heldout_fraction)
