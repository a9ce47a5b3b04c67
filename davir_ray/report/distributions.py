"""Statistics of the scored rows: DavIR and losses, scores against length, and the selection compared with the pool.

The pool is every row that has a score; the selection is the part of it that was selected.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from davir_ray.schema import Status

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MEASURES = {
    "rho_sum": ("RHO, summed over the response", "nats"),
    "rho_mean": ("RHO, mean over the response", "nats per token"),
    "davir": ("DavIR", "share of the base loss"),
}
"""Column of a score → its title and its unit."""

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
HISTOGRAM_BINS = 48
LENGTH_BINS, VALUE_BINS, BAND_BINS = 28, 26, 12
MIN_BAND_ROWS = 10
"""With fewer rows, the 10th and 90th percentiles of a range of lengths are meaningless."""

NUM_DECILES = 10
SHORT_RESPONSE_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The rows that have a score, as columns of equal length."""

    source: list[str]
    length: Ints
    """Response tokens."""
    values: dict[str, Floats]
    """The scores, by measure."""
    base_nll: Floats
    """Nats, summed over the response."""
    reference_nll: Floats
    """Nats, summed over the response."""
    selected: Bools
    truncated: Bools


def scored_rows(table: pa.Table) -> Scored:
    """Rows of the score table that have a score."""
    rows = table.filter(has_score(table))
    return Scored(
        source=rows["source"].fill_null("").to_pylist(),
        length=rows["num_response_tokens"].to_numpy().astype(np.int64),
        values={name: rows[name].to_numpy().astype(np.float64) for name in MEASURES},
        base_nll=rows["base_nll"].to_numpy().astype(np.float64),
        reference_nll=rows["reference_nll"].to_numpy().astype(np.float64),
        selected=rows["selected"].fill_null(False).to_numpy(),
        truncated=rows["truncated"].fill_null(False).to_numpy(),
    )


def has_score(table: pa.Table) -> pa.ChunkedArray:
    """Whether each row has a score: its status is ok and its DavIR is finite."""
    is_scored = pc.and_(pc.equal(table["status"], Status.OK.value), pc.is_finite(table["davir"]))
    return pc.fill_null(is_scored, False)


def davir(scored: Scored, cut: float | None) -> dict[str, Any]:
    """The distribution of DavIR over the pool and over the selection; `cut` is the score of the last selected row."""
    values = scored.values["davir"]
    chosen = values[scored.selected]
    edges = _edges_at_cut(*_drawn_range(values), cut)
    histogram = _histogram(edges, all=values, selected=chosen) | _outside(edges, values)
    return {"all": _distribution(values), "selected": _distribution(chosen), "cut": cut, "histogram": histogram}


def folds(table: pa.Table) -> list[dict[str, Any]]:
    """For each fold its scored rows, their mean DavIR, and the selected ones beside what chance gives.

    `expected` is the fold's share of the selection by its number of rows, `sd` the standard deviation of that number in
    random draws of as many rows without replacement. Empty without folds.
    """
    if "fold" not in table.column_names:
        return []
    has_score = np.isfinite(table["davir"].to_numpy().astype(np.float64))
    fold, davir, chosen = (table[name].to_numpy()[has_score] for name in ("fold", "davir", "selected"))
    total, num_chosen, found = len(fold), int(chosen.sum()), []
    for number in np.unique(fold):
        of_fold = fold == number
        share = of_fold.mean()
        found.append(
            {
                "fold": int(number),
                "rows": int(of_fold.sum()),
                "mean_davir": float(davir[of_fold].mean()),
                "selected": int(chosen[of_fold].sum()),
                "expected": float(num_chosen * share),
                "sd": float(np.sqrt(num_chosen * share * (1 - share) * (total - num_chosen) / max(1, total - 1))),
            }
        )
    return found


TEXTS = pa.schema({"copies": pa.int64(), "selected": pa.int64(), "texts": pa.int64()})
"""How many texts (a prompt with its response) so many scored rows have, of which so many are selected."""

EXACT_COPY = "exact copy of another example"


