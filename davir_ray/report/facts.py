"""The facts of a run's report, from its manifests and tables: one dictionary, ready for JSON (report.json).

Pure functions: no files, no models. Shares are fractions of 1, losses nats, lengths response tokens. A value that is
not defined (a correlation without variance, a count that no manifest holds) is None, never NaN.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray.config.selection import SELECT_RULES
from davir_ray.report import distributions, prose
from davir_ray.report.distributions import Scored
from davir_ray.report.sources import evaluation_facts, source_facts
from davir_ray.report.stability import stability_facts
from davir_ray.schema import RejectReason, Status

Manifests = dict[str, dict[str, Any]]
"""The manifest of each stage, as a dictionary."""

ROWS_PER_REASON = 5
MAX_DETAIL_CHARS = 300
MAX_CURVE_POINTS = 500
MAX_RATES = 60
"""Maximum number of throughput intervals: in shorter ones, shards that end together would look like a burst."""

LARGEST_EXACT_INT = 2**53
"""JavaScript and many JSON readers round larger integers."""

_STAGES = ("prepare", "finetune", "score", "rank", "select")
_DRAWN = ("loss_by_step", "throughput", "by_source")
"""Details of a manifest that have a place of their own on the page."""

_NOT_OF_ALL_ROWS = (
    "mixture", "balance", "min_response_tokens", "max_response_tokens", "max_score", "skip_top"
)  # fmt: skip
"""Settings of a selection with which chance would not draw from all rows alike."""

_LEFT_OUT = {
    "duplicates": "same prompt and response as a higher-ranked row",
    "too_short": "fewer response tokens than the filter asks for",
    "too_long": "more response tokens than the filter allows",
    "beyond_min_score": "the score does not reach min_score",
    "beyond_max_score": "the score is beyond max_score",
    "skipped": "among the first ranks, by skip_top",
}


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What the facts are computed from.

    Counts of the manifests that are used (a missing one is shown as not recorded): prepare: read, prepared, rejected,
    and each reject reason under its own name; score: scored, and each status under its own name; rank: ranked; select:
    selected, and the rows that each filter left out. Their details: finetune: loss_by_step, a list of (step, nats per
    token); score: throughput, cumulative tokens at seconds since the start of the stage; select: cut, the ordering key
    of the last selected row, groups and sources.
    """

    config: dict[str, Any]
    """The resolved configuration, without secrets."""
    manifests: Manifests
    """The manifests of the complete stages; finetune is absent when the reference was given."""
    scores: pa.Table
    """The columns of schema.SCORES without the token losses, plus bool `selected`, with folds int8 `fold`, and
    double `davir_seen` where the other fold's reference has scored the rows, too: all rows, or a uniform sample."""
    num_scored: int
    """Number of rows that the table represents."""
    texts: pa.Table
    """The schema of distributions.TEXTS: of all texts, or of a uniform sample."""
    top: list[dict[str, Any]]
    """The best-ranked examples: rank, example_id, source, losses, prompt, response, and tokens where kept."""
    bottom: list[dict[str, Any]]
    """The worst-ranked examples, with the same fields."""
    rejects: pa.Table
    """A sample of the rejects, with schema.REJECTS."""
    middle: list[dict[str, Any]] = field(default_factory=list)
    """The examples around the middle rank, with the same fields."""
    with_tokens: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """For `best`, `middle` and `worst`: the examples nearest to that rank whose token losses were kept."""
    planted: dict[str, Any] | None = None
    """The truth planted by the demo: note, and classes with name, share_of_all, share_of_selected, share_of_random and
    mean_davir."""


