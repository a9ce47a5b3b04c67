"""Losses by a plain loop, to hold the kernel's against: float32, one example at a time, transformers' own forward."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.device import local_device
from davir_ray.models.kernel.packing import Spans
from davir_ray.models.kernel.self_check import eager_nll

Examples = Sequence[tuple[npt.NDArray[np.int32], Spans]]
Nlls = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlainScorer:
    """Base and reference, loaded one after the other: in float32 both may not fit.

    An adapter is never switched off, and is loaded by peft itself: what scoring does with it is what is checked.
    """

    base: Checkpoint
    reference: Checkpoint

    def __call__(self, examples: Examples) -> tuple[Nlls, Nlls]:
        """Summed nats of each example's response under the base and under the reference."""
        device = local_device()
        base = _nlls(self.base.model(torch.float32, device), examples)
        gc.collect()
        if self.reference.is_adapter:
            reference = self.reference.as_peft(self.base.model(torch.float32, device))
        else:
            reference = self.reference.model(torch.float32, device)
        return base, _nlls(reference, examples)


def _nlls(model: PreTrainedModel, examples: Examples) -> Nlls:
    return np.array([float(eager_nll(model, ids, spans).double().sum()) for ids, spans in examples])
