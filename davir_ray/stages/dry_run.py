"""dry run: what a job would do and what it would take, without loading weights or writing files.

The first records are prepared and shown; tokens, shards, disk, device-hours and their cost are estimated from them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from davir_ray.config.run import EstimateConfig, InputConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.data.evaluation import EvaluationWords, list_evaluation_sets
from davir_ray.data.files import list_files, plan_tasks
from davir_ray.data.formats import are_pairs, uses_chat
from davir_ray.data.records import LeftOut, Reject, estimate_rows
from davir_ray.data.shards import BYTES_PER_TOKEN, SHARD_ROWS, shard_tokens
from davir_ray.data.tokens import decoded_segments
from davir_ray.engine.connect import connected_to
from davir_ray.engine.ray_train import check_workers
from davir_ray.engine.resources import accelerators, has_gpu, plan_pool
from davir_ray.errors import ConfigError
from davir_ray.models.device import gemm_flops
from davir_ray.models.size import ModelSize
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.stages.prepare import UNLIMITED, Preparation
from davir_ray.stages.sources import evaluation_line
from davir_ray.stages.training_plan import plan_training, share_plan
from davir_ray.text import format_bytes

PEAK_TFLOPS = {
    "V100": 125.0, "T4": 65.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0,
    "A100": 312.0, "A100-40G": 312.0, "A100-80G": 312.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0,
}  # fmt: skip
"""Dense bfloat16 (V100, T4: float16) TFLOP/s by NVIDIA's data sheets, by Ray's name of the accelerator."""

GPU_SHARE = 0.35
"""Share of the peak that packed forward passes of models with billions of parameters are assumed to reach."""

CPU_SHARE = 0.7
"""Share of a matrix product's rate that a CPU is assumed to sustain; 0.77 was measured (benchmarks/RESULTS.md)."""

_ADAM_BYTES = 12
"""Bytes of a trained parameter in a checkpoint: its float32 value and Adam's two moments."""


def describe_run(
    run: Run,
    config: InputConfig,
    preparation: Preparation,
    training: FinetuneConfig | None,
    written: Sequence[Location],
) -> list[str]:
    """Lines for the user about what a job would do: the first examples, the estimate, the pool. Nothing is written.

    `training` is None if nothing is trained; files where the job writes (`written`) are not read as data.
    """
    lines, data = preview(config.all_sources(), preparation, written=written)
    with connected_to(run, is_shared=config.output_is_shared):
        plan, num_folds, at_once = None, config.prepare.folds, 1
        if training is not None:
            if num_folds > 1:
                training, at_once = share_plan(preparation.base, training, num_folds)
            check_workers(training)
            plan = plan_training(preparation.base, training, with_memory=True)
            plan.warn_if_too_large()
            training = plan.config
        pool = plan_pool(config.score)
        rate = device_rate(config.estimate)
    examples_per_unit = 2 if are_pairs(config.all_sources()) else 1
    found = estimate(
        ModelSize.of(preparation.base),
        data,
        config.prepare.shard_rows,
        training,
        examples_per_unit,
        num_folds=num_folds,
        at_once=at_once,
        anchor=config.prepare.anchor,
        score_passes=4 if config.score.both else 2,
        num_extra_passes=len(config.score.also),
    )
    lines += estimate_lines(found, *rate, pool.initial_size, config.estimate.price_per_device_hour)
    if plan is not None:
        of_folds = f" (each of {num_folds} references, {at_once} at a time)" if num_folds > 1 else ""
        lines.append(f"fine-tune: {plan}{of_folds}")
    return [*lines, f"cluster: {pool} to score", f"output: {run}"]


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """The size of the sources, estimated from their first rows."""

    num_rows: int
    num_examples: int
    num_tokens: int
    """Prompt and response tokens of all examples, end tokens included."""
    num_scored: int
    """Response tokens of all examples."""


def preview(
    sources: list[Source],
    preparation: Preparation,
    num_records: int = 100,
    num_shown: int = 3,
    written: Sequence[Location] = (),
) -> tuple[list[str], DataSize]:
    """Prepare the first records of each source, without Ray; files where the job writes (`written`) are not read.

    Returns lines for the user, with the scored tokens of examples between ⟦ and ⟧, and the size of the sources.
    """
    tokenizer = preparation.base.tokenizer()
    evaluation = EvaluationWords.read(list_evaluation_sets(preparation.evaluation_sets, written))
    reader = preparation.reader(sources, evaluation if evaluation.names else None)
    lines, num_rows, num_examples, num_prompt, num_scored = [], 0, 0.0, 0.0, 0.0
    for source in sources:
        files = list_files(source, written)
        slices = [part for task in plan_tasks(files, UNLIMITED) for part in task]
        items = list(reader.read(source, slices, num_records))
        rejects = [item for item in items if isinstance(item, Reject)]
        num_left_out = sum(isinstance(item, LeftOut) for item in items)
        examples = [row for item in items if not isinstance(item, Reject | LeftOut) for row in item]
        num_good = len(items) - len(rejects) - num_left_out
        lines.append(
            f"{source.name} ({source.format}): {num_good} of the first {len(items)} records can be prepared"
            + (f", {num_left_out} are left out by marks of the data" if num_left_out else "")
        )
        if not uses_chat(source, preparation.config) and tokenizer.chat_template:
            lines.append("  as plain text, although the base has a chat template; --prepare.chat true uses it")
        lines += [f"  {r.source_file} row {r.source_row}: {r.reason} ({r.detail})" for r in rejects[:num_shown]]
        for row in examples[:num_shown]:
            segments = decoded_segments(tokenizer, row["input_ids"], row["response_spans"])
            lines.append("".join(f"⟦{text}⟧" if scored else text for text, scored in segments))
        rows_of_source = min(estimate_rows(files), preparation.limit or UNLIMITED)
        scale = rows_of_source / max(1, len(items))
        num_rows += rows_of_source
        num_examples += scale * len(examples)
        num_prompt += scale * sum(row["num_prompt_tokens"] for row in examples)
        num_scored += scale * sum(row["num_response_tokens"] for row in examples)
    lines += [f"evaluation set {name}: {evaluation_line(counts)}" for name, counts in evaluation.counts.items()]
    return lines, DataSize(
        num_rows=num_rows,
        num_examples=round(num_examples),
        num_tokens=round(num_prompt + num_scored),
        num_scored=round(num_scored),
    )