def copies(texts: pa.Table, once: bool) -> dict[str, Any] | None:
    """The rows with the text of another row: their shares of pool and selection, and what chance gives.

    Copies have one score, so chance draws whole texts: with c rows of a text, of which all are drawn with probability
    p, the share e of copies in the selection of n rows has the variance p (1 − p) Σ (c (is_copy − e))² / n². With
    `once`, where duplicates are dropped, c is 1. None if nothing is selected.
    """
    copies_T, selected_T, texts_T = (texts[name].to_numpy() for name in TEXTS.names)
    num_selected = int((texts_T * selected_T).sum())
    if not num_selected:
        return None
    is_copy_T, drawn_T = copies_T > 1, np.minimum(copies_T, 1) if once else copies_T
    num_rows, num_copies, num_drawn = (int((texts_T * of).sum()) for of in (copies_T, copies_T * is_copy_T, drawn_T))
    expected, share = float((texts_T * drawn_T * is_copy_T).sum() / num_drawn), num_selected / num_drawn
    variance = share * (1 - share) * (texts_T * (drawn_T * (is_copy_T - expected)) ** 2).sum()
    return {
        "rows": num_copies,
        "share_of_all": num_copies / num_rows,
        "share_of_selected": float((texts_T * selected_T * is_copy_T).sum() / num_selected),
        "expected": expected,
        "sd": float(np.sqrt(max(0.0, variance)) / num_selected),
        "once": once,
    }


_COPIES = ((1, 1), (2, 2), (3, 4), (5, 9), (10, None))
"""Ranges of the number of rows with the same prompt and response."""


def memorised(table: pa.Table, is_sample: bool) -> list[dict[str, Any]]:
    """By the number of exact copies, the mean DavIR by the reference that has seen a row and by the one that has not.

    Empty if the rows were not scored by both, or are a sample, which rarely holds all copies of a row.
    """
    if is_sample or "davir_seen" not in table.column_names:
        return []
    unseen, seen = (table[name].to_numpy().astype(np.float64) for name in ("davir", "davir_seen"))
    _, inverse, counts = np.unique(table["content_hash"].to_numpy(), return_inverse=True, return_counts=True)
    copies, found = counts[inverse], []
    for first, last in _COPIES:
        rows = np.isfinite(unseen) & np.isfinite(seen) & (copies >= first) & (copies <= (last or np.inf))
        if rows.any():
            means = {"unseen": float(unseen[rows].mean()), "seen": float(seen[rows].mean())}
            found.append({"from": first, "to": last, "rows": int(rows.sum()), **means})
    return found


def losses(scored: Scored) -> dict[str, Any]:
    """Mean loss of each response under both models, nats per token, over the pool and over the selection.

    `per_token` is weighted by tokens instead: the loss summed over all responses, divided by their tokens.
    """
    sums = {"base": scored.base_nll, "reference": scored.reference_nll}
    means = {model: nll / scored.length for model, nll in sums.items()}
    both, num_tokens = np.concatenate(list(means.values())), scored.length.sum()
    edges = np.linspace(*_drawn_range(both), HISTOGRAM_BINS + 1)
    parts = {
        model: {"all": _distribution(values), "selected": _distribution(values[scored.selected])}
        for model, values in means.items()
    }
    return {
        **parts,
        "per_token": {model: float(nll.sum() / num_tokens) if num_tokens else None for model, nll in sums.items()},
        "histogram": _histogram(edges, **means) | _outside(edges, both),
    }


def _distribution(values: Floats) -> dict[str, Any]:
    at = np.percentile(values, PERCENTILES) if values.size else [None] * len(PERCENTILES)
    percentiles = [{"p": p, "value": value} for p, value in zip(PERCENTILES, at, strict=True)]
    return {"n": values.size, "mean": float(values.mean()) if values.size else None, "percentiles": percentiles}


def _histogram(edges: Floats, **layers: Floats) -> dict[str, Any]:
    return {"edges": edges, **{name: np.histogram(values, edges)[0] for name, values in layers.items()}}


def _outside(edges: Floats, values: Floats) -> dict[str, int]:
    """The number of values beyond the edges: DavIR has no lower limit, a loss no upper one."""
    return {"below": int((values < edges[0]).sum()), "above": int((values > edges[-1]).sum())}


def _edges_at_cut(low: float, high: float, cut: float | None) -> Floats:
    """Evenly spaced edges from low to high; a cut between them is one of the edges, so no bin mixes its two sides."""
    if cut is None or not low < cut < high:
        return np.linspace(low, high, HISTOGRAM_BINS + 1)
    width = (high - low) / HISTOGRAM_BINS
    bins_below, bins_above = math.ceil((cut - low) / width), math.ceil((high - cut) / width)
    return cut + np.arange(-bins_below, bins_above + 1, dtype=np.float64) * width


def _drawn_range(values: Floats) -> tuple[float, float]:
    """The range of all values, or, if a tail is far longer than the bulk, the range of the bulk with a margin."""
    if not values.size:
        return 0.0, 1.0
    first, last = np.percentile(values, [0.5, 99.5])
    margin = 0.25 * (last - first)
    low, high = max(float(values.min()), first - margin), min(float(values.max()), last + margin)
    if high - low < 1e-9 * max(1.0, abs(low)):
        # Wide enough for the edges of the bins to be distinct floats when all values are equal.
        half = 0.05 * max(1.0, abs(low))
        return float(low - half), float(high + half)
    return float(low), float(high)