def summarise(inputs: ReportInputs) -> dict[str, Any]:
    """Return the facts of the report; json.dumps(…, allow_nan=False) takes them as they are."""
    scored = distributions.scored_rows(inputs.scores)
    is_sample = inputs.scores.num_rows < inputs.num_scored
    headline, rejects, statuses = _headline(inputs), _rejects(inputs), _statuses(inputs, is_sample)
    alignment = _alignment(inputs.manifests)
    rule = inputs.config.get("select") or {}
    copies = distributions.copies(inputs.texts, bool(rule.get("drop_duplicates")))
    if copies is not None:
        copies["of_all_rows"] = not any(rule.get(name) for name in _NOT_OF_ALL_ROWS)
    facts = {
        "format": 1,
        "headline": headline,
        "explanation": prose.explanation(
            headline["reference_trained_here"], headline["num_folds"], alignment["way"] if alignment else None
        ),
        "books": _row_counts(headline, rejects, statuses),
        "rejects": rejects,
        "statuses": statuses,
        "sample": {"rows": inputs.scores.num_rows, "stands_for": inputs.num_scored, "is_sample": is_sample},
        "training": _training(inputs.manifests),
        "throughput": _throughput(inputs.manifests),
        "davir": distributions.davir(scored, _cut(scored, headline["rule"], inputs.manifests)),
        "folds": distributions.folds(inputs.scores),
        "alignment": alignment,
        "memorised": distributions.memorised(inputs.scores, is_sample),
        "copies": copies,
        "losses": distributions.losses(scored),
        "length": distributions.length_panels(scored),
        "composition": distributions.composition(scored, copies),
        "selection": _selection(inputs.manifests),
        "stability": stability_facts(inputs.manifests.get("stability")),
        "top": [_example(row) for row in inputs.top],
        "middle": [_example(row) for row in inputs.middle],
        "bottom": [_example(row) for row in inputs.bottom],
        "with_tokens": {place: [_example(row) for row in rows] for place, rows in inputs.with_tokens.items()},
        "planted": inputs.planted,
        "sources": source_facts(inputs.manifests.get("prepare") or {}, inputs.config),
        "evaluation_sets": evaluation_facts(inputs.manifests.get("prepare") or {}),
        "limits": prose.limits(headline["num_folds"], (inputs.config.get("prepare") or {}).get("fold_by")),
        "settings": named_values(inputs.config),
        "stages": stage_facts(inputs.manifests),
    }
    return json_ready(facts | {"findings": prose.findings(facts)})  # type: ignore[no-any-return]


def _headline(inputs: ReportInputs) -> dict[str, Any]:
    """Counts of the whole run, its models, and the rule of its selection."""
    prepare, score, rank, select = (_counts(inputs.manifests, s) for s in ("prepare", "score", "rank", "select"))
    selected, ranked = select.get("selected"), rank.get("ranked")
    reference = inputs.config.get("reference")
    return {
        "read": prepare.get("read"),
        "prepared": prepare.get("prepared"),
        "left_out": prepare.get("left_out", 0),  # absent in runs of 0.2
        "near_duplicates": prepare.get("near_duplicates", 0),  # there with prepare.near_duplicates drop
        "rejected": prepare.get("rejected"),
        "scored": score.get("scored", score.get(Status.OK)),
        "ranked": ranked,
        "selected": selected,
        "share_selected": selected / ranked if selected is not None and ranked else None,
        "base": inputs.config.get("base"),
        "reference": reference,
        "reference_trained_here": reference is None,
        "num_folds": (inputs.config.get("prepare") or {}).get("folds", 1),
        "rule": _rule(inputs.config),
    }


def _rule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of the selection, by name and in words."""
    select, rank = config.get("select") or {}, config.get("rank") or {}
    order, lowest = rank.get("order") or "davir", bool(rank.get("lowest"))
    name = next((name for name in SELECT_RULES if select.get(name) not in (None, {}, [])), None)
    value = select.get(name) if name else None
    text = prose.rule_text(name, value, order, lowest, select.get("balance") or [])
    return {"name": name, "value": value, "order": order, "lowest": lowest, "text": text}


def _row_counts(
    headline: dict[str, Any], rejects: list[dict[str, Any]], statuses: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Equations that hold if every row of the input is counted in exactly one place.

    `balanced` says whether the two sides are equal; it is None if a count is not recorded.
    """
    without_score = [row["count"] for row in statuses if row["status"] != Status.OK]
    reasons = [row["count"] for row in rejects]
    if headline["rejected"] and not reasons:
        reasons = [None]  # neither counts by reason nor rejected rows are recorded
    of_read = ["prepared", "left_out", *(["near_duplicates"] if headline["near_duplicates"] else []), "rejected"]
    equations = []
    for left_text, right_text, parts in (
        ("read", " + ".join(of_read).replace("_", " "), [headline[name] for name in of_read]),
        ("rejected", "sum over the reasons", reasons),
        ("prepared", "scored + without a score", [headline["scored"], *without_score]),
    ):
        left, right = headline[left_text], None if None in parts else sum(parts)
        balanced = None if left is None or right is None else left == right
        equations.append(
            {"left_text": left_text, "left": left, "right_text": right_text, "right": right, "balanced": balanced}
        )
    return equations


