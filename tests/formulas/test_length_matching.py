"""A matched draw: the histogram and the tokens of what it is matched to, and nothing else of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from davir_ray.formulas.hashing import random_keys
from davir_ray.formulas.length_matching import length_bins, matched_draw

EDGES = [32, 64, 128, 256, 512]


def keys(number: int, seed: int = 0) -> np.ndarray:
    return random_keys(np.arange(number), seed)


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_as_many_rows_in_each_range_and_as_many_tokens(seed: int, size: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(4, 1, 600).astype(np.int64), 1, 700)
    wanted = lengths[draw.choice(600, size, replace=False)]
    rows = matched_draw(keys(600, seed), lengths, wanted, EDGES)
    assert len(set(rows.tolist())) == size
    found = lengths[rows]
    assert sorted(length_bins(found, EDGES)) == sorted(length_bins(wanted, EDGES))
    # A range may hold so few rows that no swap of them closes the last gap.
    assert abs(int(found.sum()) - int(wanted.sum())) <= (0 if size > 5 else 100)


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_with_prompts_both_histograms_are_those_that_are_wanted(seed: int, size: int) -> None:
    """And as many response tokens; those of the prompts agree as their ranges do."""
    draw = np.random.default_rng(seed)
    lengths, prompts = (np.clip(draw.lognormal(4, 1, 2000).astype(np.int64), 1, 700) for _ in range(2))
    chosen = draw.choice(2000, size, replace=False)
    wanted, wanted_prompts = lengths[chosen], prompts[chosen]
    rows = matched_draw(keys(2000, seed), lengths, wanted, EDGES, prompts=prompts, wanted_prompts=wanted_prompts)
    assert len(set(rows.tolist())) == size
    bounds = [0, *EDGES, 10**9]
    for found, expected in ((lengths[rows], wanted), (prompts[rows], wanted_prompts)):
        assert np.histogram(found, bounds)[0].tolist() == np.histogram(expected, bounds)[0].tolist()
    pairs = [np.histogram2d(*lists, bins=(bounds, bounds))[0] for lists in (
        (lengths[rows], prompts[rows]), (wanted, wanted_prompts),
    )]  # fmt: skip
    assert (pairs[0] == pairs[1]).all()
    assert abs(int(lengths[rows].sum()) - int(wanted.sum())) <= (0 if size > 20 else 100)


def test_the_order_of_the_pool_does_not_matter() -> None:
    draw = np.random.default_rng(1)
    lengths, own = draw.integers(1, 300, 500), keys(500)
    shuffled = draw.permutation(500)
    wanted = np.sort(lengths)[-80:]
    first = matched_draw(own, lengths, wanted, EDGES)
    second = matched_draw(own[shuffled], lengths[shuffled], wanted, EDGES)
    assert set(first.tolist()) == set(shuffled[second].tolist())


def test_other_keys_draw_other_rows() -> None:
    lengths = np.random.default_rng(2).integers(1, 300, 2000)
    wanted = lengths[:100]
    first, second = (matched_draw(keys(2000, seed), lengths, wanted, EDGES) for seed in (0, 1))
    assert len(set(first.tolist()) & set(second.tolist())) < 30


def test_rows_of_all_lengths_are_drawn_where_all_lengths_are_wanted() -> None:
    lengths = np.random.default_rng(3).integers(100, 120, 60)
    wanted = np.sort(lengths)[1::3]
    counts = np.zeros(60)
    for seed in range(300):
        counts[matched_draw(keys(60, seed), lengths, wanted, EDGES)] += 1
    # 100 expected of each row, with a standard deviation of 8; meeting the sum moves them a little.
    assert counts.min() > 55
    assert counts.max() < 145


def test_a_range_with_too_few_rows_is_told() -> None:
    with pytest.raises(ValueError, match="3 rows are wanted from a range of lengths that has 1"):
        matched_draw(keys(2), np.array([10, 600]), np.array([600, 600, 601]), EDGES)
