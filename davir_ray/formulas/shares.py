"""How a selection is shared out among groups, and how much of a group each file of a ranking gives.

A group's rows are taken in rank order, so what is taken of it is a prefix: some rows of each file until it is full.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limit:
    """How much may be taken: rows, or scored tokens of the longest prefix that fits; None is no limit."""

    rows: int | None = None
    tokens: int | None = None


def proportional(total: int, pools: Mapping[str, int]) -> dict[str, int]:
    """Share `total` out in proportion to the pools, exactly: largest remainders first, ties by name.

    The shares sum to `total` and none exceeds its pool. ValueError if the pools hold less than `total`.
    """
    whole = sum(pools.values())
    if total > whole:
        raise ValueError(f"{total} cannot be shared out among pools of {whole}")
    shares = {name: total * pool // whole for name, pool in pools.items()}
    by_remainder = sorted(pools, key=lambda name: (-(total * pools[name] % whole), name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def by_file(limit: Limit, rows: Iterable[int], tokens: Iterable[int]) -> list[Limit]:
    """What each file, in rank order, may give of one group that has these rows and tokens in it.

    A file in which the tokens run out gets what is left; those after it give nothing, even where a row would fit.
    Every row has at least one token.
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
    """Rows of the prefix that a limit allows of rows with these scored tokens, in rank order."""
    rows = len(tokens) if limit.rows is None else min(limit.rows, len(tokens))
    if limit.tokens is not None:
        rows = min(rows, int(np.searchsorted(np.cumsum(tokens), limit.tokens, side="right")))
    return rows