def _rejects(inputs: ReportInputs) -> list[dict[str, Any]]:
    """The reject reasons, most frequent first, each with a few of its rows."""
    counts = _counts(inputs.manifests, "prepare")
    rows = sorted(
        inputs.rejects.to_pylist(),
        key=lambda row: (row["source"] or "", row["source_file"] or "", row["source_row"] or 0),
    )
    reasons = {reason for reason in RejectReason if counts.get(reason)} | {row["reason"] for row in rows}
    table = [
        {
            "reason": reason,
            "meaning": prose.REASON_MEANING.get(reason),
            "count": counts.get(reason),
            "rows": [_reject(row) for row in rows if row["reason"] == reason][:ROWS_PER_REASON],
        }
        for reason in reasons
    ]
    return sorted(table, key=lambda row: (-(row["count"] or 0), row["reason"]))


def _reject(row: dict[str, Any]) -> dict[str, Any]:
    detail = row["detail"] or ""
    short = detail if len(detail) <= MAX_DETAIL_CHARS else detail[:MAX_DETAIL_CHARS] + "…"
    return {"source": row["source"], "file": row["source_file"], "row": row["source_row"], "detail": short}


def _statuses(inputs: ReportInputs, is_sample: bool) -> list[dict[str, Any]]:
    """Number of examples with each status: from the score manifest, else from the table if that holds every row."""
    counts: Mapping[str, int] = _counts(inputs.manifests, "score")
    if not any(status in counts for status in Status) and not is_sample:
        counts = Counter(inputs.scores["status"].to_pylist())
    return [
        {"status": status, "meaning": prose.STATUS_MEANING[status], "count": counts[status]}
        for status in Status
        if counts.get(status)
    ]


