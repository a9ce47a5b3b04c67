"""Packs: groups of examples that share one forward pass without padding.

Packing is a pure function of a shard's content, so scoring it again gives the same bits with any number of workers.
"""

import bisect
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PACKED_ATTENTION = "davir_packed"
"""The name of the attention in kernel/attention.py; a model is loaded with attn_implementation=PACKED_ATTENTION."""

Rows = npt.NDArray[np.int64]

Spans = Sequence[int] | npt.NDArray[np.int32]
"""The scored tokens of an example as (start, end) pairs, flattened, end exclusive."""


def pack(lengths: Rows, ids: Rows, budget: int) -> list[Rows]:
    """Cut examples, sorted by (length, id), into packs of at most `budget` tokens.

    Returns the row indices of each pack; an example longer than the budget gets a pack of its own. Sorting brings
    together equal lengths, which attention computes as one batch.
    """
    order = np.lexsort((ids, lengths))
    return np.split(order, _ends(lengths[order], budget)[:-1]) if len(order) else []


def deal(lengths: Rows, ids: Rows, budget: int, num_ranks: int) -> list[list[Rows | None]]:
    """Deal the packs of a batch to ranks that work side by side; returns, for each turn, the pack of each rank.

    There are as few turns as the budget allows. Within them the packs are as even as the examples are, because a step
    takes as long as the rank with the most tokens: on Alpaca, batches of 128 keep 8 ranks busy for 96 % of it. Where
    fewer packs than ranks do, some ranks have None.
    """
    order = np.lexsort((ids, lengths))
    by_length = lengths[order]
    num_turns = math.ceil(len(_ends(by_length, budget)) / num_ranks)
    # The least budget with which the packs fit into these turns: the smaller the budget, the more packs.
    least = bisect.bisect_left(
        range(budget), True, lo=1, key=lambda tokens: len(_ends(by_length, tokens)) <= num_turns * num_ranks
    )
    packs = np.split(order, _ends(by_length, least)[:-1])
    longest_first = sorted(packs, key=lambda rows: -int(lengths[rows].sum()))
    slots = [*longest_first, *[None] * (num_turns * num_ranks - len(packs))]
    turns = [slots[start : start + num_ranks] for start in range(0, len(slots), num_ranks)]
    # Every other turn in the opposite order, so that no rank has the longest pack of each.
    return [turn[::-1] if at % 2 else turn for at, turn in enumerate(turns)]


def _ends(lengths: Rows, budget: int) -> list[int]:
    """Where the packs of examples in this order end: each takes what fits the budget, and at least one example."""
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    ends = [0]
    while ends[-1] < len(lengths):
        fitting = int(np.searchsorted(edges, edges[ends[-1]] + budget, side="right")) - 1
        ends.append(max(fitting, ends[-1] + 1))
    return ends[1:]


def scored_positions(spans: Spans) -> npt.NDArray[np.int64]:
    """The positions that (start, end) pairs cover, in order."""
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return np.concatenate([np.arange(start, end) for start, end in pairs] or [np.empty(0, np.int64)])
