"""Scores of several references on one scale, linked by rows that all of them have scored: the anchor.

A row's log ratio under reference k is y_k = log(L_ref,k / L_base) = log(1 - davir_k), and m is its mean over all
references. By least squares y_k = a_k + b_k m; a row that only reference k has scored is put on the scale of m by this
line. The errors of y_k are also in m, so regressing on the mean (not on another reference) does not flatten the slopes:
the a_k have the mean 0 and the b_k the mean 1.

Shape letters: N rows, K references, P parts.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from davir_ray.formulas.scores import Floats

Counts = npt.NDArray[np.int64]

MIN_ANCHOR_ROWS = 30
"""Minimum number of rows that lines are fitted to. Where y_k and m have a correlation of 0.9, the relative standard
error of a slope is sqrt((1 / 0.9^2 - 1) / (rows - 2)): 9 % for 30 rows, 3 % for 300."""


class Moments(NamedTuple):
    """Counts, means and sums about the means of y_k and m; every array has shape K, or P x K for parts."""

    rows: Counts
    mean_m: Floats
    mean_y: Floats
    squares_m: Floats
    products: Floats
    """Sums of (m - mean m) (y_k - mean y_k)."""
    squares_y: Floats


class Line(NamedTuple):
    """y_k = intercept + slope m, in nats of log ratio."""

    intercept: float
    slope: float
    residual_sd: float
    """Standard deviation of y_k about the line, by N - 2."""


def log_ratios(base_nll: Floats, reference_nll: Floats) -> Floats:
    """log(L_ref / L_base) of each row: -inf where the reference predicts it with certainty, NaN where a loss is.

    base_nll is above 0 in every row that has a DavIR.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(np.maximum(reference_nll, 0.0) / base_nll))


def moments(ratios_NK: Floats) -> Moments:
    """The moments of rows with finite log ratios under all references."""
    num_rows, num_references = ratios_NK.shape
    if not num_rows:
        zeros_K = np.zeros(num_references)
        return Moments(np.zeros(num_references, np.int64), zeros_K, zeros_K, zeros_K, zeros_K, zeros_K)
    means_N1, mean_y_K = ratios_NK.mean(axis=1, keepdims=True), ratios_NK.mean(axis=0)
    from_m_N1, from_y_NK = means_N1 - means_N1.mean(), ratios_NK - mean_y_K
    return Moments(
        rows=np.full(num_references, num_rows),
        mean_m=np.full(num_references, means_N1.mean()),
        mean_y=mean_y_K,
        squares_m=np.full(num_references, (from_m_N1**2).sum()),
        products=(from_m_N1 * from_y_NK).sum(axis=0),
        squares_y=(from_y_NK**2).sum(axis=0),
    )


def merged(parts: Moments) -> Moments:
    """The moments of all rows from those of P parts (Chan et al., 1979): no difference of large sums is taken."""
    rows_K = parts.rows.sum(axis=0)
    weights_PK = parts.rows / np.maximum(1, rows_K)
    mean_m_K, mean_y_K = ((weights_PK * means).sum(axis=0) for means in (parts.mean_m, parts.mean_y))
    from_m_PK, from_y_PK = parts.mean_m - mean_m_K, parts.mean_y - mean_y_K
    return Moments(
        rows=rows_K,
        mean_m=mean_m_K,
        mean_y=mean_y_K,
        squares_m=(parts.squares_m + parts.rows * from_m_PK**2).sum(axis=0),
        products=(parts.products + parts.rows * from_m_PK * from_y_PK).sum(axis=0),
        squares_y=(parts.squares_y + parts.rows * from_y_PK**2).sum(axis=0),
    )


def fit_lines(found: Moments) -> list[Line]:
    """The line of each reference by least squares; needs three rows or more. NaN where all rows have the same m."""
    slopes_K = np.full_like(found.products, np.nan)
    np.divide(found.products, found.squares_m, out=slopes_K, where=found.squares_m > 0)
    intercepts_K = found.mean_y - slopes_K * found.mean_m
    squares_K = np.maximum(0.0, found.squares_y - slopes_K * found.products)
    sds_K = np.sqrt(squares_K / (found.rows - 2))
    return [Line(*map(float, of_k)) for of_k in zip(intercepts_K, slopes_K, sds_K, strict=True)]


def on_common_scale(ratios_N: Floats, line: Line) -> Floats:
    """The log ratios of one reference on the scale of m, by its line, whose slope is above 0; -inf stays -inf."""
    return np.asarray((ratios_N - line.intercept) / line.slope)


def davir_of(ratios_N: Floats) -> Floats:
    """The DavIR that a log ratio means, 1 - exp(ratio): 1 for -inf, 0 for 0."""
    with np.errstate(over="ignore"):
        return np.asarray(-np.expm1(ratios_N))
