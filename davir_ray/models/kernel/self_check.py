"""The check at start-up: can this model be packed, and if not, is there another way to reproduce its own losses?

Models are distinguished by what they compute, never by a list of names.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from davir_ray.errors import ModelError
from davir_ray.models.kernel.likelihood import Likelihood, Pack, active_head
from davir_ray.models.kernel.packing import Spans, scored_positions
from davir_ray.text import one_line

if TYPE_CHECKING:  # transformers' models take seconds to import, and a driver loads none
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_LONGEST_CHECK = 1100
"""Maximum length of the check's sequences: the memory of eager attention grows with its square."""


def self_check(likelihood: Likelihood) -> str:
    """Compare a pack of short sequences with transformers' own eager forward, one at a time; call before scoring.

    Returns how the model will be run: 'packed', or, with a warning, 'padded' and the name of its attention if packing
    is not exact (attention sinks, ALiBi, linear attention). ModelError if padded losses differ, too, because the head
    does something unknown, or if the model is not causal.
    """
    model, family = likelihood.model, type(likelihood.model).__name__
    examples = _check_examples(model)
    expected = [eager_nll(model, ids, spans) for ids, spans in examples]
    if not torch.cat(expected).isfinite().all():
        raise ModelError(
            f"{family} gives losses that are not finite; its weights may be damaged, or too large for {model.dtype}"
        )
    _check_causal(model, *examples[-1])
    if likelihood.packed:
        difference = _difference(likelihood, examples, expected)
        if difference <= _tolerance(model.dtype):
            return "packed"
        log.warning(
            "%s cannot be packed exactly (%s); it is run in padded batches, which is slower",
            family, "its forward refuses it" if math.isinf(difference) else f"losses differ by {difference:.3g} nats",
        )  # fmt: skip
    likelihood.packed = False
    for attention in ("sdpa", "eager"):
        if attention == "sdpa" and not model._supports_sdpa:
            continue
        _use_attention(model, attention)
        difference = _difference(likelihood, examples, expected)
        if difference <= _tolerance(model.dtype):
            return f"padded, {attention}"
    raise ModelError(f"{family} cannot be scored exactly: its losses differ by {difference:.3g} nats from its own")


def probe(likelihood: Likelihood) -> torch.Tensor:
    """Losses of the check's sequences: if they are bitwise equal before and after a step, the step changed nothing."""
    with torch.inference_mode():
        return torch.as_tensor(likelihood(Pack.of(_check_examples(likelihood.model)))).cpu()


def _check_examples(model: PreTrainedModel) -> list[tuple[npt.NDArray[np.int32], Spans]]:
    """Short sequences, one longer than the sliding window, and on a GPU one of several blocks of flash attention."""
    config = model.config.get_text_config()
    lengths = [3, 8, 8, 21]
    window = getattr(config, "sliding_window", None) or 0
    longest = min(_LONGEST_CHECK, int(getattr(config, "max_position_embeddings", None) or _LONGEST_CHECK))
    if model.device.type == "cuda":
        lengths += [length for length in (200, window + 9) if length <= longest]
    elif window and window + 9 <= longest:
        lengths.append(window + 9)
    tokens = np.random.default_rng(0)
    drawn = [tokens.integers(0, int(config.vocab_size), length, dtype=np.int32) for length in sorted(lengths)]
    return [(input_ids, (1, len(input_ids))) for input_ids in drawn]


def _difference(
    likelihood: Likelihood, examples: list[tuple[npt.NDArray[np.int32], Spans]], expected: list[torch.Tensor]
) -> float:
    """The largest difference in nats per token; infinite if the model refuses the call.

    In half precision the 0.9 quantile: rounding may route a few tokens to other experts.
    """
    with torch.inference_mode():
        try:
            nll_R = likelihood(Pack.of(examples)).cpu()
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{type(likelihood.model).__name__} leaves no room on this device for a pack: {error}"
            ) from error
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            log.info("the packed forward was refused: %s", error)
            return float("inf")
    differences_R = (nll_R - torch.cat(expected)).abs().nan_to_num(float("inf"))
    exact = likelihood.model.dtype in (torch.float32, torch.float64)
    return float(differences_R.max() if exact else differences_R.quantile(0.9))


def eager_nll(model: PreTrainedModel, input_ids: npt.NDArray[np.int32], spans: Spans) -> torch.Tensor:
    """Token losses by transformers' own full forward with eager attention, which shares no code with the kernel."""
    ids_1T = torch.from_numpy(input_ids.astype(np.int64))[None].to(model.device)
    before = model.config._attn_implementation
    _use_attention(model, "eager")
    try:
        with torch.inference_mode(), _logits_in_float32(model):
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    except RuntimeError as error:
        raise ModelError(f"{type(model).__name__} cannot run in {model.dtype}: {one_line(error)}") from error
    finally:
        _use_attention(model, before)
    scored = torch.from_numpy(scored_positions(spans))
    logprobs_RV = torch.log_softmax(logits_TV[scored - 1], dim=-1)
    return -logprobs_RV.gather(1, ids_1T[0, scored][:, None]).squeeze(1).cpu()


@contextmanager
def _logits_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let a head on a GPU return float32, as the kernel's does: bfloat16 rounds logits above 64 by up to 0.25 nats."""

    def product(head: Any, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)

    head = active_head(model)
    half = model.dtype in (torch.bfloat16, torch.float16)
    if model.device.type != "cuda" or not half or type(head) is not torch.nn.Linear:
        yield
        return
    hook = head.register_forward_hook(product)
    try:
        yield
    finally:
        hook.remove()


def _use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the attention of a model.

    Families that do not use AttentionInterface ignore set_attn_implementation but choose their mask by the name in the
    configuration: with PACKED_ATTENTION there, Bloom and CodeGen would silently attend to later tokens.
    """
    model.set_attn_implementation(name)
    model.config._attn_implementation = name


def _check_causal(model: PreTrainedModel, input_ids: npt.NDArray[np.int32], spans: Spans) -> None:
    """Raise ModelError if, in the model's own forward, a token's loss depends on a later token."""
    changed = input_ids.copy()
    changed[-1] = (changed[-1] + 1) % int(model.config.get_text_config().vocab_size)
    difference = (eager_nll(model, input_ids, spans)[:-1] - eager_nll(model, changed, spans)[:-1]).abs().max()
    if not difference <= _tolerance(model.dtype):
        raise ModelError(f"{type(model).__name__} is not a causal model: its losses depend on later tokens")


def _tolerance(dtype: torch.dtype) -> float:
    """The allowed difference in nats per token.

    Of 33 families tried in float32, those that can be packed differ by at most 7e-5 and the others by whole nats.
    """
    return 2e-3 if dtype in (torch.float32, torch.float64) else 0.3
