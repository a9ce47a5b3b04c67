"""How long a job takes on this device, and how fast the device multiplies: the floor of every comparison."""

import time
from collections.abc import Callable
from statistics import median

import torch

_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def seconds(job: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of this process, or seconds of the GPU between two events."""
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
    """FLOP/s of a large matrix product in this process, the median of some."""
    size = _GEMM_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / median(seconds(lambda: left @ right, device) for _ in range(repeats))
