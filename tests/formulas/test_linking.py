"""Lines that link scores: against NumPy and SciPy, and in a planted world, whose lines and order they recover."""

import numpy as np
import pytest
from scipy import stats

from davir_ray.formulas.linking import (
    Moments,
    davir_of,
    fit_lines,
    log_ratios,
    merged,
    moments,
    on_common_scale,
)
from davir_ray.formulas.scores import Floats, davir

INTERCEPTS_K, SLOPES_K, NOISE = np.array([0.3, -0.4, 0.1]), np.array([1.4, 0.6, 1.0]), 0.05


def ratios_of(true_N: Floats, draw: np.random.Generator) -> Floats:
    """Log ratios of the same rows under three references with lines and noise of their own."""
    return np.asarray(
        INTERCEPTS_K + SLOPES_K * true_N[:, None] + draw.normal(scale=NOISE, size=(len(true_N), len(SLOPES_K)))
    )


def in_parts(ratios_NK: Floats, sizes: list[int]) -> Moments:
    parts = [moments(part) for part in np.split(ratios_NK, np.cumsum(sizes)[:-1])]
    return Moments(*(np.stack(of_parts) for of_parts in zip(*parts, strict=True)))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_lines_are_those_of_scipy_and_numpy_however_the_rows_are_cut(offset: float) -> None:
    """Also far from zero, where sums of squares that are not centred would lose every digit."""
    draw = np.random.default_rng(0)
    ratios_NK = ratios_of(draw.normal(-0.5, 0.4, 500), draw) + offset
    m_N = ratios_NK.mean(axis=1)
    parts = in_parts(ratios_NK, [0, 1, 99, 0, 250, 150])
    for found in (fit_lines(moments(ratios_NK)), fit_lines(merged(parts))):
        for line, y_N in zip(found, ratios_NK.T, strict=True):
            plain = stats.linregress(m_N, y_N)
            assert line.slope == pytest.approx(plain.slope, rel=1e-6)
            assert line.intercept == pytest.approx(plain.intercept, rel=1e-6, abs=1e-9)
            left = y_N - plain.intercept - plain.slope * m_N
            assert line.residual_sd == pytest.approx(np.sqrt((left**2).sum() / (500 - 2)), rel=1e-4)
            assert np.polyfit(m_N - offset, y_N, 1)[0] == pytest.approx(line.slope, rel=1e-6)


def test_parts_in_any_grouping_are_the_whole() -> None:
    draw = np.random.default_rng(1)
    ratios_NK = ratios_of(draw.normal(size=60), draw)
    whole = moments(ratios_NK)
    left, right = merged(in_parts(ratios_NK[:20], [5, 15])), merged(in_parts(ratios_NK[20:], [40]))
    nested = merged(Moments(*(np.stack(pair) for pair in zip(left, right, strict=True))))
    for found, expected in zip(nested, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert merged(in_parts(ratios_NK[:0], [0, 0])).rows.tolist() == [0, 0, 0]


def test_the_lines_have_a_mean_of_intercept_0_and_slope_1() -> None:
    draw = np.random.default_rng(2)
    lines = fit_lines(moments(ratios_of(draw.normal(size=50), draw)))
    assert np.mean([line.intercept for line in lines]) == pytest.approx(0, abs=1e-12)
    assert np.mean([line.slope for line in lines]) == pytest.approx(1)


def test_planted_lines_are_recovered() -> None:
    """The mean m is itself a line of the planted scale, so y_k is a line of m with other numbers."""
    draw = np.random.default_rng(3)
    lines = fit_lines(moments(ratios_of(draw.normal(-0.5, 0.4, 3000), draw)))
    slopes_K = SLOPES_K / SLOPES_K.mean()
    for line, slope, intercept in zip(lines, slopes_K, INTERCEPTS_K - slopes_K * INTERCEPTS_K.mean(), strict=True):
        assert line.slope == pytest.approx(slope, abs=0.02)
        assert line.intercept == pytest.approx(intercept, abs=0.02)
        assert line.residual_sd == pytest.approx(NOISE, rel=0.4)


def test_rows_across_folds_of_other_quality_are_ordered_better_than_by_davir_or_place() -> None:
    """The rows of the first fold are better: places within folds miss that, and DavIR mistakes the references."""
    draw = np.random.default_rng(4)
    lines = fit_lines(moments(ratios_of(draw.normal(-0.5, 0.5, 300), draw)))
    true = [draw.normal(center, 0.3, 2000) for center in (-0.8, -0.2, -0.4)]
    raw = [ratios_of(of_fold, draw)[:, fold] for fold, of_fold in enumerate(true)]
    linked = [on_common_scale(of_fold, line) for of_fold, line in zip(raw, lines, strict=True)]
    places = [stats.rankdata(of_fold) for of_fold in raw]
    whole = np.concatenate(true)
    by_linked, by_raw, by_place = (
        stats.spearmanr(np.concatenate(found), whole).statistic for found in (linked, raw, places)
    )
    assert by_linked > 0.95
    assert by_linked > max(by_raw, by_place) + 0.1
    best = np.argsort(np.concatenate(linked))[:600]  # the lowest log ratio is the highest score
    assert np.isin(best, np.argsort(whole)[:600]).mean() > 0.8


def test_a_ratio_is_a_davir() -> None:
    base_nll, reference_nll = np.array([2.0, 3.0, 5.0, 4.0]), np.array([1.0, 3.0, 0.0, 8.0])
    ratios = log_ratios(base_nll, reference_nll)
    np.testing.assert_allclose(davir_of(ratios), davir(base_nll, reference_nll), rtol=1e-15)
    assert ratios[2] == -np.inf
    assert np.isnan(log_ratios(np.array([np.nan, 1.0]), np.array([1.0, np.nan]))).all()


def test_certainty_is_1_by_every_line_and_rows_of_one_value_have_no_slope() -> None:
    draw = np.random.default_rng(5)
    for line in fit_lines(moments(ratios_of(draw.normal(size=40), draw))):
        assert davir_of(on_common_scale(np.array([-np.inf]), line)).tolist() == [1.0]
    assert all(np.isnan(line.slope) for line in fit_lines(moments(np.ones((40, 2)))))
