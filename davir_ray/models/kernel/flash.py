"""Flash attention over all sequences of a pack at once, on a GPU; what a compiler must ask and not look into."""

import inspect
import logging
from collections.abc import Collection
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)


def attend_on_flash(
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
