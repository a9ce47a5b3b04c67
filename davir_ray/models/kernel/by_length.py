"""Attention over the sequences of a pack, neighbours of one length at once: what no compiler may touch."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch


# Not compiled: a loop over the sequences of this pack, which another pack would compile again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_by_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edges: torch.Tensor,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attend within each sequence of a pack; `attend` takes equally long sequences, [N, heads, L, D].

    Shapes are those of `packed_attention`. Raises ValueError if the edges, which lie on the CPU, are not the pack's.
    """
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
