"""The device of this process: what a precision means on it."""

import pytest
import torch

from davir_ray.errors import ClusterError
from davir_ray.models.device import resolve_dtype, worker_device


def test_auto_is_float32_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert [resolve_dtype(name, cpu) for name in ("float32", "bfloat16", "float64")] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]


def test_a_worker_without_a_share_of_a_gpu_uses_the_cpu_of_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker_device("cpu") == torch.device("cpu")
    assert worker_device("cuda") == torch.device("cuda")


@pytest.mark.parametrize(
    ("accelerator", "told"),
    [(None, "sees no GPU"), ("xpu", "its accelerator is xpu"), ("mps", "its accelerator is mps")],
)
def test_a_share_of_a_gpu_that_torch_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, accelerator: str | None, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    with pytest.raises(ClusterError, match=told):
        worker_device("cuda")


def test_a_worker_that_shares_a_gpu_may_hold_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    worker_device("cuda")
    worker_device("cpu", 0.5)
    worker_device("cuda", 0.5)
    assert limits == [0.5]
