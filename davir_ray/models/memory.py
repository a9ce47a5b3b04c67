"""Work in packs by a token budget, which is halved where the device runs out of memory."""

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from davir_ray.models.kernel.packing import pack

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]


def in_packs(fits: Callable[[Rows], bool], rows: Rows, lengths: Rows, ids: Rows, budget: int) -> int | None:
    """Give all rows to `fits`, pack after pack; a pack of several that does not fit is cut again with half the budget.

    `lengths` (tokens) and `ids` are those of every row, by row. Returns the smallest budget that was come to, None if
    there was room for every pack. A row that does not fit even alone is passed over: `fits` has been told of it.
    """
    smallest = None
    while len(rows):
        packs = pack(lengths[rows], ids[rows], budget)
        for number, part in enumerate(packs):
            if not fits(rows[part]) and len(part) > 1:
                budget = smallest = max(1, min(budget, int(lengths[rows[part]].sum())) // 2)
                log.warning("out of memory with %d examples in a pack; going on with %d tokens", len(part), budget)
                rows = rows[np.concatenate(packs[number:])]
                break
        else:
            break
    return smallest
