"""From the manifests and tables of one run to the facts of its report, as one dictionary ready for JSON.

Pure functions: no files, no models. Shares are fractions of 1, losses nats, lengths response tokens. A value that is
not defined (a correlation without variance, a count that no manifest holds) is None, never NaN.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from davir_ray.config import SELECT_RULES
from davir_ray.schema import RejectReason, Status

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

STAGES = ("prepare", "finetune", "score", "rank", "select")
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
LARGEST_EXACT_INT = 2**53  # above this, JavaScript and many JSON readers round

HISTOGRAM_BINS = 48
LENGTH_BINS, VALUE_BINS, BAND_BINS = 28, 26, 12
MIN_BAND_ROWS = 10  # fewer rows make the 10th and 90th percentile of a length bin meaningless
NUM_DECILES = 10
MAX_CURVE_POINTS = 500
ROWS_PER_REASON = 5
MAX_DETAIL_CHARS = 300
SHORT_RESPONSE_TOKENS = 4

# When a finding asks for a second look. The thresholds are ours; they colour the page and decide nothing.
STRONG_CORRELATION = 0.5
LARGE_RATIO = 2.0
SMALLEST_SHARE = 0.01

REASON_MEANING: dict[str, str] = {
    RejectReason.BROKEN_JSON: "the line or array element is not JSON",
    RejectReason.INVALID_TEXT: "not UTF-8, or holds a lone surrogate",
    RejectReason.NOT_AN_OBJECT: "JSON, but not an object with named fields",
    RejectReason.MISSING_COLUMN: "a column of the format is absent or null",
    RejectReason.WRONG_TYPE: "a column holds something else than the format's type",
    RejectReason.EMPTY_RESPONSE: "nothing to score: empty or white space only",
    RejectReason.PROMPT_TOO_LONG: "the prompt alone fills the token limit",
    RejectReason.SPECIAL_TOKEN_IN_TEXT: "the text spells a special token that cannot be encoded as text",
    RejectReason.BAD_CONVERSATION: "the chat template refuses the messages, or no assistant turn is found",
    RejectReason.EMPTY_FILE: "a file of no bytes",
    RejectReason.UNREADABLE_FILE: "reading stopped at this row; what follows in the file is lost",
}
STATUS_MEANING: dict[str, str] = {
    Status.OK: "scored",
    Status.NO_PREDICTOR: "the first scored token has nothing before it",
    Status.ZERO_BASE_NLL: "the base loss is 0, so the ratio is not defined",
    Status.NON_FINITE_NLL: "a model returned NaN or infinity",
    Status.OUT_OF_MEMORY: "did not fit the device even alone",
}
MEASURES = {
    "rho_sum": ("RHO, summed over the response", "nats"),
    "rho_mean": ("RHO, mean over the response", "nats per token"),
    "davir": ("DavIR", "share of the base loss"),
}
SCORE_EXPLAINED = [
    "The reference is the base model fine-tuned on the whole candidate set; each example’s score is "
    "DavIR = (L_base − L_ref) / L_base, the share of the base’s loss on the response (in nats, given the prompt) "
    "that the fine-tune removed.",
    "0 means that the fine-tune changed nothing, 1 that the reference predicts the response perfectly (it has "
    "memorised it), and a negative score that the reference predicts it worse than the base did.",
]
OUTSIDE_REFERENCE = (
    "This run did not train its reference; whether that model has seen these examples is not known here, and the "
    "score means the above only as far as it has."
)
LIMITS = [
    "The reference has seen what it scores. It can memorise duplicates and label noise, whose score then rises "
    "towards 1, so a high score alone does not show that an example is good.",
    "A small base loss makes the ratio noisy: answers of one or two tokens, or answers that the base already knew, "
    "can get extreme scores in either direction.",
    "Nothing in the score keeps the selection diverse. Before you rely on it, train on a random selection of the same "
    "size, and on a random one with the same lengths, and compare.",
    "Dividing by the base loss reduces the dependence on response length; it does not remove it.",
    "The end-of-sequence token is scored as part of the response, for both models; a truncated response has none. "
    "Whether the paper scores it is not stated; we do.",
]


@dataclass(frozen=True)
class ReportInputs:
    """What the report is made of.

    Counts that are read from the manifests (an absent one is shown as not recorded):
    prepare: read, prepared, rejected, and each reject reason under its own name; score: scored, and each status under
    its own name; rank: ranked; select: selected. Read from details: finetune loss_by_step, a list of (step, nats per
    token); select cut, the ordering key of the last selected row.
    """

    config: dict[str, Any]
    """The resolved configuration, without secrets."""
    manifests: dict[str, dict[str, Any]]
    """Stage → its manifest; finetune is absent with an outside reference."""
    scores: pa.Table
    """The columns of schema.SCORES without the token losses, plus bool `selected`: all rows, or a uniform sample."""
    num_scored: int
    """Rows that the table stands for."""
    top: list[dict[str, Any]]
    """The best-ranked examples: rank, example_id, source, losses, prompt, response, and tokens where kept."""
    bottom: list[dict[str, Any]]
    """The worst-ranked examples, same fields."""
    rejects: pa.Table
    """A sample of the rejects, with schema.REJECTS."""
    planted: dict[str, Any] | None = None
    """Truth planted by the demo: note, and classes with name, share_of_all, share_of_selected, share_of_random and
    mean_davir."""


@dataclass(frozen=True)
class _Scored:
    """The rows that have a score, as columns of one length."""

    source: list[str]
    length: Ints
    values: dict[str, Floats]  # by measure
    selected: Bools
    truncated: Bools
    content_hash: Ints


def summarise(inputs: ReportInputs) -> dict[str, Any]:
    """Return the facts of the report; json.dumps(…, allow_nan=False) takes them as they are."""
    scored = _scored_rows(inputs.scores)
    is_sample = inputs.scores.num_rows < inputs.num_scored
    headline = _headline(inputs)
    statuses = _statuses(inputs, is_sample)
    rejects = _rejects(inputs)
    facts = {
        "format": 1,
        "headline": headline,
        "explanation": SCORE_EXPLAINED if headline["reference_trained_here"] else [*SCORE_EXPLAINED, OUTSIDE_REFERENCE],
        "books": _books(headline, rejects, statuses),
        "rejects": rejects,
        "statuses": statuses,
        "sample": {"rows": inputs.scores.num_rows, "stands_for": inputs.num_scored, "is_sample": is_sample},
        "training": _training(inputs.manifests),
        "davir": _davir(scored, inputs),
        "length": [_length_panel(scored, measure) for measure in MEASURES],
        "composition": _composition(scored, is_sample),
        "selection": _selection(inputs.manifests),
        "top": [_example(row) for row in inputs.top],
        "bottom": [_example(row) for row in inputs.bottom],
        "planted": inputs.planted,
        "limits": LIMITS,
        "settings": [{"name": name, "value": value} for name, value in _flatten(inputs.config)],
        "stages": _stages(inputs.manifests),
    }
    return _json_ready(facts | {"findings": _findings(facts)})  # type: ignore[no-any-return]


# Headline, books, rejects


def _headline(inputs: ReportInputs) -> dict[str, Any]:
    prepare, score, rank, select = (_counts(inputs.manifests, s) for s in ("prepare", "score", "rank", "select"))
    selected, ranked = select.get("selected"), rank.get("ranked")
    reference = inputs.config.get("reference")
    return {
        "read": prepare.get("read"),
        "prepared": prepare.get("prepared"),
        "rejected": prepare.get("rejected"),
        "scored": score.get("scored", score.get(Status.OK.value)),
        "ranked": ranked,
        "selected": selected,
        "share_selected": selected / ranked if selected is not None and ranked else None,
        "base": inputs.config.get("base"),
        "reference": reference,
        "reference_trained_here": reference is None,
        "rule": _rule(inputs.config),
    }


def _rule(config: Mapping[str, Any]) -> dict[str, Any]:
    select, rank = config.get("select") or {}, config.get("rank") or {}
    order, lowest = rank.get("order") or "davir", bool(rank.get("lowest"))
    name = next((name for name in SELECT_RULES if select.get(name) not in (None, {}, [])), None)
    value = select.get(name) if name else None
    return {
        "name": name,
        "value": value,
        "order": order,
        "lowest": lowest,
        "text": _rule_text(name, value, order, lowest) + _balance_text(name, select.get("balance")),
    }


def _balance_text(name: str | None, balance: list[str] | None) -> str:
    if not balance or name == "quotas":
        return ""
    return f", shared out by {' and '.join(balance)} as the pool is"


def _rule_text(name: str | None, value: Any, order: str, lowest: bool) -> str:
    by = "in random order" if order == "random" else f"by {order}, {'lowest' if lowest else 'highest'} first"
    match name:
        case "top_k":
            return f"the first {value:,} of the examples ranked {by}"
        case "top_fraction":
            return f"the first {100 * value:.4g} % of the examples ranked {by}"
        case "top_tokens":
            return f"the first examples ranked {by}, as many as fit in {value:,} response tokens"
        case "quotas":
            return f"the first of each group ranked {by}, by quotas"
        case "mixture":
            return f"a mixture of {len(value)} sources, the first of each ranked {by}"
        case "min_score":
            return f"every example whose {order} is at {'most' if lowest else 'least'} {value:g}"
        case _:
            return f"no selection rule is recorded; ranked {by}"


def _books(
    headline: dict[str, Any], rejects: list[dict[str, Any]], statuses: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each row of the input ends in exactly one place; `balanced` is None where a count is not recorded."""
    without_score = [row["count"] for row in statuses if row["status"] != Status.OK]
    reasons = [row["count"] for row in rejects]
    if headline["rejected"] and not reasons:
        reasons = [None]  # neither counts by reason nor rows at hand
    return [
        _equation("read", headline["read"], "prepared + rejected", [headline["prepared"], headline["rejected"]]),
        _equation("rejected", headline["rejected"], "sum over the reasons", reasons),
        _equation("prepared", headline["prepared"], "scored + without a score", [headline["scored"], *without_score]),
    ]


