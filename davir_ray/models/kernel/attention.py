"""Causal attention within each sequence of a pack, for any transformers model that uses AttentionInterface.

Sequences are concatenated in one row of tokens and cannot attend to each other; nothing is padded. So packed scores
equal those of a batch of one: bitwise on a CPU with one thread, except that for sequences of a few tokens the matrix
library uses other kernels and the last bits differ. Where the sequences lie is passed through the backbone's forward by
the keywords `sequence_edges`, `sequence_edges_on_cpu` and `longest_sequence`. Packing by position_ids alone silently
mixes examples in transformers 5.23 if use_cache is left on or a mask is passed; this does not rely on it.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from davir_ray.models.kernel.packing import PACKED_ATTENTION as PACKED_ATTENTION

log = logging.getLogger(__name__)


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
    because a compiled layer is compiled again for other tuples. Without them each row of the batch is
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
    # Imported late, as both import torch's compiler, whose seconds a process that runs no model need not wait.
    if on_flash(query) and not softcap and not dropout:
        from davir_ray.models.kernel.flash import attend_on_flash

        return attend_on_flash(query, key, value, sequence_edges, longest_sequence, scaling, sliding_window), None
    from davir_ray.models.kernel.by_length import attend_by_length

    return attend_by_length(query, key, value, sequence_edges_on_cpu, attend), None


def on_flash(query: torch.Tensor) -> bool:
    """Whether flash attention takes these queries: on a GPU, in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


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
