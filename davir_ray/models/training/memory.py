"""The memory that a fine-tune takes on a device, estimated before it begins.

Weights, gradients and moments are counted. Activations are those of a forward and backward pass of the model itself,
run on fake tensors: they have shapes and no values, so a 70B model passes in seconds and without memory.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ModelError
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.device import DeviceKind, weights_precision
from davir_ray.models.kernel.attention import PACKED_ATTENTION
from davir_ray.models.kernel.layers import layers_of
from davir_ray.models.kernel.likelihood import TOKENS_PER_PACK, Likelihood
from davir_ray.models.training.loop import recompute_activations
from davir_ray.models.training.model import freeze_what_text_does_not_reach, switch_off_dropout
from davir_ray.text import one_line

_SEQUENCE = 1024
"""Tokens of each sequence of the pack that is tried; only attention that is written out depends on it."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on each device at the moment of a step that takes the most."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two."""
    gathered: int
    """The ends of a sharded model (embedding, head, last norm), which stay whole during a pass."""
    activations: int
    """What the passes allocate: activations, temporary tensors and, if sharded, the layers that are at work."""

    @property
    def state(self) -> int:
        """All but the activations: what no smaller pack would save."""
        return self.weights + self.gradients + self.moments + self.gathered

    @property
    def total(self) -> int:
        """The sum."""
        return self.state + self.activations


class TrainedModel:
    """A base as a fine-tune with these settings would train it on devices of a kind, without its weights.

    Every method raises ModelError if the model cannot be built. Dropout is left out, whose masks take little.
    """

    def __init__(self, base: Checkpoint, config: FinetuneConfig, kind: DeviceKind, *, has_bfloat16: bool) -> None:
        self._config, self._kind = config, kind
        self._autocast = has_bfloat16 if config.precision == "auto" else config.precision == "bfloat16"
        self._half_weights = self._autocast and weights_precision(config) != "float32"
        self._make = partial(base.skeleton, PACKED_ATTENTION)

    def memory(self, *, strategy: str, num_workers: int, recompute: bool) -> TrainingMemory:
        """The memory on each device; ModelError if the model's passes cannot be run on fake tensors."""
        state = self.state(strategy=strategy, num_workers=num_workers)
        try:
            activations = self._activations(num_workers if strategy == "fsdp" else 1, recompute=recompute)
        except Exception as error:  # whatever a family's code does with tensors that have no values
            name = type(self._counted).__name__
            raise ModelError(f"what {name} needs for its activations cannot be estimated: {one_line(error)}") from error
        return TrainingMemory(**vars(state) | {"activations": activations})

    def state(self, *, strategy: str, num_workers: int) -> TrainingMemory:
        """The memory without activations; ModelError if a model cannot be sharded that would have to be."""
        model = self._counted
        inside: set[int] = set()
        if is_sharded := strategy == "fsdp":
            if model.is_remote_code():
                raise ModelError(f"{type(model).__name__} comes with its own code, so it cannot be sharded")
            inside = {id(parameter) for layer in _layers(model) for parameter in layer.parameters()}
        num_parts = num_workers if is_sharded else 1
        trained = _num_bytes(_trained(model), num_parts)
        return TrainingMemory(
            weights=_num_bytes(model.parameters(), num_parts),
            gradients=trained,
            moments=2 * trained,
            gathered=_num_bytes(p for p in model.parameters() if id(p) not in inside) if is_sharded else 0,
            activations=0,
        )

    @cached_property
    def _counted(self) -> PreTrainedModel:
        return self._built()

    def _built(self) -> PreTrainedModel:
        model: PreTrainedModel = self._make().to(torch.bfloat16 if self._half_weights else torch.float32)
        if self._config.lora_rank is not None:
            with torch.random.fork_rng(devices=[]):
                add_adapter(model, self._config, self._config.lora_rank)
        freeze_what_text_does_not_reach(model)
        return model

    def _activations(self, num_parts: int, *, recompute: bool) -> int:
        """The most that a forward and backward pass of a pack allocates beside the model's weights and gradients."""
        model = self._built()
        layers = _layers(model) if num_parts > 1 else []
        if self._autocast:
            for layer in layers:
                layer.to(torch.bfloat16)  # the type that it is gathered in, so that autocast makes no copies
        in_forward, in_backward = _held_for_layers(layers, num_parts)
        num_tokens = self._config.tokens_per_pack or TOKENS_PER_PACK[self._kind]
        length = min(_SEQUENCE, num_tokens)
        with FakeTensorMode():
            likelihood = self._fake(model, layers, recompute=recompute)
            # Rows of equal length, for which packed attention needs no places.
            ids_NL = torch.zeros(-(-num_tokens // length), length, dtype=torch.int64)
            places = {"position_ids": torch.arange(length).expand_as(ids_NL), "attention_mask": None}
            with _Allocations() as allocations:
                allocations.hold(in_forward)
                with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
                    hidden_NLH = model.base_model(input_ids=ids_NL, use_cache=False, **places).last_hidden_state
                    hidden_NLH.register_hook(lambda _: allocations.hold(in_backward - in_forward))
                    nll_R = likelihood.head_nll(hidden_NLH.flatten(0, 1), ids_NL.flatten())
                nll_R.sum().backward()  # type: ignore[no-untyped-call]
        return int(allocations.maximum)

    def _fake(self, model: PreTrainedModel, layers: list[torch.nn.Module], *, recompute: bool) -> Likelihood:
        """The model with fake weights, ready for a pass; `layers` are those of a sharded one, else none."""
        _make_fake(model)
        likelihood = Likelihood(model, self._kind).train()
        switch_off_dropout(model)  # with dropout, attention on a CPU is written out; on a GPU it is not
        if recompute:
            recompute_activations(model)
        for layer in layers:
            for parameter in _trained(layer):  # summed over the devices at once, and not kept
                parameter.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]
        if not layers:
            for parameter in _trained(model):
                parameter.grad = torch.zeros_like(parameter)  # that of an earlier pack, which this one's is added to
        return likelihood


def _held_for_layers(layers: list[torch.nn.Module], num_workers: int) -> tuple[int, int]:
    """Bytes that a sharded model holds for the layer that runs, forward and backward, at most.

    Forward: the layer, and the buffer that the next one is gathered in. Backward: the next one, too, and the layer's
    gradients with the float32 copy of them that is summed.
    """
    forward = backward = 0
    for layer in layers:
        gathered, parts = _num_bytes(layer.parameters()), _num_bytes(layer.parameters(), num_workers)
        summed = sum(4 * num_workers * _part(parameter, num_workers) for parameter in _trained(layer))
        forward = max(forward, gathered + num_workers * parts)
        backward = max(backward, 2 * gathered + num_workers * parts + _num_bytes(_trained(layer)) + summed)
    return forward, backward


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made in its block and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maximum = 0
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view or a result in place shares the storage of an argument, which may be older than the block.
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is torch.float32:
            # Of experts; the fake one takes bfloat16 alone (torch 2.13), that of a GPU float32, too.
            result = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {})).float()
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.maximum = max(self.maximum, self._now)
        return result

    def hold(self, num_bytes: int) -> None:
        """Count as many bytes more from now on."""
        self._now += num_bytes
        self.maximum = max(self.maximum, self._now)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self._now -= num_bytes


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return layers_of(model, otherwise="give --finetune.strategy ddp")


def _tensors(found: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _make_fake(model: PreTrainedModel) -> None:
    """Put the fake mode's tensors in the place of the model's, tied ones in all of theirs."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                table[name] = made[id(tensor)]


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _num_bytes(tensors: Iterable[torch.Tensor], num_workers: int = 1) -> int:
    """Bytes of tensors; of their parts on the first device, if they are sharded."""
    return sum(_part(tensor, num_workers) * tensor.element_size() for tensor in tensors)


def _part(tensor: torch.Tensor, num_workers: int) -> int:
    """Numbers of a tensor that the first device holds: its rows are dealt, and there may be fewer than devices."""
    if tensor.ndim == 0:
        return 1
    return -(-len(tensor) // num_workers) * (tensor.numel() // max(1, len(tensor)))
