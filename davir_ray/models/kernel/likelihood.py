"""The likelihood kernel: packed examples → negative log-likelihood of every scored token.

The one kernel of scoring, fine-tuning and held-out loss. The backbone runs over the pack without padding. The head runs
in chunks, only on the hidden states that predict scored tokens, so that no [tokens, vocabulary] tensor ever exists, not
even in the backward pass.

Letters in tensor names: T tokens of the pack, R scored tokens of the pack, C rows of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from davir_ray.errors import ModelError
from davir_ray.formulas.losses import token_nll
from davir_ray.models.device import DeviceKind
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.layers import compile_layers, running_compiled
from davir_ray.models.kernel.packing import Spans, scored_positions

if TYPE_CHECKING:  # transformers' models take seconds to import, and a driver loads none
    from transformers import PreTrainedModel

_CHUNK_ROWS = {"cpu": 256, "cuda": 1024}
"""Hidden states that the head is applied to at once, at most."""

_CHUNK_LOGITS = 2**27
"""Logits of a chunk, at most: 512 MiB in float32, and the softmax holds another copy or two."""

_CACHED_LOGITS = 2**18
"""Logits whose softmax is computed at once on a CPU: 1 MiB in float32, which fits a core's cache. With whole chunks the
head took 1.35 times as long: they pass through newly mapped memory four times."""

TOKENS_PER_PACK = {"cpu": 1024, "cuda": 16384}
"""Default token budget of a pack."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Concatenated examples, with the positions that predict their scored tokens."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    predictors_R: torch.Tensor
    """Positions in the pack whose hidden state predicts a scored token."""
    targets_R: torch.Tensor
    """The scored tokens."""
    edges_N1: torch.Tensor
    """Where each of N sequences begins, and where the last ends; int32, as attention on a GPU requires."""
    edges_on_cpu_N1: torch.Tensor
    """The same, where reading them waits for no GPU."""
    sequence_lengths: tuple[int, ...]
    num_scored: tuple[int, ...]
    """Number of scored tokens of each example, in the order of R."""

    @classmethod
    def of(cls, examples: Sequence[tuple[npt.NDArray[np.int32], Spans]]) -> Self:
        """Concatenate (input_ids, response_spans) of examples. No span may begin at token 0, which nothing predicts."""
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
        edges_N1 = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
        return cls(
            input_ids_T=torch.from_numpy(np.concatenate([ids for ids, _ in examples]).astype(np.int64)),
            position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
            predictors_R=torch.from_numpy(np.concatenate(predictors)),
            targets_R=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            edges_N1=edges_N1,
            edges_on_cpu_N1=edges_N1,
            sequence_lengths=lengths,
            num_scored=tuple(num_scored),
        )

    @property
    def places(self) -> dict[str, Any]:
        """Where the sequences lie, as keywords of the packed attention."""
        return {
            "sequence_edges": self.edges_N1,
            "sequence_edges_on_cpu": self.edges_on_cpu_N1,
            "longest_sequence": max(self.sequence_lengths),
        }

    def stretches(self, length: int) -> list[Self]:
        """Split the pack wherever its sequences change between at most `length` tokens and more."""
        is_long = np.array(self.sequence_lengths) > length
        cuts = [0, *(np.flatnonzero(is_long[1:] != is_long[:-1]) + 1).tolist(), len(is_long)]
        return [self._sequences(first, last) for first, last in pairwise(cuts)]

    def _sequences(self, first: int, last: int) -> Self:
        start, end = int(self.edges_on_cpu_N1[first]), int(self.edges_on_cpu_N1[last])
        scored = slice(sum(self.num_scored[:first]), sum(self.num_scored[:last]))
        return replace(
            self,
            input_ids_T=self.input_ids_T[start:end],
            position_ids_T=self.position_ids_T[start:end],
            predictors_R=self.predictors_R[scored] - start,
            targets_R=self.targets_R[scored],
            edges_N1=self.edges_N1[first : last + 1] - start,
            edges_on_cpu_N1=self.edges_on_cpu_N1[first : last + 1] - start,
            sequence_lengths=self.sequence_lengths[first:last],
            num_scored=self.num_scored[first:last],
        )

    def to(self, device: torch.device) -> Self:
        """The same pack on a device; copied to a GPU from pinned memory, without waiting for the GPU's current work."""
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        del tensors["edges_on_cpu_N1"]
        pinned = {name: value.pin_memory() if value.is_cpu else value for name, value in tensors.items()}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in pinned.items()}
        return replace(self, **moved)