def device_rate(config: EstimateConfig) -> tuple[float, str]:
    """TFLOP/s that one device is assumed to sustain, and where the number comes from."""
    if config.device_tflops is not None:
        return config.device_tflops, "as given"
    names = accelerators()
    known = [name for name in names if name in PEAK_TFLOPS]
    if known:
        slowest = min(known, key=lambda name: PEAK_TFLOPS[name])
        return GPU_SHARE * PEAK_TFLOPS[slowest], f"assumed {GPU_SHARE:.0%} of the peak of {slowest}"
    if has_gpu():
        raise ConfigError(
            f"the rate of the cluster's GPUs ({', '.join(names) or 'unnamed'}) is not known; "
            "give --estimate.device_tflops, the rate that one sustains"
        )
    of_a_thread = gemm_flops(torch.float32, torch.device("cpu")) / 1e12  # per second of CPU time, so of one thread
    return CPU_SHARE * of_a_thread, f"{CPU_SHARE:.0%} of a matrix product here; a device is one CPU thread"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take, approximately."""

    data: DataSize
    num_shards: int
    finetune_flops: float
    score_flops: float
    checkpoint_bytes: float
    """Maximum bytes at any time: the last checkpoint and the one being written."""
    reference_bytes: float

    def device_hours(self, tflops: float) -> tuple[float, float]:
        """Device-hours of the fine-tune and of scoring, on devices that sustain this rate."""
        return self.finetune_flops / tflops / 3.6e15, self.score_flops / tflops / 3.6e15


def estimate(
    size: ModelSize,
    data: DataSize,
    shard_rows: int | None,
    finetune: FinetuneConfig | None,
    examples_per_unit: int = 1,
    *,
    num_folds: int = 1,
    at_once: int = 1,
    anchor: float = 0.0,
    score_passes: int = 2,
    num_extra_passes: int = 0,
) -> Estimate:
    """Estimate a run; `finetune` is None where a reference is given. A unit of a batch is an example, or a pair.

    With folds there is a reference for each, trained on the rows of the others, `at_once` at a time; each but the first
    also makes a pass over the anchor, a share of the rows that none is trained on. An extra pass (score.also) is one
    over the responses alone, each after a start token.
    """
    mean_length = data.num_tokens / max(1, data.num_examples)
    forward = size.forward_flops(data.num_tokens, data.num_scored, mean_length)
    num_alone = data.num_scored + data.num_examples
    alone = size.forward_flops(num_alone, data.num_scored, num_alone / max(1, data.num_examples))
    epochs, passes, trained = 0.0, 0, 0
    if finetune is not None:
        if finetune.lora_rank is None:
            trained, passes = size.num_parameters, 3
        else:  # the frozen weights get no gradient of their own
            trained, passes = finetune.lora_rank * size.linear_edges, 2
        passes += bool(finetune.gradient_checkpointing)
        epochs = finetune.epochs * (1 - anchor) * max(1.0, num_folds - 1.0)  # of all rows, by all references together
        if finetune.max_steps is not None:
            trained_rows = finetune.max_steps * finetune.batch_size * examples_per_unit * num_folds
            epochs = trained_rows / max(1, data.num_examples)
    return Estimate(
        data=data,
        num_shards=_num_shards(data, shard_rows),
        finetune_flops=epochs * passes * forward,
        score_flops=(score_passes + (num_folds - 1) * anchor) * forward + num_extra_passes * alone,
        checkpoint_bytes=2.0 * _ADAM_BYTES * trained * at_once,
        reference_bytes=4.0 * trained * num_folds,
    )


def _num_shards(data: DataSize, shard_rows: int | None) -> int:
    by_rows = math.ceil(data.num_examples / (shard_rows or SHARD_ROWS))
    if shard_rows is not None:
        return by_rows
    return max(by_rows, math.ceil(data.num_tokens / shard_tokens(data.num_tokens * BYTES_PER_TOKEN)))


def estimate_lines(found: Estimate, tflops: float, how: str, num_devices: int, price: float | None) -> list[str]:
    """Lines for the user; `how` says where the rate comes from, and `price` is the price of a device-hour."""
    data = found.data
    training, scoring = found.device_hours(tflops)
    total = training + scoring
    lines = [
        "estimate, from the first rows:",
        f"  data: {data.num_rows:,} rows, {data.num_examples:,} examples, {data.num_tokens:,} tokens "
        f"({data.num_scored:,} scored), {found.num_shards:,} shards",
        f"  disk: {format_bytes(found.checkpoint_bytes)} for checkpoints while fine-tuning, "
        f"{format_bytes(found.reference_bytes)} for the reference",
        f"  compute: {total:.3g} device-hours ({training:.3g} fine-tune, {scoring:.3g} score) at {tflops:.3g} TFLOP/s "
        f"a device ({how})",
        f"  time to score: {_duration(scoring / max(1, num_devices))} on {num_devices} actors",
    ]
    if price is not None:
        lines.append(f"  cost: {total * price:.2f} at {price:g} a device-hour")
    return lines


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.2g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.2g} seconds"
