"""The likelihood kernel: packed examples → negative log-likelihood of every scored token.

The one kernel of scoring, fine-tuning and held-out loss. The backbone runs over the pack without padding; the head runs
only on the hidden rows that predict scored tokens, in chunks, so no [tokens, vocabulary] tensor ever exists, in the
backward pass neither.

Letters in tensor names: T tokens of the pack, R scored tokens of the pack, C rows of one chunk, H hidden, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from davir_ray.data.packing import Spans, scored_positions
from davir_ray.errors import ModelError
from davir_ray.formulas.losses import token_nll
from davir_ray.models.attention import PACKED_ATTENTION

log = logging.getLogger(__name__)

NUMERICS_VERSION = 1
"""Raised when a change here may change the bits of a score; part of the score stage's fingerprint."""

_CHUNK_ROWS = {"cpu": 256, "cuda": 1024}

TOKENS_PER_PACK = {"cpu": 1024, "cuda": 16384}
"""Token budget of a pack unless the settings say otherwise: on a CPU what its caches hold (4096 took 1.6 times as long
for a model of hidden size 256), on a GPU what keeps it busy."""


@dataclass(frozen=True)
class Pack:
    """Examples laid end to end, with the rows that predict their scored tokens."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    predictors_R: torch.Tensor
    """Positions in the pack whose hidden state predicts a scored token."""
    targets_R: torch.Tensor
    """The scored tokens."""
    sequence_lengths: tuple[int, ...]
    num_scored: tuple[int, ...]
    """Scored tokens of each example; they lie end to end in R."""

    @classmethod
    def of(cls, examples: Sequence[tuple[npt.NDArray[np.int32], Spans]]) -> "Pack":
        """Lay out (input_ids, response_spans) of examples. No span may begin at token 0: nothing predicts it."""
        predictors, targets, num_scored = [], [], []
        start = 0
        for input_ids, spans in examples:
            scored = scored_positions(spans)
            if len(scored) == 0 or scored[0] < 1 or scored[-1] >= len(input_ids):
                raise ValueError(f"spans {list(spans)} do not fit {len(input_ids)} tokens, the first being unpredicted")
            predictors.append(scored - 1 + start)
            targets.append(input_ids[scored])
            num_scored.append(len(scored))
            start += len(input_ids)
        lengths = tuple(len(input_ids) for input_ids, _ in examples)
        return cls(
            input_ids_T=torch.from_numpy(np.concatenate([ids for ids, _ in examples]).astype(np.int64)),
            position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
            predictors_R=torch.from_numpy(np.concatenate(predictors)),
            targets_R=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            sequence_lengths=lengths,
            num_scored=tuple(num_scored),
        )


class Likelihood(torch.nn.Module):
    """Token likelihoods under one causal language model loaded with PACKED_ATTENTION."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.packed = model.config._attn_implementation == PACKED_ATTENTION
        """Cleared when the self-check finds that this architecture cannot be packed exactly."""
        self._chunk_rows = _CHUNK_ROWS.get(model.device.type, 1024)

    def forward(self, pack: Pack) -> torch.Tensor:
        """NLL in nats of every scored token of the pack, float32 at least, [R]; differentiable."""
        hidden_RH = self._hidden_packed(pack) if self.packed else self._hidden_one_by_one(pack)
        targets_R = pack.targets_R.to(hidden_RH.device)
        chunks = zip(torch.split(hidden_RH, self._chunk_rows), torch.split(targets_R, self._chunk_rows), strict=True)
        if torch.is_grad_enabled():
            # Logits of a chunk are recomputed in the backward pass instead of kept.
            return torch.cat([checkpoint(self._head_nll, h, t, use_reentrant=False) for h, t in chunks])
        return torch.cat([self._head_nll(hidden, targets) for hidden, targets in chunks])

    def _hidden_packed(self, pack: Pack) -> torch.Tensor:
        device = self.model.device
        hidden_1TH = self.model.base_model(
            input_ids=pack.input_ids_T[None].to(device),
            position_ids=pack.position_ids_T[None].to(device),
            attention_mask=None,
            use_cache=False,
            sequence_lengths=pack.sequence_lengths,
        ).last_hidden_state
        return torch.as_tensor(hidden_1TH[0][pack.predictors_R.to(device)])

    def _hidden_one_by_one(self, pack: Pack) -> torch.Tensor:
        """The slow, safe way: the backbone as transformers runs it, one sequence at a time."""
        rows = [
            self.model.base_model(input_ids=ids_L[None].to(self.model.device), use_cache=False).last_hidden_state[0]
            for ids_L in torch.split(pack.input_ids_T, list(pack.sequence_lengths))
        ]
        return torch.cat(rows)[pack.predictors_R.to(self.model.device)]

    def _head_nll(self, hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        logits_CV = self.model.get_output_embeddings()(hidden_CH)
        return token_nll(_adjust_logits(self.model.config, logits_CV), targets_C)


def _adjust_logits(config: object, logits: torch.Tensor) -> torch.Tensor:
    """What some families do to the head's output: Cohere and Granite scale it, Gemma 2 caps it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def self_check(likelihood: Likelihood) -> str:
    """Compare a pack of short sequences with transformers' own eager forward, one at a time; call before scoring.

    Returns how the model will be run: 'packed', or 'one_by_one' with a warning where packing is not exact (attention
    sinks, ALiBi, linear attention). ModelError where even that differs, because the head does something unknown.
    """
    model, family = likelihood.model, type(likelihood.model).__name__
    examples = _check_examples(int(model.config.get_text_config().vocab_size))
    expected = [_eager_nll(model, ids, spans) for ids, spans in examples]
    if not torch.cat(expected).isfinite().all():
        raise ModelError(
            f"{family} gives losses that are not finite; its weights may be damaged, or too large for {model.dtype}"
        )
    _check_causal(model, *examples[-1])
    if likelihood.packed and _largest_difference(likelihood, examples, expected) <= _tolerance(model.dtype):
        return "packed"
    likelihood.packed = False
    use_attention(model, "eager")
    difference = _largest_difference(likelihood, examples, expected)
    if not difference <= _tolerance(model.dtype):
        raise ModelError(f"{family} cannot be scored exactly: its losses differ by {difference:.3g} nats from its own")
    log.warning("%s cannot be packed exactly; it is run one sequence at a time, which is several times slower", family)
    return "one_by_one"


def _check_examples(vocab_size: int) -> list[tuple[npt.NDArray[np.int32], Spans]]:
    tokens = np.random.default_rng(0)
    return [(tokens.integers(0, vocab_size, length, dtype=np.int32), (1, length)) for length in (3, 8, 8, 21)]


def _largest_difference(
    likelihood: Likelihood, examples: list[tuple[npt.NDArray[np.int32], Spans]], expected: list[torch.Tensor]
) -> float:
    """In nats a token; infinite where the model refuses the packed call."""
    with torch.inference_mode():
        try:
            nll_R = likelihood(Pack.of(examples)).cpu()
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            log.info("the packed forward was refused: %s", error)
            return float("inf")
    return float((nll_R - torch.cat(expected)).abs().nan_to_num(float("inf")).max())


def _eager_nll(model: PreTrainedModel, input_ids: npt.NDArray[np.int32], spans: Spans) -> torch.Tensor:
    """Token losses by transformers' own whole forward with eager attention: shares nothing with the kernel."""
    ids_1T = torch.from_numpy(input_ids.astype(np.int64))[None].to(model.device)
    before = model.config._attn_implementation
    use_attention(model, "eager")
    try:
        with torch.inference_mode():
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    except RuntimeError as error:
        raise ModelError(
            f"{type(model).__name__} cannot run in {model.dtype}: {' '.join(str(error).split())}"
        ) from error
    finally:
        use_attention(model, before)
    scored = torch.from_numpy(scored_positions(spans))
    logprobs_RV = torch.log_softmax(logits_TV[scored - 1], dim=-1)
    return -logprobs_RV.gather(1, ids_1T[0, scored][:, None]).squeeze(1).cpu()


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the attention of a model.

    Families that do not use AttentionInterface ignore set_attn_implementation but take their mask by the name in the
    configuration: left at PACKED_ATTENTION, Bloom and CodeGen would silently see the future.
    """
    model.set_attn_implementation(name)
    model.config._attn_implementation = name


def _check_causal(model: PreTrainedModel, input_ids: npt.NDArray[np.int32], spans: Spans) -> None:
    """Raise ModelError if a token's loss depends on a later token, by the model's own forward."""
    changed = input_ids.copy()
    changed[-1] = (changed[-1] + 1) % int(model.config.get_text_config().vocab_size)
    difference = (_eager_nll(model, input_ids, spans)[:-1] - _eager_nll(model, changed, spans)[:-1]).abs().max()
    if not difference <= _tolerance(model.dtype):
        raise ModelError(f"{type(model).__name__} is not a causal model: its losses depend on later tokens")


def _tolerance(dtype: torch.dtype) -> float:
    """Nats a token. Exact families differ by at most 7e-5 in float32, unsuited ones by whole nats (33 were tried)."""
    return 2e-3 if dtype in (torch.float32, torch.float64) else 0.3
