"""Packs that fit the device: a token budget that is halved where memory runs out."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from davir_ray.models.kernel.packing import pack

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]

T = TypeVar("T")


class TokenBudget:
    """The maximum number of tokens of a pack, lowered for good when a pack does not fit the device."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def run(self, forward: Callable[[Rows], T], rows: Rows, lengths: Rows, ids: Rows) -> Iterator[tuple[Rows, T]]:
        """Yield (rows of a pack, what `forward` makes of them) until every row has had its turn.

        `lengths` (tokens) and `ids` hold one number for every row. Where a pack of several rows runs out of memory, the
        budget is halved and the rows that are left are packed again; a row that does not fit even alone is left out.
        """
        while len(rows):
            packs = pack(lengths[rows], ids[rows], self.num_tokens)
            for number, part in enumerate(packs):
                try:
                    result = forward(rows[part])
                except torch.OutOfMemoryError:
                    pass
                else:
                    yield rows[part], result
                    continue
                torch.cuda.empty_cache()  # outside the handler, whose error holds the tensors of the failed pass
                if len(part) > 1:
                    self.num_tokens = max(1, int(lengths[rows[part]].sum()) // 2)
                    log.warning(
                        "out of memory with %d examples in a pack; continuing with packs of %d tokens",
                        len(part), self.num_tokens,
                    )  # fmt: skip
                    rows = rows[np.concatenate(packs[number:])]
                    break
            else:
                return
