"""The check at start-up: can this model be packed, and if not, is there another way to reproduce its own losses?

It is made in the arithmetic of the work that follows: on its device, under its autocast, and with gradients if it
trains. Models are distinguished by what they compute, never by a list of names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from davir_ray.errors import ModelError
from davir_ray.models.kernel.eager import eager_nll, use_attention
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.packing import Spans
from davir_ray.text import one_line

if TYPE_CHECKING:  # transformers' models take seconds to import, and a driver loads none
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Example = tuple[npt.NDArray[np.int32], Spans]

_WINDOW = 8
"""Longest attention window during the check: an error of one token shows, and eager attention over a window of 4,096
would take gigabytes."""

_GRADIENT_TOLERANCE = {True: 1e-2, False: 0.3}
"""The allowed relative difference of a sequence's gradient, by whether the arithmetic is float32 or better."""


def self_check(likelihood: Likelihood, *, autocast: bool = False, gradients: bool = False) -> str:
    """Compare a pack of short sequences with transformers' own eager forward, one at a time; call before any work.

    `autocast`: the work runs under bfloat16 autocast; `gradients`: it trains. Returns how the model will be run:
    'packed', or, with a warning, 'padded' and the name of its attention if packing is not exact (attention sinks,
    ALiBi, linear attention). ModelError if padded losses differ, too, because the head does something unknown, if the
    model is not causal, or if compiled layers differ by more than uncompiled ones may.
    """
    model = likelihood.model
    arithmetic = torch.autocast(model.device.type, torch.bfloat16, enabled=autocast)
    with arithmetic, _short_windows(model), torch.set_grad_enabled(gradients):
        with torch.compiler.set_stance("force_eager") if likelihood.compiled else nullcontext():
            expected = Expected.of(model, gradients=gradients)
            attention = _way_to_run(likelihood, expected)
        if likelihood.compiled:
            _check_compiled(likelihood, expected)
    if likelihood.compiled:
        # Layers with a window are compiled again for its full length: on every worker by the same pack, because torch
        # may write other code for another pack.
        with arithmetic:
            probe(likelihood)
    return attention


def _way_to_run(likelihood: Likelihood, expected: Expected) -> str:
    """How the model must be run for the expected losses; raises ModelError if there is no way."""
    model, family = likelihood.model, type(likelihood.model).__name__
    _check_causal(model, expected)
    if likelihood.packed:
        fault = expected.fault_of(likelihood)
        if fault is None:
            return "packed"
        log.warning("%s cannot be packed exactly (%s); it is run in padded batches, which is slower", family, fault)
    likelihood.packed = False
    for attention in ("sdpa", "eager"):
        if attention == "sdpa" and not model._supports_sdpa:
            continue
        use_attention(model, attention)
        fault = expected.fault_of(likelihood)
        if fault is None:
            return f"padded, {attention}"
    raise ModelError(f"{family} cannot be scored exactly: {fault}")


def _check_compiled(likelihood: Likelihood, expected: Expected) -> None:
    """Raise ModelError unless compiled layers give the expected losses, within the limit of those that are not."""
    with torch.inference_mode():  # as the work is: in another mode torch would compile them again
        fault = expected.fault_of(likelihood)
    if fault is not None:
        raise ModelError(
            f"score.compile is true, but with compiled layers {type(likelihood.model).__name__} cannot be scored "
            f"exactly: {fault}; leave score.compile false"
        )


def probe(likelihood: Likelihood, examples: list[Example] | None = None) -> torch.Tensor:
    """Losses of the check's sequences: if they are bitwise equal before and after a step, the step changed nothing."""
    with torch.inference_mode() if likelihood.compiled else torch.no_grad():
        return torch.as_tensor(likelihood(Pack.of(examples or check_examples(likelihood.model)))).cpu()