def length_panels(scored: Scored) -> list[dict[str, Any]]:
    """Each measure against response length: Spearman correlation, counts in cells, and a band of percentiles."""
    panels = []
    for measure, (title, unit) in MEASURES.items():
        finite = np.isfinite(scored.values[measure])
        length, values = scored.length[finite], scored.values[measure][finite]
        x_edges, (low, high) = _length_edges(length, LENGTH_BINS), _drawn_range(values)
        y_edges = np.linspace(low, high, VALUE_BINS + 1)
        counts = np.histogram2d(length, values, [x_edges, y_edges])[0].astype(np.int64)
        varies = values.size >= 2 and np.ptp(length) > 0 and np.ptp(values) > 0
        panels.append(
            {
                "measure": measure,
                "title": title,
                "unit": unit,
                "spearman": float(stats.spearmanr(length, values).statistic) if varies else None,
                "n": values.size,
                "x_edges": x_edges,
                "y_edges": y_edges,
                "cells": [[int(x), int(y), int(counts[x, y])] for x, y in np.argwhere(counts)],
                "band": _percentile_band(length, values),
                "outside": int(((values < low) | (values > high)).sum()),
            }
        )
    return panels


def _length_edges(length: Ints, bins: int) -> Ints:
    """Integer edges, evenly spaced in the logarithm; each bin is [edge, next edge)."""
    if not length.size:
        return np.array([1, 2], dtype=np.int64)
    low, high = max(1, int(length.min())), int(length.max()) + 1
    return np.unique(np.round(np.geomspace(low, high, bins + 1)).astype(np.int64))


def _percentile_band(length: Ints, values: Floats) -> list[dict[str, Any]]:
    """The 10th, 50th and 90th percentile of the values in each range of lengths that has enough rows."""
    band = []
    edges = _length_edges(length, BAND_BINS)
    for start, end in pairwise(edges):
        inside = (length >= start) & (length < end)
        if inside.sum() >= MIN_BAND_ROWS:
            p10, p50, p90 = np.percentile(values[inside], [10, 50, 90])
            middle = float(np.exp(np.log(length[inside]).mean()))
            band.append({"length": middle, "p10": p10, "p50": p50, "p90": p90, "rows": int(inside.sum())})
    return band


def composition(scored: Scored, copies: dict[str, Any] | None) -> dict[str, Any]:
    """The share of the pool and of the selection that falls in each source, length decile and suspicious group."""
    return {
        "num_all": scored.length.size,
        "num_selected": int(scored.selected.sum()),
        "sources": _sources(scored),
        "length_deciles": _length_deciles(scored),
        "median_length": {"all": _median(scored.length), "selected": _median(scored.length[scored.selected])},
        "signs": _suspicious_groups(scored, copies),
    }


def _shares(member: Bools, selected: Bools) -> dict[str, Any]:
    """The share of the pool and the share of the selection that a group has."""
    chosen = member[selected]
    return {
        "share_of_all": float(member.mean()) if member.size else None,
        "share_of_selected": float(chosen.mean()) if chosen.size else None,
    }


def _sources(scored: Scored) -> list[dict[str, Any]]:
    names = np.array(scored.source, dtype=object)
    counts = sorted(Counter(scored.source).items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "rows": rows, **_shares(names == name, scored.selected)} for name, rows in counts]


def _length_deciles(scored: Scored) -> list[dict[str, Any]]:
    """Tenths of the pool by response length; ties stay together, so a tenth can be larger or missing."""
    if not scored.length.size:
        return []
    steps = np.arange(1, NUM_DECILES + 1) / NUM_DECILES
    ends = np.unique(np.quantile(scored.length, steps, method="inverted_cdf"))
    group = np.searchsorted(ends, scored.length, side="left")
    deciles = []
    for index, end in enumerate(ends):
        member = group == index
        rows = {"from": int(scored.length[member].min()), "to": int(end), "rows": int(member.sum())}
        deciles.append(rows | _shares(member, scored.selected))
    return deciles


def _suspicious_groups(scored: Scored, copies: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Groups that a selection by DavIR can favour for the wrong reason."""
    groups = {
        "truncated response": scored.truncated,
        f"response of at most {SHORT_RESPONSE_TOKENS} tokens": scored.length <= SHORT_RESPONSE_TOKENS,
        "negative DavIR (the reference is worse)": scored.values["davir"] < 0,
    }
    found = [{"name": name, "rows": int(m.sum()), **_shares(m, scored.selected)} for name, m in groups.items()]
    return found if copies is None else [*found, {"name": EXACT_COPY, **copies}]


def _median(values: Ints) -> float | None:
    return float(np.median(values)) if values.size else None