class Likelihood(torch.nn.Module):
    """Token likelihoods under one causal language model loaded with PACKED_ATTENTION."""

    def __init__(self, model: PreTrainedModel, chunks_for: DeviceKind | None = None) -> None:
        """`chunks_for` is the device whose chunks the head takes, where that is not the model's."""
        super().__init__()
        register_packed_attention()  # the model may have come from another process, as that of a rank does
        self.model = model
        self.packed = model.config._attn_implementation == PACKED_ATTENTION
        """Whether packs are run without padding; the self-check clears it for models that cannot be packed exactly."""
        self.compiled = False
        """Whether the layers are compiled; for scoring only."""
        vocabulary = int(model.config.get_text_config().vocab_size)
        kind = chunks_for or model.device.type
        self._chunk_rows = max(1, min(_CHUNK_ROWS[kind], _CHUNK_LOGITS // vocabulary))
        self._block_rows = max(1, _CACHED_LOGITS // vocabulary) if kind == "cpu" else self._chunk_rows
        self._rope_types, self._rope_length = _length_dependent_rope(model.config.get_text_config())

    def compile_layers(self) -> None:
        """Run compiled layers from now on; call before `self_check`, which tries them.

        ModelError if the model does not name its layers.
        """
        compile_layers(self.model)
        self.compiled = True

    @property
    def one_pass_length(self) -> int | None:
        """Maximum length of sequences for which a forward runs the backbone only once. None: no limit."""
        return self._rope_length if self._rope_types else None

    def forward(self, pack: Pack) -> torch.Tensor:
        """NLL in nats of every scored token of the pack, in float32 or better, [R]; differentiable.

        ModelError for a sequence whose rotary frequencies would depend on the sequences that ran before it.
        """
        if self._rope_types and max(pack.sequence_lengths) > self._rope_length:
            # transformers chooses the frequencies for a whole call by its longest sequence.
            if "dynamic" in self._rope_types:
                raise ModelError(
                    f"a sequence has {max(pack.sequence_lengths)} tokens, but dynamic rotary embedding is exact up to "
                    f"{self._rope_length} only; lower prepare.max_tokens"
                )
            if len(stretches := pack.stretches(self._rope_length)) > 1:
                return torch.cat([self._nll(stretch) for stretch in stretches])
        return self._nll(pack)

    def _nll(self, pack: Pack) -> torch.Tensor:
        pack = pack.to(self.model.device)
        with running_compiled(self.model) if self.compiled else nullcontext():
            hidden_RH = self._hidden_packed(pack) if self.packed else self._hidden_padded(pack)
        return self.head_nll(hidden_RH, pack.targets_R)

    def head_nll(self, hidden_RH: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
        """NLL of tokens after the backbone has run: that of each target, given the hidden state that predicts it."""
        chunks = zip(torch.split(hidden_RH, self._chunk_rows), torch.split(targets_R, self._chunk_rows), strict=True)
        if torch.is_grad_enabled():
            # The logits of a chunk are recomputed in the backward pass instead of kept.
            return torch.cat([checkpoint(self._chunk_nll, h, t, use_reentrant=False) for h, t in chunks])
        return torch.cat([self._chunk_nll(hidden, targets) for hidden, targets in chunks])

    def _hidden_packed(self, pack: Pack) -> torch.Tensor:
        hidden_1TH = self.model.base_model(
            input_ids=pack.input_ids_T[None],
            position_ids=pack.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **pack.places,
        ).last_hidden_state
        return torch.as_tensor(hidden_1TH[0, pack.predictors_R])

    def _hidden_padded(self, pack: Pack) -> torch.Tensor:
        """The backbone with its own attention over a padded batch; the lengths within a pack are similar.

        Padding is on the right, where no causal model attends to it.
        """
        rows = torch.split(pack.input_ids_T, list(pack.sequence_lengths))
        mask_NL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        hidden_NLH = self.model.base_model(
            input_ids=pad_sequence(list(rows), batch_first=True), attention_mask=mask_NL, use_cache=False
        ).last_hidden_state
        return torch.as_tensor(hidden_NLH[mask_NL.bool()][pack.predictors_R])

    def _chunk_nll(self, hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        logits_CV = self._logits(hidden_CH)
        blocks = zip(torch.split(logits_CV, self._block_rows), torch.split(targets_C, self._block_rows), strict=True)
        return torch.cat([token_nll(_adjust_logits(self.model.config, logits), targets) for logits, targets in blocks])

    def _logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        head = active_head(self.model)
        plain = type(head) is torch.nn.Linear and hidden_CH.dtype in (torch.bfloat16, torch.float16)
        as_in_training = torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_CH.device.type)
        if not (plain and hidden_CH.is_cuda) or as_in_training:
            return torch.as_tensor(head(hidden_CH))
        # The product is accumulated in float32 anyway; the module would round it to half precision.
        logits_CV = torch.mm(hidden_CH, head.weight.t(), out_dtype=torch.float32)
        return logits_CV if head.bias is None else logits_CV + head.bias


def active_head(model: PreTrainedModel) -> Any:
    """The output head in use: the base's own if an adapter is switched off, else the adapter's.

    Without the wrapper of modules_to_save, so that a plain linear layer is recognised as one.
    """
    head: Any = model.get_output_embeddings()
    if getattr(head, "disable_adapters", False):
        return getattr(head, "base_layer", getattr(head, "original_module", head))
    trained = getattr(head, "modules_to_save", None)
    return head if trained is None else trained[head.active_adapters[0]]


def _length_dependent_rope(config: Any) -> tuple[set[str], int]:
    """Rotary embeddings whose frequencies depend on the length of a call, and the length above which they change."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    dependent = [each for each in by_layer if each.get("rope_type") in ("longrope", "dynamic")]
    positions = getattr(config, "max_position_embeddings", 0)
    lengths = [
        each.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or positions
        for each in dependent
    ]
    return {each["rope_type"] for each in dependent}, min(lengths, default=0)


def _adjust_logits(config: object, logits: torch.Tensor) -> torch.Tensor:
    """Scale or cap the head's output as the family does: Cohere and Granite scale it, Gemma 2 caps it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits
