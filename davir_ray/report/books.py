"""Where each row of the input ended: the equations of the counts, the rejects and the statuses."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from davir_ray.report.inputs import ReportInputs, counts_of
from davir_ray.report.words import REASON_MEANING, STATUS_MEANING
from davir_ray.schema import RejectReason, Status

ROWS_PER_REASON = 5
MAX_DETAIL_CHARS = 300


def equations(
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


def rejects(inputs: ReportInputs) -> list[dict[str, Any]]:
    """Reasons by falling count, each with a few of its rows."""
    counts = counts_of(inputs.manifests, "prepare")
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


def statuses(inputs: ReportInputs, is_sample: bool) -> list[dict[str, Any]]:
    """From the score manifest; from the table itself where that holds every row and the manifest has none."""
    counts: Mapping[str, int] = counts_of(inputs.manifests, "score")
    if not any(status.value in counts for status in Status) and not is_sample:
        counts = Counter(inputs.scores["status"].to_pylist())
    return [
        {"status": status.value, "meaning": STATUS_MEANING[status], "count": counts[status.value]}
        for status in Status
        if counts.get(status.value)
    ]