def _training(manifests: Manifests) -> dict[str, Any] | None:
    """The fine-tune's loss by step, nats per token, with folds the first one's; None where none is recorded."""
    details = _details(manifests, "finetune")
    of_folds = details.get("by_fold") or []
    recorded = (of_folds[0] if of_folds else details).get("loss_by_step") or []
    curve = [[step, loss] for step, loss in recorded if loss is not None and math.isfinite(loss)]
    if not curve:
        return None
    stride = math.ceil(len(curve) / (MAX_CURVE_POINTS - 1))
    tenth = max(1, len(curve) // 10)  # the loss of a single step is that of one batch: too noisy to quote
    return {
        "steps": curve[-1][0],
        "num_folds": len(of_folds),
        "first": float(np.mean([loss for _, loss in curve[:tenth]])),
        "last": float(np.mean([loss for _, loss in curve[-tenth:]])),
        "loss_by_step": [*curve[:-1:stride], curve[-1]],
    }


def _alignment(manifests: Manifests) -> dict[str, Any] | None:
    """How davir_aligned was made, with the line of each reference where it was linked; None if nothing ranks by it."""
    if "davir_aligned" not in manifests:
        return None
    details = _details(manifests, "davir_aligned")
    return {"way": details.get("way", "place"), "linked_by": details.get("linked_by"), "lines": details.get("lines")}


def _throughput(manifests: Manifests) -> dict[str, Any] | None:
    """Tokens scored per second between the recorded points; None where nothing is recorded."""
    recorded = _details(manifests, "score").get("throughput") or {}
    seconds, tokens = recorded.get("seconds") or [], recorded.get("tokens") or []
    if not seconds or len(seconds) != len(tokens) or not seconds[-1] > 0:
        return None
    return {
        "seconds": seconds[-1],
        "tokens": tokens[-1],
        "tokens_per_second": tokens[-1] / seconds[-1],
        "first_seconds": seconds[0],
        "rates": _rates(list(zip(seconds, tokens, strict=True))),
    }


def _rates(points: list[tuple[float, float]]) -> list[dict[str, float]]:
    """Tokens per second from each point to the next, after merging intervals that are too short."""
    shortest = (points[-1][0] - points[0][0]) / MAX_RATES
    kept = points[:1]
    for point in points[1:]:
        if point[0] - kept[-1][0] >= shortest:
            kept.append(point)
    if kept[-1] != points[-1]:  # the last interval absorbs the remainder
        kept = [*kept[: max(1, len(kept) - 1)], points[-1]]
    return [
        {"from": start, "to": end, "tokens_per_second": (after - before) / (end - start)}
        for (start, before), (end, after) in pairwise(kept)
        if end > start
    ]


def _cut(scored: Scored, rule: dict[str, Any], manifests: Manifests) -> float | None:
    """DavIR of the last selected row; None where the ranking has another order, so that DavIR has no cut."""
    if rule["order"] != "davir":
        return None
    recorded = _details(manifests, "select").get("cut")
    if recorded is not None:
        return float(recorded)
    chosen = scored.values["davir"][scored.selected]
    if not chosen.size:
        return None
    return float(chosen.max() if rule["lowest"] else chosen.min())


def _selection(manifests: Manifests) -> dict[str, Any]:
    """What the select stage counted: rows that filters left out, groups, and sources with their repetitions."""
    counts, details = _counts(manifests, "select"), _details(manifests, "select")
    return {
        "left_out": [{"name": text, "rows": counts[reason]} for reason, text in _LEFT_OUT.items() if reason in counts],
        "groups": [row for row in details.get("groups", []) if row["group"]],
        "sources": details.get("sources", []),
        "is_mixture": any(row["repeat"] > 1 for row in details.get("sources", [])),
    }


def _example(row: dict[str, Any]) -> dict[str, Any]:
    """One ranked example with its losses, summed and per token; its id is a string, exact in every JSON reader."""
    copied = (
        "rank", "source", "davir", "rho_sum", "rho_mean", "base_nll", "reference_nll", "num_response_tokens", "prompt",
        "response",
    )  # fmt: skip
    num_tokens = row["num_response_tokens"]
    means = {
        f"{name}_mean": row[name] / num_tokens if row[name] is not None and num_tokens else None
        for name in ("base_nll", "reference_nll")
    }
    example_id = str(row["example_id"])
    return {**{name: row[name] for name in copied}, "example_id": example_id, **means, "tokens": _tokens(row)}


def _tokens(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tokens with both losses; None where they were not kept or the three columns differ in length."""
    columns = [row.get(name) or [] for name in ("tokens", "base_token_nll", "reference_token_nll")]
    if not columns[0] or len({len(column) for column in columns}) > 1:
        return None
    return [{"text": t, "base": b, "reference": r} for t, b, r in zip(*columns, strict=True)]


def stage_facts(manifests: Manifests) -> list[dict[str, Any]]:
    """The counts, time, versions, fingerprint and details of each stage, in the order of the run."""
    stages = [*(stage for stage in _STAGES if stage in manifests), *sorted(manifests.keys() - set(_STAGES))]
    return [
        {
            "stage": stage,
            "seconds": manifests[stage].get("seconds"),
            "num_files": len(manifests[stage].get("files") or []),
            "counts": named_values(_counts(manifests, stage)),
            "details": named_values(
                {name: value for name, value in _details(manifests, stage).items() if name not in _DRAWN}
            ),
            "versions": named_values(manifests[stage].get("versions")),
            "fingerprint": named_values(manifests[stage].get("fingerprint")),
        }
        for stage in stages
    ]


def _counts(manifests: Manifests, stage: str) -> dict[str, int]:
    return (manifests.get(stage) or {}).get("counts") or {}


def _details(manifests: Manifests, stage: str) -> dict[str, Any]:
    return (manifests.get(stage) or {}).get("details") or {}


def named_values(mapping: Mapping[Any, Any] | None, prefix: str = "") -> list[dict[str, Any]]:
    """Nested settings or details as a list of {name, value}, the names dotted; lists of mappings by index."""
    found = []
    for key, value in (mapping or {}).items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            found += named_values(value, f"{prefix}{key}.")
        else:
            found.append({"name": f"{prefix}{key}", "value": value})
    return found


def json_ready(value: Any) -> Any:
    """Convert a value to plain JSON types.

    Numbers that are not finite become None; integers above 2**53 and objects of unknown types become strings.
    """
    match value:
        case None | bool():
            return value
        case np.generic() | np.ndarray():
            return json_ready(value.tolist())
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
        case int():
            return value if abs(value) <= LARGEST_EXACT_INT else str(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(json_ready(key)): json_ready(item) for key, item in value.items()}
        case list() | tuple():
            return [json_ready(item) for item in value]
        case _:
            return json_ready(str(value))
