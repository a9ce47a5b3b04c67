"""What the selection holds beside what the pool holds: by source, by length, by groups that deserve a second look."""

from collections import Counter
from typing import Any

import numpy as np

from davir_ray.report.inputs import Bools, Ints, Manifests, Scored, counts_of, details_of

NUM_DECILES = 10
SHORT_RESPONSE_TOKENS = 4
_LEFT_OUT = {
    "duplicates": "same prompt and response as a higher-ranked row",
    "too_short": "fewer response tokens than the filter asks for",
    "too_long": "more response tokens than the filter allows",
    "beyond_min_score": "the score does not reach min_score",
}


def selection(manifests: Manifests) -> dict[str, Any]:
    """What the select stage counted: rows that filters left out, groups, and sources with their repetitions."""
    counts, details = counts_of(manifests, "select"), details_of(manifests, "select")
    return {
        "left_out": [{"name": text, "rows": counts[reason]} for reason, text in _LEFT_OUT.items() if reason in counts],
        "groups": [row for row in details.get("groups", []) if row["group"]],
        "sources": details.get("sources", []),
        "is_mixture": any(row["repeat"] > 1 for row in details.get("sources", [])),
    }


def compare(scored: Scored, is_sample: bool) -> dict[str, Any]:
    """Shares of the pool beside shares of the selection."""
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
    return [
        {
            "from": int(scored.length[group == index].min()),
            "to": int(end),
            "rows": int((group == index).sum()),
            **_shares(group == index, scored.selected),
        }
        for index, end in enumerate(ends)
    ]


def _signs(scored: Scored, is_sample: bool) -> list[dict[str, Any]]:
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
