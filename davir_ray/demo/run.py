"""The demo: generate the data, pre-train the base, select in two ways, compare both with the planted truth.

instructions.jsonl ─┬─► run/    one reference, which has seen all that it scores: the paper's way
base/ ──────────────┴─► folds/  two, each row scored by the one that has seen neither it nor a copy of it
"""

import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import SelectConfig
from davir_ray.demo.base import FINETUNING, pretrain
from davir_ray.demo.truth import format_truth, way_of
from davir_ray.demo.world import NUM_COPIES, TOP_FRACTION, instruction_rows, pretraining_texts, write_instructions
from davir_ray.engine.connect import connected
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.loop import StepReport
from davir_ray.pipeline import run_all
from davir_ray.run.manifest import CONFIG_FILE
from davir_ray.run.progress import Progress
from davir_ray.stages.report import report
from davir_ray.terminal import Bar

log = logging.getLogger(__name__)

WAYS = {
    "run": ("paper's way", 1),
    "folds": ("two folds", 2),
}
"""Folder of each run, with what the table calls it and its number of folds."""

NOTE = (
    "The learnable class should dominate the selection. Noisy answers about homes gain a little because the fine-tune "
    f"learns that such answers can be wrong. The rows of noise_duplicates are wrong answers, each {NUM_COPIES} times: "
    "so many, on purpose, that the fine-tune memorises them. A reference that has seen them scores them high, and the "
    "score cannot distinguish that from learning; one that has not seen them does not."
)


def run_demo(output: Path, seed: int = 0, *, overwrite: bool = False) -> str:
    """Run the whole demo in a folder; returns the text to print. `overwrite` redoes what another version has made."""
    started = time.monotonic()
    output = output.expanduser().resolve()
    output.mkdir(parents=True, exist_ok=True)
    rows = instruction_rows(seed)
    data, base = output / "instructions.jsonl", output / "base"
    write_instructions(data, rows)
    if overwrite and base.is_dir() and (output / "run" / CONFIG_FILE).exists():  # of a demo, and no model of the user's
        shutil.rmtree(base)
    if not base.is_dir():
        log.info("demo: pre-training a base model of 0.6M parameters on generated text")
        torch.set_num_threads(1)  # matrices this small gain nothing from more threads, and lose much on a busy machine
        with _pretraining_progress() as show:
            pretrain(base, pretraining_texts(seed), seed, show)
    ways = []
    with connected():  # one Ray session for both runs and for rewriting their reports with the planted truth
        for folder, (title, num_folds) in WAYS.items():
            log.info("demo: %s", title)
            config = demo_config(data, base, output / folder, num_folds, overwrite=overwrite)
            run = run_all(config)
            ways.append(way := way_of(title, run, rows, seed))
            planted = {"classes": [dataclasses.asdict(share) for share in way.shares], "note": NOTE}
            report(run, config, Checkpoint.find(str(base)).tokenizer(), planted=planted)
    return format_truth(ways, time.monotonic() - started)


def demo_config(data: Path, base: Path, output: Path, num_folds: int, *, overwrite: bool = False) -> RunConfig:
    """The settings of one of the demo's runs: the defaults, except for a recipe that suits a model of this size."""
    return RunConfig(
        output=str(output),
        base=str(base),
        data=str(data),
        format="prompt_response",
        finetune=FINETUNING,
        prepare=PrepareConfig(shard_rows=512, folds=num_folds),
        score=ScoreConfig(num_actors=1),  # a second one takes longer to start than it saves
        select=SelectConfig(top_fraction=TOP_FRACTION),
        overwrite=overwrite,
    )


@contextmanager
def _pretraining_progress() -> Iterator[Callable[[StepReport], None]]:
    """A function to call after each step of the pre-training; it moves a bar on a terminal, else logs now and then."""
    stage, unit = "pre-training", "steps"
    bar = Bar(Progress(stage=stage, unit=unit)) if sys.stderr.isatty() else None

    def show(step: StepReport) -> None:
        if bar is not None:
            bar.show(Progress(stage=stage, unit=unit, done=step.step, total=step.total_steps))
        elif step.step % 50 == 0 or step.step == step.total_steps:
            log.info("%s: step %d of %d, loss %.3f nats per token", stage, step.step, step.total_steps, step.loss)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
