"""Time, memory and FLOPs, measured in the same way for every implementation."""

import ctypes
import gc
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from davir_ray.benchmarks.workload import Example
from davir_ray.models.device import device_name
from davir_ray.models.device import seconds as seconds_of

log = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")


def device_here() -> torch.device:
    """The device that a benchmark measures: the GPU of this machine if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def in_turn(
    methods: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    before_each_turn: Callable[[], object] = lambda: None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and median extra memory (MiB) of each method.

    The methods take turns, so that a slow phase of the machine affects all of them.
    """
    spent: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats):
        before_each_turn()
        for name, method in methods.items():
            taken, peak = with_peak(method, device)
            spent[name].append(taken)
            peaks[name].append(peak)
            log.info("benchmark: turn %d of %d, %s: %.2f s, %.0f MiB", turn + 1, repeats, name, taken, peak)
    seconds, memory = ({name: median(values) for name, values in found.items()} for found in (spent, peaks))
    return seconds, memory


def with_peak(job: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """The seconds that a job takes, and the MiB that it needs at its peak beyond what was in use before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds_of(job, device)
        return taken, (torch.cuda.max_memory_allocated() - before) / 2**20
    before = start_peak()
    taken = seconds_of(job, device)
    return taken, peak_since(before)


def start_peak() -> int:
    """Reset the peak of this process' resident memory; returns the resident memory now, in KiB."""
    # Memory that the allocator keeps from earlier jobs would hide what the next one needs.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_PEAK.write_text("5")
    return _resident("VmRSS")


def peak_since(before_kib: int) -> float:
    """The peak since `start_peak`, in MiB beyond what was resident then."""
    return (_resident("VmHWM") - before_kib) / 2**10


def _resident(field: str) -> int:
    """A field of Linux's process status, in KiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def useful_flops(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """FLOPs needed to score these examples: each token once, causal attention, and the head at scored tokens only.

    Work on padding, unused logits and repeated computations does not count.
    """
    config = model.config.get_text_config()
    lengths = [len(example.input_ids) for example in examples]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None) or max(lengths)
    # The i-th position attends to min(i, window) others: a multiplication and an addition each for scores and values.
    seen = sum(sum(min(at, window) for at in range(1, length + 1)) for length in lengths)
    attention = 4 * width * seen * config.num_hidden_layers
    head = 2 * model.get_output_embeddings().weight.numel() * sum(example.num_scored for example in examples)
    return float(2 * _active_parameters(model) * sum(lengths) + attention + head)


def _active_parameters(model: PreTrainedModel) -> float:
    """Number of backbone weights that multiply each token: matrices without embeddings, and only the routed experts."""
    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    routed: float = config.num_experts_per_tok / num_experts if num_experts else 1.0
    decoder = model.get_decoder()  # for a multimodal model, its language model
    embeddings = {id(module.weight) for module in decoder.modules() if isinstance(module, torch.nn.Embedding)}
    return sum(
        float(parameter.numel()) * (routed if parameter.ndim == 3 else 1.0)
        for parameter in decoder.parameters()
        if parameter.ndim >= 2 and id(parameter) not in embeddings
    )


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine and the libraries that the numbers were measured with."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
