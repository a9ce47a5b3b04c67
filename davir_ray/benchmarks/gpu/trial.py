"""One run of the benchmark: what it knows about the machine, and what its sections found."""

import gc
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trial:
    """The device, the time that is left, and the results, which are written after each of them."""

    device: torch.device
    smoke: bool
    """Whether only the script is tried, with tiny models on a CPU."""
    limit_s: float
    json: Path | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def is_cuda(self) -> bool:
        """Whether a GPU is tried."""
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        """The type that models are scored in: bfloat16 on a GPU."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() - self.started > self.limit_s

    def record(self, name: str, holds: bool | None, found: str, predicted: str = "", **values: Any) -> None:
        """Add a result: whether it holds (None: a number to be read), in words, with its values."""
        verdict = {True: "ok", False: "FAIL", None: ""}[holds]
        seconds = round(time.monotonic() - self.started, 1)
        row = {"name": name, "verdict": verdict, "found": found, "predicted": predicted, "seconds": seconds}
        self.results.append(row | {"values": values})
        log.info("%6.1f s  %-4s %s: %s", seconds, verdict, name, found)
        if self.json is not None:
            self.json.write_text(json.dumps(self.results, indent=1, default=str) + "\n")

    def value(self, name: str, key: str, default: float) -> float:
        """A value that an earlier result holds."""
        return next((float(row["values"][key]) for row in self.results if row["name"] == name), default)

    def seconds(self, job: Callable[[], object], repeats: int = 1) -> float:
        """Seconds of a job, from before its first launch to after its last kernel."""
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            job()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def wait(self) -> None:
        """Wait until the GPU has done what it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Give back what the last models held."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self, before: int = 0) -> float:
        """The peak of allocated memory since `clean`, beyond `before` bytes."""
        return (torch.cuda.max_memory_allocated() - before) / 2**30 if self.is_cuda else 0.0
