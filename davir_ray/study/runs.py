"""The runs of a replicate: ordinary runs of the pipeline on its pool, one for each way and number of epochs.

one-E   one reference, trained on all rows for E epochs, as in the paper
two-E   two folds: each row scored by the reference that has not seen it, and (extra/seen/) by the one that has
four-E  four folds
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from davir_ray.complete import complete_run
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import SelectConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.demo.base import ModelSize, pretrain
from davir_ray.engine.connect import connected
from davir_ray.models.training.loop import StepReport
from davir_ray.pipeline import run_all

log = logging.getLogger(__name__)

TOP_FRACTION = 0.06
"""Share of a pool that is selected: the paper's."""

MAX_TOKENS = 256

IFD_EPOCHS = 3
"""The run of one reference with so many epochs also has IFD; it does not depend on them."""

SMALL_RECIPE = FinetuneConfig(
    batch_size=16, learning_rate=1e-3, gradient_checkpointing=False, precision="float32", checkpoint_every_minutes=None
)
"""Fine-tune of the study's own small base, all weights."""

ADAPTER_RECIPE = FinetuneConfig(batch_size=16, learning_rate=2e-4, lora_rank=16)
"""Fine-tune of a base that is given: a LoRA adapter."""

PRETRAINING = FinetuneConfig(
    epochs=4, batch_size=16, learning_rate=2e-3, gradient_checkpointing=False, precision="float32"
)
BASE_SIZE = ModelSize(vocabulary=2048, hidden_size=160, num_layers=3)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a run's rows are scored."""

    name: str
    folds: int


ONE, TWO, FOUR = Way(name="one", folds=1), Way(name="two", folds=2), Way(name="four", folds=4)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which runs a replicate has."""

    epochs: tuple[int, ...] = (1, 3, 8)
    """Of one reference and of two folds; each number is a schedule of its own, not a point of a longer one."""
    four_folds: tuple[int, ...] = (3,)
    """Epochs of the runs with four folds."""

    @property
    def runs(self) -> list[tuple[Way, int]]:
        """Way and epochs of each run."""
        return [*((way, epochs) for way in (ONE, TWO) for epochs in self.epochs), *((FOUR, n) for n in self.four_folds)]


def run_config(
    way: Way, epochs: int, *, pool: Path, base: str, recipe: FinetuneConfig, replicate: int, folder: Path
) -> RunConfig:
    """The settings of one run; the base's losses are computed once for all runs of a pool."""
    return RunConfig(
        output=str(folder / f"{way.name}-{epochs}"),
        base=base,
        data=str(pool),
        format="prompt_response",
        keep_token_nll="none",
        finetune=replace(recipe, epochs=epochs, seed=replicate),
        prepare=PrepareConfig(folds=way.folds, max_tokens=MAX_TOKENS, shard_rows=512),
        score=ScoreConfig(
            base_cache=str(folder / "base_cache"),
            both=way == TWO,
            also=["ifd"] if (way, epochs) == (ONE, IFD_EPOCHS) else [],
        ),
        select=SelectConfig(top_fraction=TOP_FRACTION),
    )


def make_runs(configs: Sequence[RunConfig]) -> None:
    """Make the runs that are not complete, in one Ray session."""
    missing = [config for config in configs if complete_run(config) is None]
    if not missing:
        return
    with connected():
        for config in missing:
            run_all(config)


def make_base(folder: Path, texts: Sequence[tuple[str, str]]) -> None:
    """Pre-train the study's own base, unless it is there: a Llama of 1.4M parameters."""
    if folder.is_dir():
        return
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    pretrain(folder, [prompt + response for prompt, response in texts], 0, _log, recipe=PRETRAINING, size=BASE_SIZE)


def _log(step: StepReport) -> None:
    if step.step % 100 == 0 or step.step == step.total_steps:
        log.info("pre-training: step %d of %d, loss %.3f nats per token", step.step, step.total_steps, step.loss)
