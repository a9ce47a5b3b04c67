"""Packs that fit the device: a token budget that is halved where memory runs out."""

import logging
from collections import deque
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
        """Pack these rows and yield each pack (its rows) with the result of its forward pass.

        `lengths` (tokens) and `ids` are those of all rows. If a pack runs out of memory, the budget is halved and the
        remaining rows are packed again; a row that does not fit even alone is left out.
        """
        packs = deque(rows[part] for part in pack(lengths[rows], ids[rows], self.num_tokens))
        while packs:
            packed = packs.popleft()
            try:
                result = forward(packed)
            except torch.OutOfMemoryError:
                pass
            else:
                yield packed, result
                continue
            torch.cuda.empty_cache()  # not in the handler: the error holds the tensors of the failed pass
            if len(packed) > 1:
                self.num_tokens = max(1, int(lengths[packed].sum()) // 2)
                log.warning(
                    "out of memory with %d examples in a pack; continuing with packs of %d tokens",
                    len(packed), self.num_tokens,
                )  # fmt: skip
                rest = np.concatenate([packed, *packs])
                packs = deque(rest[part] for part in pack(lengths[rest], ids[rest], self.num_tokens))
