"""From the margins and manifests of preference training to the facts of its report, ready for JSON, and its page.

Pure functions: no files, no models. Log-probabilities are nats, lengths response tokens; a value that is not defined is
None.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from davir_ray.report import charts, history
from davir_ray.report.jsonable import flatten, json_ready
from davir_ray.report.page import environment

PAPER = {"dpo": 0.38, "ipo": -0.10, "davir_dpo": 0.07}
"""Correlation (Pearson) of the margin with the difference in response length that the paper reports for each loss;
its data and recipe are not stated."""

NAMES = {"davir_dpo": "DavIR-DPO", "dpo": "DPO", "ipo": "IPO", "dpo_norm": "length-normalised DPO"}

_MEANS = (
    "loss",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "frozen_chosen",
    "frozen_rejected",
    "policy_chosen",
    "policy_rejected",
)
_SECTIONS = [
    ("glance", "What was learnt"),
    ("length", "Length"),
    ("sweep", "Beside other trainings"),
    ("training", "Training"),
    ("limits", "Known limits"),
    ("run", "Settings"),
]
_LEVEL = 0.95
_NEAR_CERTAIN = 1.0
"""Nats: DavIR-DPO divides by them, so a response below has more weight than its rounding bears."""
_BANDS = 12
_LEAST_IN_BAND = 10

LIMITS = [
    "Accuracies and margins are of the implicit reward: they say that the policy has moved towards the chosen "
    "responses, not that a person would prefer what it writes.",
    "On pairs that were trained on, they also tell what was learnt by heart; held-out pairs tell what carries over.",
    "The paper's correlations are of another model, data and recipe, which it does not state, nor of which margin: the "
    "loss's own, or the plain difference of log-ratios.",
    "Intervals count the pairs as independent, and one training: another seed gives another policy.",
]


def alignment_facts(
    margins: pa.Table,
    num_pairs: int,
    manifests: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    sweep: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The facts of a run from rows of MARGINS, all of them or a sample of `num_pairs`.

    `sweep` is the table of this and further trainings, of report/sweep.py; empty where there are none.
    """
    aligned = manifests["align"]["details"]
    prepared, counted = manifests["prepare"]["counts"], manifests["margins"]["counts"]
    facts = {
        "format": 1,
        "loss": aligned["loss"],
        "loss_name": NAMES[aligned["loss"]],
        "beta": aligned["beta"],
        "paper": PAPER.get(aligned["loss"]),
        "paper_of_all": {NAMES[loss]: value for loss, value in PAPER.items()},
        "books": {
            "read": prepared["read"],
            "rejected": prepared["rejected"],
            "pairs": prepared["prepared"] // 2,
            "trained": manifests["align"]["counts"]["pairs"],
            "not_measured": counted["pairs"] - counted["measured"],
        },
        "sample": {"rows": margins.num_rows, "stands_for": num_pairs, "is_sample": margins.num_rows < num_pairs},
        "parts": parts_of(margins),
        "sweep": list(sweep),
        "curves": {"loss": aligned["loss_by_step"], **aligned["measures_by_step"]},
        "limits": LIMITS,
        "settings": [{"name": name, "value": value} for name, value in flatten(settings)],
        "stages": history.stages(manifests),
    }
    return json_ready(facts)  # type: ignore[no-any-return]


def parts_of(margins: pa.Table) -> dict[str, dict[str, Any]]:
    """Figures of the pairs trained on and of those held out, where there are any that have a margin."""
    measured = margins.filter(pc.equal(margins["status"], "ok"))
    held_out = np.asarray(measured["held_out"])
    parts = {"trained": measured.filter(pa.array(~held_out)), "held_out": measured.filter(pa.array(held_out))}
    return {name: _part(table) for name, table in parts.items() if table.num_rows}


def render_alignment(facts: dict[str, Any]) -> str:
    """The facts as HTML; the same facts give the same bytes."""
    shown = facts["parts"].get("held_out") or facts["parts"].get("trained")
    drawn = {
        "loss": charts.step_curve(facts["curves"]["loss"], "loss", "loss", "Training loss by step."),
        "accuracy": charts.step_curve(
            facts["curves"]["accuracy"],
            "accuracy of rewards",
            "accuracy",
            "Accuracy of the rewards by step.",
        ),
        "length": charts.margin_band(shown["band"]) if shown and shown["band"] else None,
    }
    template = environment().get_template("alignment.html.j2")
    sections = [(id, name) for id, name in _SECTIONS if id != "sweep" or facts["sweep"]]
    return template.render(facts=facts, charts=drawn, sections=sections)


def _part(table: pa.Table) -> dict[str, Any]:
    """Means over pairs, and how the margin goes with the difference in length."""
    margin = np.asarray(table["margin"])
    gain_chosen, gain_rejected = (
        np.asarray(table[f"policy_{role}"]) - np.asarray(table[f"frozen_{role}"]) for role in ("chosen", "rejected")
    )
    frozen = np.concatenate([np.asarray(table["frozen_chosen"]), np.asarray(table["frozen_rejected"])])
    difference = (np.asarray(table["num_chosen_tokens"]) - np.asarray(table["num_rejected_tokens"])).astype(np.float64)
    num_higher = int((margin > 0).sum())
    interval = stats.binomtest(num_higher, len(margin)).proportion_ci(_LEVEL, method="wilson")
    return {
        "pairs": len(margin),
        "accuracy": num_higher / len(margin),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        **{name: float(np.mean(np.asarray(table[name]))) for name in _MEANS},
        "margin_median": float(np.median(margin)),
        "near_certain": int((np.abs(frozen) < _NEAR_CERTAIN).sum()),
        "difference": float(difference.mean()),
        "length": _correlations(difference, margin),
        "length_of_gains": _correlations(difference, gain_chosen - gain_rejected),
        "band": _band(difference, margin),
    }


def _correlations(difference: npt.NDArray[np.float64], margin: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Pearson with Fisher's 95 % interval, and Spearman; None where a side does not vary."""
    if len(margin) < 4 or np.ptp(margin) == 0 or np.ptp(difference) == 0:
        return {"pearson": None, "pearson_interval": None, "spearman": None}
    pearson = stats.pearsonr(difference, margin)
    interval = pearson.confidence_interval(_LEVEL)
    return {
        "pearson": float(pearson.statistic),
        "pearson_interval": [float(interval.low), float(interval.high)],
        "spearman": float(stats.spearmanr(difference, margin).statistic),
    }


def _band(difference: npt.NDArray[np.float64], margin: npt.NDArray[np.float64]) -> list[dict[str, float]]:
    """The middle and the tenth and ninetieth percentile of the margin by parts of equal counts."""
    order = np.argsort(difference, kind="stable")
    parts = [part for part in np.array_split(order, _BANDS) if len(part) >= _LEAST_IN_BAND]
    if len(parts) < 2:
        return []
    return [
        {
            "difference": float(np.median(difference[part])),
            **{f"p{p}": float(np.percentile(margin[part], p)) for p in (10, 50, 90)},
        }
        for part in parts
    ]
