"""DavIR and RHO-LM: the properties that the paper's formulas have, by algebra."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from davir_ray.formulas.scores import Floats, davir, ifd, ifd_perplexity, rho_mean, rho_sum

LOSSES = st.floats(min_value=1e-6, max_value=1e6)
PAIRS = st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=20)


def columns(pairs: list[tuple[float, float]]) -> tuple[Floats, Floats]:
    base, reference = np.array(pairs, dtype=np.float64).T
    return base, reference


@given(PAIRS, st.integers(1, 10_000))
def test_davir_is_the_same_for_summed_and_for_mean_losses(pairs: list[tuple[float, float]], tokens: int) -> None:
    base, reference = columns(pairs)
    room = 1e-14 * np.maximum(1, reference / base)
    assert np.all(np.abs(davir(base / tokens, reference / tokens) - davir(base, reference)) <= room)


@given(PAIRS)
def test_davir_is_one_minus_the_ratio_of_the_losses_and_at_most_one(pairs: list[tuple[float, float]]) -> None:
    base, reference = columns(pairs)
    score = davir(base, reference)
    assert np.all(score <= 1)
    np.testing.assert_allclose(score, 1 - reference / base, rtol=1e-12, atol=1e-12)
    assert np.all((score < 0) == (reference > base))


@given(st.lists(LOSSES, min_size=1))
def test_equal_models_score_zero_by_every_formula(losses: list[float]) -> None:
    base = np.array(losses)
    tokens = np.ones(len(base), dtype=np.int32)
    for score in (davir(base, base), rho_sum(base, base), rho_mean(base, base, tokens)):
        assert np.all(score == 0)


@given(LOSSES)
def test_a_memorised_response_scores_one(loss: float) -> None:
    assert davir(np.array([loss]), np.zeros(1))[0] == 1


@given(PAIRS)
def test_dividing_by_the_reference_loss_gives_the_same_order(pairs: list[tuple[float, float]]) -> None:
    base, reference = columns(pairs)
    ratio = reference / base
    ours, theirs = davir(base, reference), (base - reference) / reference
    clearly_better = ratio[:, None] < ratio[None, :] * (1 - 1e-12) - 1e-12
    assert np.all((ours[:, None] > ours[None, :])[clearly_better])
    assert np.all((theirs[:, None] > theirs[None, :])[clearly_better & (ratio[:, None] > 1e-3)])


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("reference", [0.0, 1.0, np.inf])
def test_a_base_loss_of_zero_gives_nan_and_no_warning(zero: float, reference: float) -> None:
    with np.errstate(all="raise"):
        score = davir(np.array([zero, 2.0]), np.array([reference, 1.0]))
    assert np.isnan(score[0])
    assert score[1] == 0.5


def test_a_loss_that_is_nan_stays_nan() -> None:
    losses = np.array([np.nan, 1.0])
    assert np.isnan(davir(losses, losses[::-1])).all()
    assert np.isnan(rho_sum(losses, losses[::-1])).all()


@given(st.lists(st.tuples(LOSSES, LOSSES, st.integers(1, 100_000)), min_size=1))
def test_rho_mean_is_rho_sum_over_tokens(rows: list[tuple[float, float, int]]) -> None:
    base, reference = columns([row[:2] for row in rows])
    tokens = np.array([row[2] for row in rows], dtype=np.int32)
    expected = [(b - r) / n for b, r, n in rows]
    np.testing.assert_array_equal(rho_mean(base, reference, tokens), expected)
    np.testing.assert_array_equal(rho_sum(base, reference), [b - r for b, r, _ in rows])


def test_rho_mean_of_no_tokens_is_nan() -> None:
    with np.errstate(all="raise"):
        mean = rho_mean(np.array([3.0, 3.0]), np.array([1.0, 1.0]), np.array([0, 4], dtype=np.int32))
    assert np.isnan(mean[0])
    assert mean[1] == 0.5


@given(st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(0.1, 1e3)), min_size=1), st.integers(100, 10_000))
def test_ifd_is_the_ratio_of_mean_losses_or_of_perplexities(pairs: list[tuple[float, float]], tokens: int) -> None:
    base, alone = columns(pairs)
    counts = np.full(len(base), tokens, np.int32)
    np.testing.assert_allclose(ifd(base, alone), (base / tokens) / (alone / tokens), rtol=1e-12)
    perplexities = np.exp(base / tokens) / np.exp(alone / tokens)
    np.testing.assert_allclose(ifd_perplexity(base, alone, counts), perplexities, rtol=1e-12)
    assert np.all((ifd(base, alone) > 1) == (base > alone))


def test_ifd_of_a_response_that_is_certain_without_its_prompt_is_not_defined() -> None:
    found = ifd(np.array([2.0, 0.0, 0.0]), np.array([0.0, 0.0, 3.0]))
    np.testing.assert_array_equal(found, [np.nan, np.nan, 0.0])
    assert np.isnan(ifd_perplexity(np.array([1.0]), np.array([1.0]), np.array([0], np.int32))).all()
