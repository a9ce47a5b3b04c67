"""Passes of every family on fake CUDA tensors, in a process of their own: what they do is reported as JSON.

A fake tensor has no values, so whatever would wait for a GPU's values fails: a host sync is an error. So is a copy
between the CPU and the GPU that waits.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from families import EXPERTS, PACKABLE, config_of, draw_examples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from davir_ray.config.align import PAIR_LOSSES
from davir_ray.config.training import FinetuneConfig
from davir_ray.models.adapter import adapter_switched_off, add_adapter
from davir_ray.models.kernel import by_length, flash
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.pairs import PairSet

Tensors = Sequence[torch.Tensor]


class NoWaiting(TorchDispatchMode):
    """Refuses copies between the CPU and the GPU that wait for the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            waits = not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,))
            if waits and source.device.type != found.device.type:
                raise RuntimeError(f"a copy from {source.device.type} to {found.device.type} waits for the GPU")
        return found


def pretend() -> None:
    """Answer as a GPU would where a fake one cannot be asked."""
    torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign, assignment]
    torch.cuda.is_bf16_supported = lambda *_args, **_kwargs: True  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_args: (9, 0)  # type: ignore[assignment]
    torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def make(family: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(
        config_of(family), attn_implementation=PACKED_ATTENTION, dtype=dtype, **options
    )
    return model.eval()  # type: ignore[no-any-return]


def on_gpu(model: PreTrainedModel, mode: FakeTensorMode) -> Likelihood:
    """The model with fake weights and buffers; `Module.to` cannot exchange them."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None:
                    continue
                if id(value) not in moved:
                    with mode, torch.no_grad():
                        fake = mode.from_tensor(value.detach()).to("cuda")
                    is_weight = held is module._parameters
                    moved[id(value)] = torch.nn.Parameter(fake, value.requires_grad) if is_weight else fake
                held[name] = moved[id(value)]
    return Likelihood(model)


def score(family: str, mode: FakeTensorMode) -> Tensors:
    """As a scoring actor does: half precision, no gradients."""
    likelihood, pack = on_gpu(make(family, torch.bfloat16), mode), Pack.of(draw_examples())
    with mode, NoWaiting(), torch.no_grad():
        return [likelihood(pack)]


def score_adapter(family: str, mode: FakeTensorMode) -> Tensors:
    """As a scoring actor does with an adapter: the base's pass, with the adapter switched off, and the reference's."""
    model = make(family, torch.bfloat16)
    add_adapter(model, FinetuneConfig(), 4)
    likelihood, pack = on_gpu(model.eval(), mode), Pack.of(draw_examples())
    with mode, NoWaiting(), torch.no_grad():
        with adapter_switched_off(model):
            base_R = likelihood(pack)
        return [base_R, likelihood(pack)]


def backward(likelihood: Likelihood, loss: Callable[[], torch.Tensor], mode: FakeTensorMode) -> Tensors:
    """The gradients of a loss under autocast, activations recomputed."""
    likelihood.model.gradient_checkpointing_enable({"use_reentrant": False})
    likelihood.train()
    with mode, NoWaiting():
        with torch.autocast("cuda", torch.bfloat16):
            found = loss()
        found.backward()  # type: ignore[no-untyped-call]
    trained = {name: weight.grad for name, weight in likelihood.named_parameters() if weight.requires_grad}
    if missing := [name for name, gradient in trained.items() if gradient is None]:
        raise RuntimeError(f"without gradients: {missing}")
    return [found.detach(), *[gradient for gradient in trained.values() if gradient is not None]]


def train(family: str, mode: FakeTensorMode) -> Tensors:
    """As a fine-tune of all weights does, which are float32."""
    # Grouped products of a GPU take float32, but the fake one does not (torch 2.13): experts by batched products.
    options = {"experts_implementation": "batched_mm"} if family in EXPERTS else {}
    likelihood, pack = on_gpu(make(family, torch.float32, **options), mode), Pack.of(draw_examples())
    return backward(likelihood, lambda: likelihood(pack).sum(), mode)


def train_adapter(family: str, mode: FakeTensorMode) -> Tensors:
    """As a fine-tune of an adapter does: the base in half precision, the adapter in float32."""
    model = make(family, torch.bfloat16)
    add_adapter(model, FinetuneConfig(), 4)
    likelihood, pack = on_gpu(model, mode), Pack.of(draw_examples())
    return backward(likelihood, lambda: likelihood(pack).sum(), mode)


def train_pairs(loss: str, mode: FakeTensorMode) -> Tensors:
    """As preference training does, on three pairs."""
    examples = draw_examples()
    table = pa.table({
        "example_id": pa.array(range(len(examples)), pa.int64()),
        "input_ids": pa.array([ids for ids, _ in examples], pa.list_(pa.int32())),
        "response_spans": pa.array([list(spans) for _, spans in examples], pa.list_(pa.int32())),
    })  # fmt: skip
    pairs = PairSet(
        examples=TrainingSet.of([table]), ids=np.arange(3), frozen_logprobs=np.full(len(examples), -20.0),
        num_tokens=np.array(Pack.of(examples).num_scored), loss=loss, beta=0.1,
    )  # fmt: skip
    likelihood, rows = on_gpu(make("Llama", torch.float32), mode), np.arange(3)
    return backward(likelihood, lambda: pairs.sums(likelihood(pairs.pack(rows)), rows)[0], mode)


def reported(work: Callable[[FakeTensorMode], Tensors]) -> dict[str, Any]:
    """Device, type and shape of what the work returns; or the error, and the lines of models and kernel it is from."""
    lengths = [len(ids) for ids, _ in draw_examples()]
    # A loop over lengths, which dropout and soft caps need, reads them from the CPU; here those would be fake, too.
    by_length.lengths_of = lambda _edges: lengths  # type: ignore[assignment]
    try:
        found = work(FakeTensorMode(allow_non_fake_inputs=True))
        kinds = {f"{value.device.type} {str(value.dtype).removeprefix('torch.')}" for value in found}
        return {"kinds": sorted(kinds), "shapes": [list(value.shape) for value in found]}
    except Exception as error:  # noqa: BLE001 - reported, whatever it is
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        own = [line for line in lines if "davir_ray" in line or "transformers" in line]
        return {"error": f"{type(error).__name__}: {error}"[:300], "at": own[-2:]}


WORK = {"score": score, "score_adapter": score_adapter, "train": train, "train_adapter": train_adapter}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pretend()
    register_packed_attention()
    with FakeTensorMode():  # tried once in a process
        flash._one_split_is_taken(torch.device("cuda", 0), torch.bfloat16)
    everything = {name: {family: reported(partial(work, family)) for family in PACKABLE} for name, work in WORK.items()}
    everything["train_pairs"] = {loss: reported(partial(train_pairs, loss)) for loss in PAIR_LOSSES}
    sys.stdout.write(json.dumps(everything))
