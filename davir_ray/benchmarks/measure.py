"""Memory and counted arithmetic, the same for every way that is measured."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from davir_ray.benchmarks.workload import Example
from davir_ray.models.device import device_name, seconds

_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")


def with_peak(job: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, MiB that the job needed at its peak beyond what was there before)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(job, device)
        return taken, (torch.cuda.max_memory_allocated() - before) / 2**20
    before = start_peak()
    taken = seconds(job, device)
    return taken, peak_since(before)


def start_peak() -> int:
    """Forget this process' peak of resident memory; returns what is resident now, in KiB."""
    # What the allocator holds back from earlier jobs would hide what the next one needs.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_PEAK.write_text("5")
    return _resident("VmRSS")


def peak_since(before_kib: int) -> float:
    """MiB of the peak since `start_peak`, beyond what was resident then."""
    return (_resident("VmHWM") - before_kib) / 2**10


def _resident(field: str) -> int:
    """KiB, as Linux counts them."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def useful_flops(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """FLOPs that scoring these examples takes: each token once, attention's causal half, the head where it is scored.

    Nothing is credited for padding, for logits that are not used, or for what could have been shared.
    """
    config = model.config.get_text_config()
    lengths = [len(example.input_ids) for example in examples]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None) or max(lengths)
    # Of L positions the i-th sees min(i, window): a multiplication and an addition each for scores and for values.
    seen = sum(sum(min(at, window) for at in range(1, length + 1)) for length in lengths)
    attention = 4 * width * seen * config.num_hidden_layers
    head = 2 * model.get_output_embeddings().weight.numel() * sum(example.num_scored for example in examples)
    return float(2 * _active_parameters(model) * sum(lengths) + attention + head)


def _active_parameters(model: PreTrainedModel) -> float:
    """Weights of the backbone that multiply a token: matrices, without embeddings, of experts only the routed ones."""
    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    routed: float = config.num_experts_per_tok / num_experts if num_experts else 1.0
    decoder = model.get_decoder()  # of a model that also sees, the part that reads
    embeddings = {id(module.weight) for module in decoder.modules() if isinstance(module, torch.nn.Embedding)}
    return sum(
        float(parameter.numel()) * (routed if parameter.ndim == 3 else 1.0)
        for parameter in decoder.parameters()
        if parameter.ndim >= 2 and id(parameter) not in embeddings
    )


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