def check_examples(model: PreTrainedModel) -> list[Example]:
    """Short sequences, one longer than the sliding window, and on a GPU one of several blocks of flash attention."""
    config = model.config.get_text_config()
    lengths = [3, 8, 8, 21]
    if model.device.type != "cpu":
        lengths.append(200)
    if window := getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        lengths.append(min(window, _WINDOW) + 25)
    longest = int(getattr(config, "max_position_embeddings", None) or max(lengths))
    drawn = np.random.default_rng(0)
    return [
        (drawn.integers(0, int(config.vocab_size), length, dtype=np.int32), (1, length))
        for length in sorted(lengths)
        if length <= longest
    ]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What transformers' own eager forward gives for the check's sequences."""

    examples: list[Example]
    nlls: list[torch.Tensor]
    """Of each sequence, in nats."""
    gradients: list[torch.Tensor] | None
    """Of each sequence's summed loss with respect to its embedded tokens, [L, H]; None unless they are checked."""
    exact: bool
    """Whether the arithmetic is float32 or better."""
    routes: bool
    """Whether tokens share products of a size that depends on other tokens: those of experts."""

    @classmethod
    def of(cls, model: PreTrainedModel, *, gradients: bool) -> Expected:
        """Raises ModelError if a loss is not finite."""
        examples = check_examples(model)
        found = [_with_gradient(model, partial(eager_nll, model, *each), gradients) for each in examples]
        nlls = [nll for nll, _ in found]
        if not torch.cat(nlls).isfinite().all():
            raise ModelError(
                f"{type(model).__name__} gives losses that are not finite; its weights may be damaged, or too large "
                f"for {model.dtype}"
            )
        return cls(
            examples=examples,
            nlls=nlls,
            gradients=[gradient[0] for _, gradient in found if gradient is not None] or None,
            exact=model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(model.device.type),
            routes=any(parameter.ndim == 3 for parameter in model.parameters()),  # experts' matrices in one tensor
        )

    def fault_of(self, likelihood: Likelihood) -> str | None:
        """What is not as expected when all sequences are run together; None if all is."""
        lengths = [len(input_ids) for input_ids, _ in self.examples]
        try:
            nll_R, gradient = _with_gradient(
                likelihood.model, lambda: likelihood(Pack.of(self.examples)), self.gradients is not None
            )
            nlls = _by_example(nll_R, self.examples)
            difference = self._difference(nlls, self.nlls)
            if not difference <= tolerance(exact=self.exact):
                limit = tolerance(exact=self.exact)
                return f"losses differ by {difference:.3g} nats, where {limit:g} are allowed"
            if likelihood.packed and (leaked := self._leaked(likelihood, nlls)):
                return f"losses of a sequence change by {leaked:.3g} nats with the other sequences of its pack"
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{type(likelihood.model).__name__} leaves no room on this device for a pack: {error}"
            ) from error
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return f"its forward refuses it: {one_line(error, 200)}"
        if gradient is None or self.gradients is None or not likelihood.packed:
            return None
        parts = torch.split(gradient[0], lengths)
        differences = [float((a - b).norm() / b.norm()) for a, b in zip(parts, self.gradients, strict=True)]
        if self.routes and not self.exact:  # a token that goes to another expert has another gradient
            differences = [float(np.median(differences))]
        if not max(differences) <= _GRADIENT_TOLERANCE[self.exact]:
            return f"the gradient of a sequence differs by {max(differences):.2g} of its norm"
        return None

    def _difference(self, nlls: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        """The largest difference in nats.

        In half precision, of a sequence's mean; of its median where rounding sends single tokens to other experts.
        """
        of_sequence = torch.max if self.exact else torch.median if self.routes else torch.mean
        differences = [(a - b).abs().nan_to_num(torch.inf) for a, b in zip(nlls, others, strict=True)]
        return max(float(of_sequence(each)) for each in differences)

    def _leaked(self, likelihood: Likelihood, nlls: list[torch.Tensor]) -> float:
        """By how much a sequence's losses change if all other tokens of its pack change; 0: by no bit.

        Where bits depend on other things, too (experts, a device that does not repeat itself), up to rounding.
        """
        with torch.no_grad():
            again = _by_example(likelihood(Pack.of(self.examples)), self.examples)
            repeats = all(torch.equal(a, b) for a, b in zip(again, nlls, strict=True))
            size = int(likelihood.model.config.get_text_config().vocab_size)
            found = list(nlls)
            for at in range(len(self.examples)):
                others = [
                    (ids if index == at else (ids + 1 + at) % size, spans)
                    for index, (ids, spans) in enumerate(self.examples)
                ]
                found[at] = _by_example(likelihood(Pack.of(others)), self.examples)[at]
        difference = self._difference(found, nlls)
        rounding = tolerance(exact=self.exact) if self.routes or not repeats else 0.0
        return difference if difference > rounding else 0.0


def _by_example(nll_R: torch.Tensor, examples: list[Example]) -> list[torch.Tensor]:
    return list(torch.split(nll_R.detach().cpu(), [len(input_ids) - 1 for input_ids, _ in examples]))


def _with_gradient(
    model: PreTrainedModel, losses: Callable[[], torch.Tensor], wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The losses on the CPU, and the gradient of their sum with respect to the embedded tokens, if wanted, [1, T, H].

    It passes through every layer, and takes no room for gradients of weights.
    """
    if not wanted:
        return losses().detach().cpu(), None
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        nll_R = losses()
    finally:
        hook.remove()
    parts = torch.autograd.grad(nll_R.sum(), embedded)  # several if the kernel cuts the pack
    return nll_R.detach().cpu(), torch.cat(parts, dim=1).float().cpu()


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten attention windows, so that a short sequence is longer than one."""
    owners = [*model.modules(), *_configs(model)]
    names = ("sliding_window", "attention_chunk_size")
    changed = [(owner, name, vars(owner).get(name)) for owner in owners for name in names]
    changed = [entry for entry in changed if isinstance(entry[2], int) and entry[2] > _WINDOW]
    for owner, name, _ in changed:
        setattr(owner, name, _WINDOW)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    yield model.config.get_text_config()
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None and hasattr(config, "__dict__"):
            yield config


def _check_causal(model: PreTrainedModel, expected: Expected) -> None:
    """Raise ModelError if, in the model's own forward, a token's loss depends on a later token."""
    input_ids, spans = expected.examples[-1]
    changed = input_ids.copy()
    changed[-1] = (changed[-1] + 1) % int(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        difference = (expected.nlls[-1][:-1] - eager_nll(model, changed, spans)[:-1].cpu()).abs().max()
    if not difference <= tolerance(exact=expected.exact):
        raise ModelError(f"{type(model).__name__} is not a causal model: its losses depend on later tokens")


def tolerance(*, exact: bool) -> float:
    """The allowed difference in nats: of a token in float32 or better, else of a sequence.

    Of 33 families tried in float32, those that can be packed differ by at most 7e-5 and the others by whole nats.
    """
    return 2e-3 if exact else 0.3
