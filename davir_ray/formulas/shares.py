"""How many rows of a selection each group gets, and how many of them come from each file of a ranking.

Rows of a group are taken in rank order until its limit is reached, so they form a prefix of the group.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limit:
    """How much may be taken: a number of rows, of scored tokens, or both; None means no limit."""

    rows: int | None = None
    tokens: int | None = None


def proportional(total: int, pools: Mapping[str, int]) -> dict[str, int]:
    """Divide `total` in proportion to the pools by the largest-remainder method, ties by name.

    The shares sum to `total` and none exceeds its pool. Raises ValueError if the pools are smaller than `total`.
    """
    whole = sum(pools.values())
    if total > whole:
        raise ValueError(f"{total} cannot be divided among pools of {whole} in total")
    shares = {name: total * pool // whole for name, pool in pools.items()}
    by_remainder = sorted(pools, key=lambda name: (-(total * pools[name] % whole), name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def by_file(limit: Limit, rows: Iterable[int], tokens: Iterable[int]) -> list[Limit]:
    """The limit that applies to each file, in rank order, of a group with these rows and scored tokens in each.

    The file in which the limit is reached gets what remains of it, later files get 0. Every row has at least one token.
    """
    left_rows, left_tokens = limit.rows, limit.tokens
    limits = []
    for num_rows, num_tokens in zip(rows, tokens, strict=True):
        limits.append(Limit(left_rows, left_tokens))
        if left_rows is not None:
            left_rows = max(0, left_rows - num_rows)
        if left_tokens is not None:
            left_tokens = max(0, left_tokens - num_tokens)
    return limits


def prefix_rows(limit: Limit, tokens: Ints) -> int:
    """The number of rows, in rank order with these scored tokens, in the longest prefix within the limit."""
    rows = len(tokens) if limit.rows is None else min(limit.rows, len(tokens))
    if limit.tokens is not None:
        rows = min(rows, int(np.searchsorted(np.cumsum(tokens), limit.tokens, side="right")))
    return rows
