"""The demo: generate the data, pre-train the base, run the pipeline, compare the selection with the planted truth."""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import SelectConfig
from davir_ray.demo.base import FINETUNING, pretrain
from davir_ray.demo.truth import format_truth, length_correlations, shares_of_run
from davir_ray.demo.world import TOP_FRACTION, instruction_rows, pretraining_texts, write_instructions
from davir_ray.engine.connect import connected
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.loop import StepReport
from davir_ray.pipeline import run_all
from davir_ray.run.progress import Progress
from davir_ray.stages.report import report
from davir_ray.terminal import Bar

log = logging.getLogger(__name__)

NOTE = (
    "The learnable class should dominate the selection. Noisy answers about homes gain a little because the fine-tune "
    "learns that such answers can be wrong. Duplicated noise gains by being memorised, more with every epoch (over 8 "
    "epochs its share of a selection rose from 1 to 46 %); the score cannot distinguish this from learning."
)


def run_demo(output: Path, seed: int = 0) -> str:
    """Run the whole demo in a folder; returns the text to print."""
    started = time.monotonic()
    output = output.expanduser().resolve()
    output.mkdir(parents=True, exist_ok=True)
    rows = instruction_rows(seed)
    data, base = output / "instructions.jsonl", output / "base"
    write_instructions(data, rows)
    if not base.is_dir():
        log.info("demo: pre-training a base model of 0.6M parameters on generated text")
        torch.set_num_threads(1)  # matrices this small gain nothing from more threads, and lose much on a busy machine
        with _pretraining_progress() as show:
            pretrain(base, pretraining_texts(seed), seed, show)
    config = demo_config(data, base, output / "run")
    with connected():  # one Ray session for the run and for rewriting its report with the planted truth
        run = run_all(config)
        shares = shares_of_run(run, rows, seed)
        report(
            run,
            config,
            Checkpoint.find(str(base)).tokenizer(),
            planted={"classes": [dataclasses.asdict(share) for share in shares], "note": NOTE},
        )
    return format_truth(shares, length_correlations(run, rows), run, time.monotonic() - started)


def demo_config(data: Path, base: Path, output: Path) -> RunConfig:
    """The settings of the demo's run: the defaults, except for a recipe that suits a model of this size."""
    return RunConfig(
        output=str(output),
        base=str(base),
        data=str(data),
        format="prompt_response",
        finetune=FINETUNING,
        prepare=PrepareConfig(shard_rows=512),
        select=SelectConfig(top_fraction=TOP_FRACTION),
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
