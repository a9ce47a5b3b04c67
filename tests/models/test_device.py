"""The device of this process: what a precision means on it."""

import torch

from davir_ray.models.device import resolve_dtype


def test_auto_is_float32_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert [resolve_dtype(name, cpu) for name in ("float32", "bfloat16", "float64")] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
