"""Causal attention within each sequence of a pack, for any transformers model that uses AttentionInterface.

Sequences are concatenated in one row of tokens and cannot attend to each other; nothing is padded. So packed scores
equal those of a batch of one: bitwise on a CPU with one thread, except that for sequences of a few tokens the matrix
library uses other kernels and the last bits differ. Where the sequences lie is passed through the backbone's forward by
the keywords `sequence_edges`, `sequence_edges_on_cpu` and `longest_sequence`. Packing by position_ids alone silently
mixes examples in transformers 5.23 if use_cache is left on or a mask is passed; this does not rely on it.
"""

import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)

PACKED_ATTENTION = "davir_packed"
"""The name that `register_packed_attention` gives it; a model is loaded with attn_implementation=PACKED_ATTENTION."""


def register_packed_attention() -> None:
    """Let transformers build models with PACKED_ATTENTION; a process calls it before it builds or runs one."""
    # Imported late: it takes seconds, which a driver, building no model, need not wait.
    from transformers import AttentionInterface

    # Without a mask function of this name transformers builds no mask, and does not look for sequences in position_ids,
    # for which the CPU would wait for the GPU in every pass.
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_edges: torch.Tensor | None = None,
    sequence_edges_on_cpu: torch.Tensor | None = None,
    longest_sequence: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each sequence; query [1, heads, T, D], result [1, T, heads, D].

    `sequence_edges` are the cumulative sums of the lengths from 0, int32, on the device and again on the CPU; tensors,
    because a compiled layer is compiled again for other values of anything else. Without them each row of the batch is
    one sequence. What a model asks for by other keywords (attention sinks, ALiBi) is ignored here: self_check.py finds
    such models.
    """
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embedding leaves queries and keys in float32 where values are in the autocast type.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    attend = partial(_attend, scaling=scaling, dropout=dropout, sliding_window=sliding_window, softcap=softcap)
    if sequence_edges is None or sequence_edges_on_cpu is None:
        return attend(query, key, value).transpose(1, 2).contiguous(), None
    if len(query) != 1:
        raise ValueError(f"a pack is one row of tokens; got {len(query)} rows")
    if on_flash(query) and not softcap and not dropout:
        return _attend_cuda(query, key, value, sequence_edges, longest_sequence, scaling, sliding_window), None
    return _attend_by_length(query, key, value, sequence_edges_on_cpu, attend), None


def on_flash(query: torch.Tensor) -> bool:
    """Whether flash attention takes these queries: on a GPU, in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


# Not compiled: a loop over the sequences of this pack, which another pack would compile again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edges: torch.Tensor,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention of the pack's sequences, neighbours of one length at once."""
    lengths = lengths_of(edges)
    if sum(lengths) != query.shape[2]:
        raise ValueError(f"the sequences of a pack have {sum(lengths)} tokens; got {query.shape[2]}")
    outputs = []
    for start, count, length in equal_runs(lengths):
        end = start + count * length
        # [heads, count * length, D] → [count, heads, length, D]
        parts = (x[0, :, start:end].reshape(len(x[0]), count, length, -1).transpose(0, 1) for x in (query, key, value))
        outputs.append(attend(*parts).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def lengths_of(edges: torch.Tensor) -> list[int]:
    """The lengths of the sequences that lie between these edges."""
    return edges.diff().tolist()


def equal_runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Adjacent sequences of equal length as (first token, number of sequences, length)."""
    runs: list[tuple[int, int, int]] = []
    position = 0
    for length, equal in groupby(lengths):
        count = len(list(equal))
        runs.append((position, count, length))
        position += count * length
    return runs


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of equally long sequences, [N, heads, L, D] → the same; key and value may have fewer heads."""
    length = query.shape[2]
    windowed = sliding_window is not None and length > sliding_window
    if softcap is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_window_mask(length, sliding_window, query.device) if windowed else None,
            dropout_p=dropout,
            is_causal=not windowed,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[3] ** -0.5)
    weights = softcap * torch.tanh(weights / softcap)
    weights = weights.masked_fill(~_window_mask(length, sliding_window, query.device), float("-inf"))
    weights = torch.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """[L, L], true where a query may attend to a key: to itself and to what precedes it within the window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (sliding_window or length))


def _attend_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edges: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Flash attention over all sequences of the pack in one launch."""
    from torch.nn.attention.varlen import varlen_attn  # imported late: torch builds it for CUDA only

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    options: dict[str, Any] = {}
    if _groups_by_name():
        options["enable_gqa"] = True
    # With more splits the longest sequence of a pack decides in which order the others are summed.
    if _takes_one_split(q.device, q.dtype):
        options["num_splits"] = 1
    out = varlen_attn(
        q, k, v, edges, edges, longest, longest,
        scale=scaling, window_size=window, **options,
    )  # fmt: skip
    return torch.as_tensor(out)[None]


# Asked when a layer is compiled: else the trial within would become a part of its code.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _groups_by_name() -> bool:
    """Whether this torch groups heads only if it is asked to: 2.11 always does."""
    return "enable_gqa" in _varlen_parameters()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes_one_split(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention on this GPU can be told not to split keys; some kernels refuse."""
    return _one_split_is_taken(device, dtype)


@cache
def _one_split_is_taken(device: torch.device, dtype: torch.dtype) -> bool:
    from torch.nn.attention.varlen import varlen_attn

    if "num_splits" not in _varlen_parameters():
        return False
    heads = torch.zeros(2, 1, 64, device=device, dtype=dtype)
    edges = torch.tensor([0, 2], device=device, dtype=torch.int32)
    try:
        varlen_attn(heads, heads, heads, edges, edges, 2, 2, window_size=(-1, 0), num_splits=1)
    except RuntimeError as error:
        log.info("flash attention may split keys, so the other sequences of a pack may change the last bits: %s", error)
        return False
    return True


@cache
def _varlen_parameters() -> Collection[str]:
    from torch.nn.attention.varlen import varlen_attn

    return inspect.signature(varlen_attn).parameters
