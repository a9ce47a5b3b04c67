"""The oracle of the checks: token losses by transformers' own forward with eager attention, one sequence at a time.

It shares no code with the kernel. In half precision the scores and their softmax are computed in float32: eager
attention rounds the scores to bfloat16, which moves losses more than flash attention does (Qwen2-7B's perplexity is
7.9967 with eager attention, 7.1338 with flash attention and 7.1378 in float32: transformers#33317).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from davir_ray.errors import ModelError
from davir_ray.models.kernel.likelihood import active_head
from davir_ray.models.kernel.packing import Spans, scored_positions
from davir_ray.text import one_line

if TYPE_CHECKING:  # transformers' models take seconds to import, and a driver loads none
    from transformers import PreTrainedModel

_HALF = (torch.bfloat16, torch.float16)


def eager_nll(model: PreTrainedModel, input_ids: npt.NDArray[np.int32], spans: Spans) -> torch.Tensor:
    """NLL in nats of every scored token, [R]; differentiable. ModelError if the model cannot run in its type."""
    ids_1T = torch.from_numpy(input_ids.astype(np.int64))[None].to(model.device)
    before = model.config._attn_implementation
    use_attention(model, "eager")
    try:
        with _scores_in_float32(model), _logits_in_float32(model):
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    except RuntimeError as error:
        raise ModelError(f"{type(model).__name__} cannot run in {model.dtype}: {one_line(error)}") from error
    finally:
        use_attention(model, before)
    scored = torch.from_numpy(scored_positions(spans))
    logprobs_RV = torch.log_softmax(logits_TV[scored - 1], dim=-1)
    return -logprobs_RV.gather(1, ids_1T[0, scored][:, None]).squeeze(1)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the attention of a model.

    Families that do not use AttentionInterface ignore set_attn_implementation but choose their mask by the name in the
    configuration: with PACKED_ATTENTION there, Bloom and CodeGen would silently attend to later tokens.
    """
    model.set_attn_implementation(name)
    model.config._attn_implementation = name


@contextmanager
def _scores_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let eager attention compute in float32, if the model is in half precision and uses AttentionInterface."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.dtype not in _HALF and not torch.is_autocast_enabled(model.device.type):
        yield
        return
    # By the name itself: some families do other things for another name.
    ALL_ATTENTION_FUNCTIONS["eager"] = _own_attention_in_float32
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]


def _own_attention_in_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The eager attention of the module's own family, with its sinks and caps, in float32."""
    of_class = (vars(sys.modules[cls.__module__]).get("eager_attention_forward") for cls in type(module).__mro__)
    attend: Callable[..., Any] = next(function for function in of_class if function is not None)
    with torch.autocast(query.device.type, enabled=False):
        output, weights = attend(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(value.dtype), weights


@contextmanager
def _logits_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let a head on a GPU return float32, as the kernel's does: bfloat16 rounds logits above 64 by up to 0.25 nats."""

    def product(head: Any, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)

    head = active_head(model)
    if model.device.type != "cuda" or model.dtype not in _HALF or type(head) is not torch.nn.Linear:
        yield
        return
    hook = head.register_forward_hook(product)
    try:
        yield
    finally:
        hook.remove()
