"""Packs: groups of examples that share one forward pass without padding.

Packing is a pure function of a shard's content, so scoring it again gives the same bits with any number of workers.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Spans = Sequence[int] | npt.NDArray[np.int32]
"""The scored tokens of an example as (start, end) pairs, flattened, end exclusive."""


def pack(lengths: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], budget: int) -> list[npt.NDArray[np.int64]]:
    """Cut examples, sorted by (length, id), into packs of at most `budget` tokens.

    Returns the row indices of each pack; an example longer than the budget gets a pack of its own. Sorting brings
    together equal lengths, which attention computes as one batch.
    """
    order = np.lexsort((ids, lengths))
    packs: list[npt.NDArray[np.int64]] = []
    start, num_tokens = 0, 0
    for position, row in enumerate(order):
        if num_tokens + lengths[row] > budget and position > start:
            packs.append(order[start:position])
            start, num_tokens = position, 0
        num_tokens += int(lengths[row])
    if len(order) > start:
        packs.append(order[start:])
    return packs


def scored_positions(spans: Spans) -> npt.NDArray[np.int64]:
    """The positions that (start, end) pairs cover, in order."""
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return np.concatenate([np.arange(start, end) for start, end in pairs] or [np.empty(0, np.int64)])
