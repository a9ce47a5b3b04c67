"""What the report says of the stability of a selection: how much of it another reference would have selected, too."""

from collections.abc import Mapping
from typing import Any

from davir_ray.config.selection import NOT_MEASURED

MOSTLY_NOISE = 0.3
"""Overlap beyond chance below which a selection counts as mostly noise; the threshold is our own."""


def stability_facts(manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The facts of the stage stability; None where there is one reference, or nothing is recorded."""
    counts, found = ((manifest or {}).get(name) for name in ("counts", "details"))
    if not counts or not found:
        return None
    return {
        **found,
        "num_runs": len(found["runs"]),
        "num_selected": counts["selected"],
        "num_rows": counts["rows"],
        "near_cut": counts["near_cut"],
        "share_near_cut": counts["near_cut"] / counts["rows"],
        "share_of_selected": [times / counts["selected"] for times in found["times_chosen"]],
    }


def stability_finding(facts: dict[str, Any] | None) -> dict[str, Any]:
    """A sentence on the overlap, which deserves a closer look where the selection is mostly noise."""
    if facts is None:
        return {"look": False, "text": NOT_MEASURED}
    always = f"{100 * facts['share_of_selected'][-1]:.0f} % of the selected rows are among the best of every reference"
    if facts["overlap"] is None:
        return {"look": False, "text": f"{always}; every row is selected."}
    low, high = (f"{end:.2f}" for end in facts["interval"])
    text = (
        f"the selections of two references overlap by {facts['overlap']:.2f} beyond chance (0: as random ones do, 1: "
        f"wholly; 95 % interval {low} to {high}); {always}."
    ).replace("-", "−")
    if facts["overlap"] < MOSTLY_NOISE:
        return {"look": True, "text": f"The selection is mostly noise: {text}"}
    return {"look": False, "text": text[:1].upper() + text[1:]}
