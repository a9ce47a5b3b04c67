"""How the scores and the losses are distributed: percentiles and histograms."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from davir_ray.report.headline import rule
from davir_ray.report.inputs import Floats, ReportInputs, Scored, details_of

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
HISTOGRAM_BINS = 48


def davir(scored: Scored, inputs: ReportInputs) -> dict[str, Any]:
    """DavIR over the pool and over the selection, and where the cut lies."""
    values, cut = scored.values["davir"], _cut(scored, inputs)
    chosen = values[scored.selected]
    edges = _bin_edges(*drawn_range(values), cut)
    return {
        "all": _distribution(values),
        "selected": _distribution(chosen),
        "cut": cut,
        "histogram": _histogram(edges, all=values, selected=chosen) | _outside(edges, values),
    }


def losses(scored: Scored) -> dict[str, Any]:
    """Mean loss of each response under both models, nats per token, over the pool and over the selection.

    `per_token` weighs by tokens instead: the loss of all responses over their tokens.
    """
    base, reference = scored.base_nll / scored.length, scored.reference_nll / scored.length
    both = np.concatenate([base, reference])
    edges = np.linspace(*drawn_range(both), HISTOGRAM_BINS + 1)
    return {
        "base": {"all": _distribution(base), "selected": _distribution(base[scored.selected])},
        "reference": {"all": _distribution(reference), "selected": _distribution(reference[scored.selected])},
        "per_token": {
            "base": _ratio_of_sums(scored.base_nll, scored.length),
            "reference": _ratio_of_sums(scored.reference_nll, scored.length),
        },
        "histogram": _histogram(edges, base=base, reference=reference) | _outside(edges, both),
    }


def _cut(scored: Scored, inputs: ReportInputs) -> float | None:
    """DavIR of the last selected row; None where another key orders the ranking and so leaves no edge in DavIR."""
    order = rule(inputs.config)
    if order["order"] != "davir":
        return None
    recorded = details_of(inputs.manifests, "select").get("cut")
    if recorded is not None:
        return float(recorded)
    chosen = scored.values["davir"][scored.selected]
    if not chosen.size:
        return None
    return float(chosen.max() if order["lowest"] else chosen.min())


def _distribution(values: Floats) -> dict[str, Any]:
    if not values.size:
        return {"n": 0, "mean": None, "percentiles": [{"p": p, "value": None} for p in PERCENTILES]}
    at = np.percentile(values, PERCENTILES)
    percentiles = [{"p": p, "value": value} for p, value in zip(PERCENTILES, at, strict=True)]
    return {"n": values.size, "mean": float(values.mean()), "percentiles": percentiles}


def _ratio_of_sums(values: Floats, weights: npt.NDArray[Any]) -> float | None:
    return float(values.sum() / weights.sum()) if weights.sum() else None


def _histogram(edges: Floats, **layers: Floats) -> dict[str, Any]:
    return {"edges": edges, **{name: np.histogram(values, edges)[0] for name, values in layers.items()}}


def _outside(edges: Floats, values: Floats) -> dict[str, int]:
    """The few values beyond the drawn bulk: DavIR has no lower end, a loss no upper one."""
    return {"below": int((values < edges[0]).sum()), "above": int((values > edges[-1]).sum())}


def _bin_edges(low: float, high: float, cut: float | None) -> Floats:
    """Even edges from low to high; a cut between them becomes an edge, so that no bin mixes its two sides."""
    if cut is None or not low < cut < high:
        return np.linspace(low, high, HISTOGRAM_BINS + 1)
    width = (high - low) / HISTOGRAM_BINS
    bins_below, bins_above = math.ceil((cut - low) / width), math.ceil((high - cut) / width)
    return cut + np.arange(-bins_below, bins_above + 1, dtype=np.float64) * width


def drawn_range(values: Floats) -> tuple[float, float]:
    """The range of all values, or where a tail is far longer than the bulk, the bulk with a margin."""
    if not values.size:
        return 0.0, 1.0
    first, last = np.percentile(values, [0.5, 99.5])
    margin = 0.25 * (last - first)
    low, high = max(float(values.min()), first - margin), min(float(values.max()), last + margin)
    if high - low < 1e-9 * max(1.0, abs(low)):
        # Wide enough that the bins' edges stay distinct numbers, whatever the one value is.
        half = 0.05 * max(1.0, abs(low))
        return float(low - half), float(high + half)
    return float(low), float(high)
