"""The device of this process: CPU or GPU, its types of computation, and its speed of matrix products."""

import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import torch

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ClusterError

DeviceKind = Literal["cpu", "cuda"]

_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of a precision setting on this device. auto: bfloat16 on a GPU that supports it, else float32."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[precision]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def uses_autocast(precision: str, device: torch.device) -> bool:
    """Whether a fine-tune with this precision computes in bfloat16 on this device, whatever the type of its weights."""
    return resolve_dtype(precision, device) is torch.bfloat16


def weights_precision(config: FinetuneConfig) -> Literal["auto", "float32", "bfloat16"]:
    """The type of the base's weights in a fine-tune: float32 if they are trained, the precision under an adapter."""
    return "float32" if config.lora_rank is None else config.precision


def worker_device(kind: DeviceKind, share: float = 1.0) -> torch.device:
    """The device that a stage gave to this worker, whatever else the machine has; of a GPU, perhaps only a share.

    Where several workers share a GPU, each may hold its share of the memory alone: one that needs more takes smaller
    packs. ClusterError if the worker has a share of a GPU and torch has none that the kernel runs on (cuda, which is
    ROCm's name, too).
    """
    if kind == "cuda" and not torch.cuda.is_available():
        other = torch.accelerator.current_accelerator()
        found = f"torch {torch.__version__} sees no GPU" if other is None else f"its accelerator is {other.type}"
        raise ClusterError(
            f"this worker on {platform.node()} was given a GPU, but {found}; install a torch for CUDA or ROCm, start "
            "Ray with --num-gpus 0, or give --score.num_gpus 0 and --finetune.use_gpu false"
        )
    if kind == "cuda" and share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    return torch.device(kind)


def device_name(device: torch.device) -> str:
    """The model of the GPU, or the vector instructions that torch uses on the CPU; another may round differently."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(torch.backends.cpu.get_cpu_capability())


def seconds(job: Callable[[], object], device: torch.device) -> float:
    """Seconds that a job takes: CPU time of this process, or time between two events on the GPU."""
    if device.type == "cpu":
        started = time.process_time()
        job()
        return time.process_time() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    job()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def gemm_flops(dtype: torch.dtype, device: torch.device, repeats: int = 9) -> float:
    """FLOP/s of a large matrix product in this process, the median of several repeats."""
    size = _GEMM_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / median(seconds(lambda: left @ right, device) for _ in range(repeats))