def _equation(left_text: str, left: int | None, right_text: str, parts: list[int | None]) -> dict[str, Any]:
    known = [part for part in parts if part is not None]
    right = sum(known) if len(known) == len(parts) else None
    balanced = None if left is None or right is None else left == right
    return {"left_text": left_text, "left": left, "right_text": right_text, "right": right, "balanced": balanced}


def _rejects(inputs: ReportInputs) -> list[dict[str, Any]]:
    """Reasons by falling count, each with a few of its rows."""
    counts = _counts(inputs.manifests, "prepare")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in inputs.rejects.to_pylist():
        rows.setdefault(row["reason"], []).append(row)
    reasons = {reason.value for reason in RejectReason if counts.get(reason.value)} | rows.keys()
    table = [
        {
            "reason": reason,
            "meaning": REASON_MEANING.get(reason),
            "count": counts.get(reason),
            "rows": [_reject_row(row) for row in sorted(rows.get(reason, []), key=_origin)[:ROWS_PER_REASON]],
        }
        for reason in reasons
    ]
    return sorted(table, key=lambda row: (-(row["count"] or 0), row["reason"]))


def _origin(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["source"] or "", row["source_file"] or "", row["source_row"] or 0


def _reject_row(row: dict[str, Any]) -> dict[str, Any]:
    detail = row["detail"] or ""
    short = detail if len(detail) <= MAX_DETAIL_CHARS else detail[:MAX_DETAIL_CHARS] + "…"
    return {"source": row["source"], "file": row["source_file"], "row": row["source_row"], "detail": short}


def _statuses(inputs: ReportInputs, is_sample: bool) -> list[dict[str, Any]]:
    """From the score manifest; from the table itself where that holds every row and the manifest has none."""
    counts: Mapping[str, int] = _counts(inputs.manifests, "score")
    if not any(status.value in counts for status in Status) and not is_sample:
        counts = Counter(inputs.scores["status"].to_pylist())
    return [
        {"status": status.value, "meaning": STATUS_MEANING[status], "count": counts[status.value]}
        for status in Status
        if counts.get(status.value)
    ]


# Scores


def _scored_rows(table: pa.Table) -> _Scored:
    is_scored = pc.and_(pc.equal(table["status"], Status.OK.value), pc.is_finite(table["davir"]))
    rows = table.filter(pc.fill_null(is_scored, False))
    return _Scored(
        source=[name or "" for name in rows["source"].to_pylist()],
        length=rows["num_response_tokens"].to_numpy().astype(np.int64),
        values={name: rows[name].to_numpy().astype(np.float64) for name in MEASURES},
        selected=pc.fill_null(rows["selected"], False).to_numpy().astype(np.bool_),
        truncated=pc.fill_null(rows["truncated"], False).to_numpy().astype(np.bool_),
        content_hash=rows["content_hash"].to_numpy().astype(np.int64),
    )


def _davir(scored: _Scored, inputs: ReportInputs) -> dict[str, Any]:
    values, cut = scored.values["davir"], _cut(scored, inputs)
    return {
        "all": _distribution(values),
        "selected": _distribution(values[scored.selected]),
        "cut": cut,
        "histogram": _histogram(values, scored.selected, cut),
    }


def _distribution(values: Floats) -> dict[str, Any]:
    if not values.size:
        return {"n": 0, "mean": None, "percentiles": [{"p": p, "value": None} for p in PERCENTILES]}
    at = np.percentile(values, PERCENTILES)
    percentiles = [{"p": p, "value": value} for p, value in zip(PERCENTILES, at, strict=True)]
    return {"n": values.size, "mean": float(values.mean()), "percentiles": percentiles}


def _cut(scored: _Scored, inputs: ReportInputs) -> float | None:
    """DavIR of the last selected row; None where another key orders the ranking and so leaves no edge in DavIR."""
    rule = _rule(inputs.config)
    if rule["order"] != "davir":
        return None
    recorded = _details(inputs.manifests, "select").get("cut")
    if recorded is not None:
        return float(recorded)
    chosen = scored.values["davir"][scored.selected]
    if not chosen.size:
        return None
    return float(chosen.max() if rule["lowest"] else chosen.min())


def _histogram(values: Floats, selected: Bools, cut: float | None) -> dict[str, Any]:
    """Counts over the bulk of the values; the few far ones (the score has no lower end) are counted below and above."""
    edges = _bin_edges(*_drawn_range(values), cut)
    return {
        "edges": edges,
        "all": np.histogram(values, edges)[0],
        "selected": np.histogram(values[selected], edges)[0],
        "below": int((values < edges[0]).sum()),
        "above": int((values > edges[-1]).sum()),
    }


def _bin_edges(low: float, high: float, cut: float | None) -> Floats:
    """Even edges from low to high; a cut between them becomes an edge, so that no bin mixes its two sides."""
    if cut is None or not low < cut < high:
        return np.linspace(low, high, HISTOGRAM_BINS + 1)
    width = (high - low) / HISTOGRAM_BINS
    bins_below, bins_above = math.ceil((cut - low) / width), math.ceil((high - cut) / width)
    return cut + np.arange(-bins_below, bins_above + 1, dtype=np.float64) * width


def _drawn_range(values: Floats) -> tuple[float, float]:
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


def _length_panel(scored: _Scored, measure: str) -> dict[str, Any]:
    """One measure against response length: Spearman correlation, density cells and a quantile band."""
    title, unit = MEASURES[measure]
    finite = np.isfinite(scored.values[measure])
    length, values = scored.length[finite], scored.values[measure][finite]
    x_edges, (low, high) = _length_edges(length, LENGTH_BINS), _drawn_range(values)
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


# Selection


_LEFT_OUT = {
    "duplicates": "same prompt and response as a higher-ranked row",
    "too_short": "fewer response tokens than the filter asks for",
    "too_long": "more response tokens than the filter allows",
    "beyond_min_score": "the score does not reach min_score",
}


def _selection(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the select stage counted: rows that filters left out, groups, and sources with their repetitions."""
    counts, details = _counts(manifests, "select"), _details(manifests, "select")
    return {
        "left_out": [{"name": text, "rows": counts[reason]} for reason, text in _LEFT_OUT.items() if reason in counts],
        "groups": [row for row in details.get("groups", []) if row["group"]],
        "sources": details.get("sources", []),
        "is_mixture": any(row["repeat"] > 1 for row in details.get("sources", [])),
    }


# Composition


def _composition(scored: _Scored, is_sample: bool) -> dict[str, Any]:
    return {
        "num_all": scored.length.size,
        "num_selected": int(scored.selected.sum()),
        "sources": _sources(scored),
        "length_deciles": _length_deciles(scored),
        "median_length": {"all": _median(scored.length), "selected": _median(scored.length[scored.selected])},
        "signs": _signs(scored, is_sample),
    }


def _shares(member: Bools, selected: Bools) -> dict[str, Any]:
    """Share of all scored rows and of the selected ones that a group holds."""
    chosen = member[selected]
    return {
        "share_of_all": float(member.mean()) if member.size else None,
        "share_of_selected": float(chosen.mean()) if chosen.size else None,
    }


def _sources(scored: _Scored) -> list[dict[str, Any]]:
    names = np.array(scored.source, dtype=object)
    counts = sorted(Counter(scored.source).items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "rows": rows, **_shares(names == name, scored.selected)} for name, rows in counts]


def _length_deciles(scored: _Scored) -> list[dict[str, Any]]:
    """Tenths of the pool by response length; ties stay together, so a tenth can be larger or missing."""
    if not scored.length.size:
        return []
    steps = np.arange(1, NUM_DECILES + 1) / NUM_DECILES
    ends = np.unique(np.quantile(scored.length, steps, method="inverted_cdf"))
    group = np.searchsorted(ends, scored.length, side="left")
    return [
        {
            "from": int(scored.length[group == index].min()),
            "to": int(end),
            "rows": int((group == index).sum()),
            **_shares(group == index, scored.selected),
        }
        for index, end in enumerate(ends)
    ]


def _signs(scored: _Scored, is_sample: bool) -> list[dict[str, Any]]:
    """Groups that a self-scored selection can favour for the wrong reason."""
    groups = {
        "truncated response": scored.truncated,
        f"response of at most {SHORT_RESPONSE_TOKENS} tokens": scored.length <= SHORT_RESPONSE_TOKENS,
        "negative DavIR (the reference is worse)": scored.values["davir"] < 0,
    }
    if not is_sample:  # in a sample most copies miss their twin
        _, inverse, copies = np.unique(scored.content_hash, return_inverse=True, return_counts=True)
        groups["exact copy of another example"] = copies[inverse] > 1 if copies.size else np.zeros(0, dtype=np.bool_)
    return [{"name": name, "rows": int(m.sum()), **_shares(m, scored.selected)} for name, m in groups.items()]


def _median(values: Ints) -> float | None:
    return float(np.median(values)) if values.size else None


# Examples, training, stages


def _example(row: dict[str, Any]) -> dict[str, Any]:
    """One ranked example with its losses summed and per token; ids are strings, whole in every JSON reader."""
    num_tokens = row["num_response_tokens"]
    plain = ("rank", "source", "davir", "rho_sum", "rho_mean", "base_nll", "reference_nll", "num_response_tokens")
    return {
        **{name: row[name] for name in (*plain, "prompt", "response")},
        "example_id": str(row["example_id"]),
        "base_nll_mean": _ratio(row["base_nll"], num_tokens),
        "reference_nll_mean": _ratio(row["reference_nll"], num_tokens),
        "tokens": _tokens(row),
    }


def _ratio(value: float | None, count: int | None) -> float | None:
    return value / count if value is not None and count else None


def _tokens(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Tokens with both losses; None where they were not kept or do not belong together."""
    columns = [row.get(name) for name in ("tokens", "base_token_nll", "reference_token_nll")]
    if any(column is None for column in columns):
        return None
    texts, base, reference = (list(column) for column in columns if column is not None)
    if not texts or not len(texts) == len(base) == len(reference):
        return None
    return [{"text": t, "base": b, "reference": r} for t, b, r in zip(texts, base, reference, strict=True)]


def _training(manifests: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    curve = [list(point) for point in _details(manifests, "finetune").get("loss_by_step") or []]
    curve = [point for point in curve if point[1] is not None and math.isfinite(point[1])]
    if not curve:
        return None
    stride = math.ceil(len(curve) / MAX_CURVE_POINTS)
    tenth = max(1, len(curve) // 10)  # a single step's loss is one batch's, too noisy to quote
    return {
        "steps": curve[-1][0],
        "first": float(np.mean([loss for _, loss in curve[:tenth]])),
        "last": float(np.mean([loss for _, loss in curve[-tenth:]])),
        "loss_by_step": curve[::stride],
    }


def _stages(manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    known = [stage for stage in STAGES if stage in manifests]
    return [_stage(stage, manifests[stage]) for stage in [*known, *sorted(manifests.keys() - set(STAGES))]]


def _stage(stage: str, manifest: dict[str, Any]) -> dict[str, Any]:
    details = {name: value for name, value in (manifest.get("details") or {}).items() if name != "loss_by_step"}
    return {
        "stage": stage,
        "seconds": manifest.get("seconds"),
        "num_files": len(manifest.get("files") or []),
        "counts": _named(manifest.get("counts")),
        "details": _named(details),
        "versions": _named(manifest.get("versions")),
        "fingerprint": _named(manifest.get("fingerprint")),
    }


def _named(mapping: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in _flatten(mapping or {})]


# Findings


def _findings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What a reader should know first: each a sentence, with `look` where it deserves a second look."""
    findings = [_finding_books(facts["books"]), _finding_length(facts["length"]), _finding_median(facts["composition"])]
    findings += [_finding_sign(sign) for sign in facts["composition"]["signs"]]
    return [finding for finding in findings if finding]


def _finding_books(books: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [row for row in books if row["balanced"] is False]
    if wrong:
        sides = [f"{row['left_text']} is {row['left']:,}, {row['right_text']} {row['right']:,}" for row in wrong]
        return {"look": True, "text": f"The counts do not balance: {'; '.join(sides)}."}
    if any(row["balanced"] is None for row in books):
        return {"look": True, "text": "Not every count is recorded, so the books cannot be checked."}
    return {"look": False, "text": "The counts balance: every row that was read is accounted for."}


def _finding_length(panels: list[dict[str, Any]]) -> dict[str, Any] | None:
    by_name = {panel["measure"]: panel["spearman"] for panel in panels}
    davir, rho = by_name["davir"], by_name["rho_sum"]
    if davir is None or rho is None:
        return None
    text = f"Spearman correlation with response length: DavIR {_signed(davir)}, RHO (summed) {_signed(rho)}."
    return {"look": abs(davir) >= STRONG_CORRELATION, "text": text}


def _finding_median(composition: dict[str, Any]) -> dict[str, Any] | None:
    pool, chosen = composition["median_length"]["all"], composition["median_length"]["selected"]
    if not pool or not chosen:
        return None
    text = f"The median response has {chosen:,.0f} tokens in the selection and {pool:,.0f} in the pool."
    return {"look": not 1 / LARGE_RATIO < chosen / pool < LARGE_RATIO, "text": text}


def _finding_sign(sign: dict[str, Any]) -> dict[str, Any] | None:
    """Only a group that the selection clearly favours is worth a line."""
    pool, chosen = sign["share_of_all"], sign["share_of_selected"]
    if pool is None or chosen is None or chosen < SMALLEST_SHARE or chosen < LARGE_RATIO * pool:
        return None
    shares = f"{100 * chosen:.1f} % of the selection, {100 * pool:.1f} % of the pool"
    return {"look": True, "text": f"The selection favours one group: {sign['name']}, {shares}."}


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


# Plain values


def _counts(manifests: dict[str, dict[str, Any]], stage: str) -> dict[str, int]:
    return (manifests.get(stage) or {}).get("counts") or {}


def _details(manifests: dict[str, dict[str, Any]], stage: str) -> dict[str, Any]:
    return (manifests.get(stage) or {}).get("details") or {}


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested mappings as (dotted name, value) pairs; lists of mappings by index."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            yield from _flatten(dict(enumerate(value)), f"{name}.")  # type: ignore[arg-type]
        else:
            yield name, value


def _json_ready(value: Any) -> Any:
    """Plain JSON types: not-finite numbers become None, whole numbers above 2**53 and unknown types strings."""
    match value:
        case None | bool():
            return value
        case np.generic() | np.ndarray():
            return _json_ready(value.tolist())
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
        case int():
            return value if abs(value) <= LARGEST_EXACT_INT else str(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(_json_ready(key)): _json_ready(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_ready(item) for item in value]
        case _:
            return _json_ready(str(value))
