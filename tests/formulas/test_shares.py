"""Shares are exact and add up; what the files of a ranking give is the prefix that one long file would give."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from davir_ray.formulas.shares import Limit, by_file, prefix_rows, proportional

POOLS = st.dictionaries(st.text(max_size=3), st.integers(0, 10**12), min_size=1, max_size=8).filter(
    lambda pools: sum(pools.values()) > 0
)


@given(POOLS, st.data())
def test_shares_add_up_and_are_within_one_of_proportional(pools: dict[str, int], data: st.DataObject) -> None:
    whole = sum(pools.values())
    total = data.draw(st.integers(0, whole))
    shares = proportional(total, pools)
    assert sum(shares.values()) == total
    for name, pool in pools.items():
        assert 0 <= shares[name] <= pool
        assert abs(shares[name] - Fraction(total * pool, whole)) < 1


def test_largest_remainders_come_first_and_ties_by_name() -> None:
    assert proportional(10, {"a": 50, "b": 26, "c": 24}) == {"a": 5, "b": 3, "c": 2}
    assert proportional(1, {"b": 5, "a": 5, "c": 5}) == {"a": 1, "b": 0, "c": 0}


def test_more_than_the_pools_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided among pools of"):
        proportional(4, {"a": 1, "b": 2})


def prefix_of_all(limit: Limit, tokens: list[int]) -> int:
    """By a plain loop."""
    rows = used = 0
    for size in tokens:
        if limit.rows is not None and rows == limit.rows:
            break
        if limit.tokens is not None and used + size > limit.tokens:
            break
        rows, used = rows + 1, used + size
    return rows


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=6),
    st.one_of(st.none(), st.integers(0, 40)),
    st.one_of(st.none(), st.integers(0, 150)),
)
@example([[2, 3], [4]], None, 5).via("rows that take exactly the tokens of the limit, to the end of a file")
@example([[2, 3], [4]], None, 2).via("and within one")
def test_files_together_give_the_prefix_of_one_long_file(
    files: list[list[int]], rows: int | None, tokens: int | None
) -> None:
    limit = Limit(rows, tokens)
    limits = by_file(limit, [len(file) for file in files], [sum(file) for file in files])
    taken = [prefix_rows(part, np.array(file, np.int64)) for part, file in zip(limits, files, strict=True)]
    expected = prefix_of_all(limit, [size for file in files for size in file])
    assert sum(taken) == expected
    for number, (count, file) in enumerate(zip(taken, files, strict=True)):
        assert count == max(0, min(len(file), expected - sum(map(len, files[:number]))))
