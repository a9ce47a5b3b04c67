"""What a run will take, about: tokens, shards, disk, device-hours and their price. Pure arithmetic, for --dry_run."""

from dataclasses import dataclass

from davir_ray.config.training import FinetuneConfig
from davir_ray.models.size import ModelSize

PEAK_TFLOPS = {
    "V100": 125.0, "T4": 65.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0,
    "A100": 312.0, "A100-40G": 312.0, "A100-80G": 312.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0,
}  # fmt: skip
"""Dense bfloat16 (V100, T4: float16) TFLOP/s by NVIDIA's data sheets, by Ray's name of the accelerator."""

GPU_SHARE = 0.35
"""Of the peak that packed forwards of models of some billions of parameters are assumed to reach."""

CPU_SHARE = 0.7
"""Of a matrix product's rate on one thread; 0.77 was measured (benchmarks/RESULTS.md)."""

_ADAM_BYTES = 12
"""A trained parameter in a checkpoint: float32 value and Adam's two moments."""

_GRADIENT_BYTES = 4
"""Of a trained parameter in memory, besides: float32."""


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """What the sources hold, estimated from their first rows."""

    num_rows: int
    num_examples: int
    num_tokens: int
    """Prompt and response tokens of all examples, end tokens included."""
    num_scored: int
    """Response tokens of all examples."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take."""

    data: DataSize
    num_shards: int
    finetune_flops: float
    score_flops: float
    checkpoint_bytes: float
    """At the most at one time: the last checkpoint and the one being written."""
    reference_bytes: float
    device_bytes: float
    """Weights, gradients and moments on each fine-tuning device, activations not counted; 0 without a fine-tune."""

    def device_hours(self, tflops: float) -> tuple[float, float]:
        """Of the fine-tune and of scoring, on devices that sustain so many TFLOP/s."""
        return self.finetune_flops / tflops / 3.6e15, self.score_flops / tflops / 3.6e15


def estimate(
    size: ModelSize, data: DataSize, shard_rows: int, finetune: FinetuneConfig | None, examples_per_unit: int = 1
) -> Estimate:
    """The arithmetic; `finetune` is None where a reference is given. A batch counts units: examples, or pairs."""
    mean_length = data.num_tokens / max(1, data.num_examples)
    forward = size.forward_flops(data.num_tokens, data.num_scored, mean_length)
    num_shards = -(-data.num_examples // shard_rows)
    if finetune is None:
        return Estimate(
            data=data,
            num_shards=num_shards,
            finetune_flops=0.0,
            score_flops=2 * forward,
            checkpoint_bytes=0.0,
            reference_bytes=0.0,
            device_bytes=0.0,
        )
    if finetune.lora_rank is None:
        trained, passes = size.num_parameters, 3
    else:  # the frozen weights get no gradient of their own
        trained, passes = finetune.lora_rank * size.linear_edges, 2
    passes += finetune.gradient_checkpointing
    epochs = float(finetune.epochs)
    if finetune.max_steps is not None:
        epochs = finetune.max_steps * finetune.batch_size * examples_per_unit / max(1, data.num_examples)
    return Estimate(
        data=data,
        num_shards=num_shards,
        finetune_flops=epochs * passes * forward,
        score_flops=2 * forward,
        checkpoint_bytes=2.0 * _ADAM_BYTES * trained,
        reference_bytes=4.0 * trained,
        device_bytes=_device_bytes(size, finetune, trained),
    )


def _device_bytes(size: ModelSize, finetune: FinetuneConfig, trained: int) -> float:
    """What the fine-tune holds on a device whatever the data, at the most: a base that is frozen may be in bfloat16.

    Sharded, a device also gathers the embeddings and two layers at a time, the next one while one runs; where these are
    trained, with gradients that are not summed over the devices yet.
    """
    state = (_ADAM_BYTES + _GRADIENT_BYTES) * trained
    if finetune.lora_rank is not None:
        state += 4 * size.num_parameters
    if finetune.strategy == "ddp":
        return float(state)
    gathered = size.num_parameters - size.num_body + 2 * size.num_body / size.num_layers
    return state / finetune.num_workers + gathered * (4 if finetune.lora_rank is not None else 4 + _GRADIENT_BYTES)


def told(found: Estimate, tflops: float, how: str, num_devices: int, price: float | None) -> list[str]:
    """The estimate in lines for a person. `how` says where the rate comes from; `price` is of a device-hour."""
    data = found.data
    training, scoring = found.device_hours(tflops)
    total = training + scoring
    lines = [
        "estimate, from the first rows:",
        f"  data: {data.num_rows:,} rows, {data.num_examples:,} examples, {data.num_tokens:,} tokens "
        f"({data.num_scored:,} scored), {found.num_shards:,} shards",
        f"  disk: {_bytes(found.checkpoint_bytes)} for checkpoints while fine-tuning, "
        f"{_bytes(found.reference_bytes)} for the reference",
        f"  compute: {total:.3g} device-hours ({training:.3g} fine-tune, {scoring:.3g} score) at {tflops:.3g} TFLOP/s "
        f"a device ({how})",
        f"  time to score: {_duration(scoring / max(1, num_devices))} on {num_devices} actors",
    ]
    if found.device_bytes:
        lines.append(f"  memory: {_bytes(found.device_bytes)} of a device while fine-tuning, and activations")
    if price is not None:
        lines.append(f"  cost: {total * price:.2f} at {price:g} a device-hour")
    return lines


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.2g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.2g} seconds"
