"""The report of preference training: the facts from its margins and manifests, the sweep over trainings, the page.

Pure functions: no files, no models. Log-probabilities are nats, lengths response tokens; a value that is not defined is
None.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from davir_ray.config.align import PAIR_LOSSES
from davir_ray.formulas.statistics import over_seeds
from davir_ray.report import charts
from davir_ray.report.facts import json_ready, named_values, stage_facts
from davir_ray.report.page import environment
from davir_ray.report.sources import evaluation_facts, source_facts
from davir_ray.run.files import digest
from davir_ray.run.manifest import differences
from davir_ray.schema import MARGINS

LIMITS = [
    "Accuracies and margins are those of the implicit reward: they show that the policy has moved towards the chosen "
    "responses, not that a person would prefer what it writes.",
    "On the training pairs they include memorisation; held-out pairs show what generalises.",
    "The paper’s correlations are for another model, data and recipe, which it does not state. Nor does it state "
    "whether its margin is that of the loss or the plain difference of log-ratios.",
    "Intervals treat the pairs as independent and describe one training: another seed gives another policy.",
]

_SECTIONS = [
    ("glance", "What changed"),
    ("length", "Length"),
    ("sweep", "Other trainings"),
    ("training", "Training"),
    ("sources", "Data"),
    ("limits", "Known limits"),
    ("run", "Settings"),
]
_MEANS = [field.name for field in MARGINS if pa.types.is_floating(field.type)]
"""Columns of the margins that are reported as means over the pairs."""

_LEVEL = 0.95
_NEAR_CERTAIN_NATS = 1.0
"""DavIR-DPO divides by the frozen loss: below this value, rounding errors have a large effect."""

_NUM_BANDS = 12
_MIN_BAND_PAIRS = 10


def alignment_facts(
    margins: pa.Table,
    num_pairs: int,
    manifests: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    sweep: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The facts of a run from rows of MARGINS: all `num_pairs` of them, or a sample.

    `sweep` is the table of this and other trainings, made by `sweep_table`; empty where there are no others.
    """
    aligned = manifests["align"]["details"]
    prepared, counted = manifests["prepare"]["counts"], manifests["margins"]["counts"]
    facts = {
        "format": 1,
        "loss": aligned["loss"],
        "loss_name": PAIR_LOSSES[aligned["loss"]].title,
        "beta": aligned["beta"],
        "paper": PAIR_LOSSES[aligned["loss"]].paper_correlation,
        "paper_of_all": {
            loss.title: loss.paper_correlation for loss in PAIR_LOSSES.values() if loss.paper_correlation is not None
        },
        "books": {
            "read": prepared["read"],
            "left_out": prepared.get("left_out", 0),
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
        "sources": source_facts(manifests["prepare"], settings),
        "evaluation_sets": evaluation_facts(manifests["prepare"]),
        "settings": named_values(settings),
        "stages": stage_facts(manifests),
    }
    return json_ready(facts)  # type: ignore[no-any-return]


def parts_of(margins: pa.Table) -> dict[str, dict[str, Any]]:
    """Measures of the pairs trained on and of those held out; a part without any measured pair is absent."""
    measured = margins.filter(pc.equal(margins["status"], "ok"))
    held_out = np.asarray(measured["held_out"])
    parts = {"trained": measured.filter(pa.array(~held_out)), "held_out": measured.filter(pa.array(held_out))}
    return {name: _part(table) for name, table in parts.items() if table.num_rows}


def _part(table: pa.Table) -> dict[str, Any]:
    """Means over pairs, and the correlation of the margin with the difference in length."""
    columns = {name: np.asarray(table[name]) for name in (*_MEANS, "num_chosen_tokens", "num_rejected_tokens")}
    margin = columns["margin"]
    gain_chosen, gain_rejected = (
        columns[f"policy_{role}"] - columns[f"frozen_{role}"] for role in ("chosen", "rejected")
    )
    frozen = np.concatenate([columns[f"frozen_{role}"] for role in ("chosen", "rejected")])
    difference = (columns["num_chosen_tokens"] - columns["num_rejected_tokens"]).astype(np.float64)
    num_higher = int((margin > 0).sum())
    interval = stats.binomtest(num_higher, len(margin)).proportion_ci(_LEVEL, method="wilson")
    return {
        "pairs": len(margin),
        "accuracy": num_higher / len(margin),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        **{name: float(np.mean(columns[name])) for name in _MEANS},
        "margin_median": float(np.median(margin)),
        "near_certain": int((np.abs(frozen) < _NEAR_CERTAIN_NATS).sum()),
        "difference": float(difference.mean()),
        "length": _correlations(difference, margin),
        "length_of_gains": _correlations(difference, gain_chosen - gain_rejected),
        "band": _band(difference, margin),
    }


def _correlations(difference: npt.NDArray[np.float64], margin: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Pearson correlation with Fisher's 95 % interval, and Spearman; None if one of the two does not vary."""
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
    """The 10th, 50th and 90th percentile of the margin, by difference in length, in parts with equally many pairs."""
    order = np.argsort(difference, kind="stable")
    parts = [part for part in np.array_split(order, _NUM_BANDS) if len(part) >= _MIN_BAND_PAIRS]
    band = []
    for part in parts if len(parts) > 1 else ():
        p10, p50, p90 = np.percentile(margin[part], (10, 50, 90)).tolist()
        band.append({"difference": float(np.median(difference[part])), "p10": p10, "p50": p50, "p90": p90})
    return band


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished preference training."""

    place: str
    """Location of its run."""
    fingerprint: Mapping[str, Any]
    """Fingerprint of its align stage."""
    details: Mapping[str, Any]
    """Details of its align stage: loss and beta."""
    parts: Mapping[str, Mapping[str, Any]]
    """The measures of its pairs, from `parts_of`."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the policy depends on, including the seed: equal for a training and its repetition.

        The frozen losses are left out, as they may differ in their last bits between machines. A default beta is
        replaced by its value, except that of DavIR-DPO, which is derived from the frozen losses.
        """
        kept = {name: value for name, value in self.fingerprint.items() if name != "frozen"}
        if self.details["loss"] == "davir_dpo":
            return kept
        return {**kept, "objective": {**kept["objective"], "beta": self.details["beta"]}}

    @property
    def without_seed(self) -> dict[str, Any]:
        """The settings without the seed: equal for trainings that differ in the seed alone."""
        recipe = {name: value for name, value in self.settings["recipe"].items() if name != "seed"}
        return {**self.settings, "recipe": recipe}


def sweep_table(trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """A row for each setting, in order of appearance: means over its seeds with their 95 % intervals.

    A training that occurs twice counts once. Each measure is {"mean", "interval"}, with the interval by Student's t
    over the seeds; the interval is None for one seed, and both are None if a seed lacks the measure. `differs` lists
    the differences from the first training's settings, except the loss and beta.
    """
    once: dict[str, Trained] = {}
    for one in trained:
        once.setdefault(digest(one.settings), one)
    groups: dict[str, list[Trained]] = {}
    for one in once.values():
        groups.setdefault(digest(one.without_seed), []).append(one)
    rows = []
    for group in groups.values():
        loss = group[0].details["loss"]
        lines = differences(trained[0].without_seed, group[0].without_seed)
        parts = [part for part in ("trained", "held_out") if all(part in one.parts for one in group)]
        rows.append(
            {
                "loss": loss,
                "loss_name": PAIR_LOSSES[loss].title,
                "beta": group[0].details["beta"],
                "paper": PAIR_LOSSES[loss].paper_correlation,
                "differs": [line for line in lines if not line.startswith(("objective.loss: ", "objective.beta: "))],
                "seeds": [one.settings["recipe"]["seed"] for one in group],
                "places": [one.place for one in group],
                "parts": {part: _over_seeds([one.parts[part] for one in group]) for part in parts},
            }
        )
    return rows


def _over_seeds(parts: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and interval of each measure over the seeds; the interval is cut to the values that are possible."""
    measures = {
        "accuracy": ([part["accuracy"] for part in parts], 0.0, 1.0),
        "margin": ([part["margin"] for part in parts], -math.inf, math.inf),
        "pearson": ([part["length"]["pearson"] for part in parts], -1.0, 1.0),
        "spearman": ([part["length"]["spearman"] for part in parts], -1.0, 1.0),
        "plain": ([part["length_of_gains"]["pearson"] for part in parts], -1.0, 1.0),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, (values, lowest, highest) in measures.items():
        if None in values:
            found[name] = {"mean": None, "interval": None}
        else:
            interval = over_seeds(values)
            clipped = list(interval.clipped(lowest, highest)) if interval else None
            found[name] = {"mean": float(np.mean(values)), "interval": clipped}
    return found


def render_alignment(facts: dict[str, Any]) -> str:
    """Return the page as HTML; the same facts give the same bytes."""
    shown = facts["parts"].get("held_out") or facts["parts"].get("trained")
    curves = facts["curves"]
    drawn = {
        "loss": charts.step_curve(curves["loss"], "loss", "loss", "Training loss by step."),
        "accuracy": charts.step_curve(curves["accuracy"], "reward accuracy", "accuracy", "Reward accuracy by step."),
        "length": charts.margin_band(shown["band"]) if shown and shown["band"] else None,
    }
    template = environment().get_template("alignment.html.j2")
    sections = [(id, name) for id, name in _SECTIONS if id not in ("sweep", "sources") or facts[id]]
    return template.render(facts=facts, charts=drawn, sections=sections)
