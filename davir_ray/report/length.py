"""Each measure against response length: correlation, density and quantiles."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from davir_ray.report.distributions import drawn_range
from davir_ray.report.inputs import MEASURES, Floats, Ints, Scored

LENGTH_BINS, VALUE_BINS, BAND_BINS = 28, 26, 12
MIN_BAND_ROWS = 10  # fewer rows make the 10th and 90th percentile of a length bin meaningless


def panels(scored: Scored) -> list[dict[str, Any]]:
    """RHO, summed and as a mean, and DavIR against response length."""
    return [_panel(scored, measure) for measure in MEASURES]


def _panel(scored: Scored, measure: str) -> dict[str, Any]:
    """One measure against response length: Spearman correlation, density cells and a quantile band."""
    title, unit = MEASURES[measure]
    finite = np.isfinite(scored.values[measure])
    length, values = scored.length[finite], scored.values[measure][finite]
    x_edges, (low, high) = _length_edges(length, LENGTH_BINS), drawn_range(values)
    y_edges = np.linspace(low, high, VALUE_BINS + 1)
    counts = np.histogram2d(length, values, [x_edges, y_edges])[0].astype(np.int64)
    return {
        "measure": measure,
        "title": title,
        "unit": unit,
        "spearman": spearman(length, values),
        "n": values.size,
        "x_edges": x_edges,
        "y_edges": y_edges,
        "cells": [[int(x), int(y), int(counts[x, y])] for x, y in np.argwhere(counts)],
        "band": _quantile_band(length, values),
        "outside": int(((values < low) | (values > high)).sum()),
    }


def spearman(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float | None:
    """Rank correlation, ties averaged; None for fewer than two points or where one side does not vary."""
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(stats.spearmanr(x, y).statistic)


def _length_edges(length: Ints, bins: int) -> Ints:
    """Whole-numbered edges, evenly spaced in the logarithm, each bin [edge, next edge)."""
    if not length.size:
        return np.array([1, 2], dtype=np.int64)
    low, high = max(1, int(length.min())), int(length.max()) + 1
    return np.unique(np.round(np.geomspace(low, high, bins + 1)).astype(np.int64))


def _quantile_band(length: Ints, values: Floats) -> list[dict[str, Any]]:
    band = []
    edges = _length_edges(length, BAND_BINS)
    for start, end in pairwise(edges):
        inside = (length >= start) & (length < end)
        if inside.sum() >= MIN_BAND_ROWS:
            p10, p50, p90 = np.percentile(values[inside], [10, 50, 90])
            middle = float(np.exp(np.log(length[inside]).mean()))
            band.append({"length": middle, "p10": p10, "p50": p50, "p90": p90, "rows": int(inside.sum())})
    return band
