"""The report of preference training: the facts from its margins and manifests, the sweep over trainings, the page.

Pure functions: no files, no models. Log-probabilities are nats, lengths response tokens; a value that is not defined is
None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config.align import PAIR_LOSSES
from davir_ray.formulas.clusters import (
    Clusters,
    Comparison,
    Estimate,
    Measure,
    compare_correlations,
    compare_shares,
    correlation_interval,
    mean,
    mean_interval,
    pearson,
    share_interval,
    spearman,
)
from davir_ray.formulas.statistics import Interval, holm
from davir_ray.report import charts
from davir_ray.report.contrasts import SIGNIFICANT
from davir_ray.report.facts import json_ready, named_values, stage_facts
from davir_ray.report.page import environment, p_value
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
    "Intervals treat prompts as independent, and pairs with the same prompt as one cluster. Those of one training "
    "describe its policy alone: another seed gives another policy.",
    "Two intervals that overlap do not mean that there is no difference: settings are compared by tests on the same "
    "pairs. “No difference shown” does not mean that they are equal.",
    "A few pairs with margins far larger than the others’ decide Pearson’s correlation, and its interval is then too "
    "narrow; Spearman’s holds.",
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

_PARTS = ("trained", "held_out")
_CORRELATIONS = ("pearson", "spearman", "plain", "plain_spearman")
_COMPARED = ("accuracy", "pearson", "spearman", "plain")
"""Measures in which the settings of a sweep are compared. Margins of different losses have different units."""

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
    parts = {name: _only(measured, name) for name in _PARTS}
    return {name: _part(table) for name, table in parts.items() if table.num_rows}


def _only(pairs: pa.Table, part: str) -> pa.Table:
    return pairs.filter(pairs["held_out"] if part == "held_out" else pc.invert(pairs["held_out"]))


def _part(table: pa.Table) -> dict[str, Any]:
    """Means over pairs, and the correlations of the margin with the difference in length."""
    frozen = np.concatenate([np.asarray(table[f"frozen_{role}"]) for role in ("chosen", "rejected")])
    pairs = measured_pairs(table)
    difference, margin = np.asarray(pairs["difference"]), np.asarray(pairs["margin"])
    clusters = Clusters.of(np.asarray(pairs["prompt_hash"]))
    found = {name: _figure(name, estimate, clusters) for name, estimate in _estimates([pairs], clusters).items()}

    def correlations(**names: str) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        for title, name in names.items():
            shown |= {title: found[name]["mean"], f"{title}_interval": found[name]["interval"]}
        return shown

    return {
        "pairs": table.num_rows,
        "prompts": clusters.num,
        "accuracy": found["accuracy"]["mean"],
        "accuracy_interval": found["accuracy"]["interval"],
        **{name: float(np.mean(np.asarray(table[name]))) for name in _MEANS},
        "margin_median": float(np.median(margin)),
        "near_certain": int((np.abs(frozen) < _NEAR_CERTAIN_NATS).sum()),
        "difference": float(difference.mean()),
        "length": correlations(pearson="pearson", spearman="spearman"),
        "length_of_gains": correlations(pearson="plain", spearman="plain_spearman"),
        "band": _band(difference, margin),
    }


def measured_pairs(margins: pa.Table) -> pa.Table:
    """What the measures need of rows of MARGINS: one row for each pair that has a margin, in the order of the ids.

    `difference` is chosen minus rejected tokens; `gain` is the plain difference of the log-ratios, in nats.
    """
    known = margins.filter(pc.equal(margins["status"], "ok")).sort_by("pair_id")
    column = {
        name: np.asarray(known[name]) for name in MARGINS.names if name.startswith(("num_", "policy_", "frozen_"))
    }
    gains = [column[f"policy_{role}"] - column[f"frozen_{role}"] for role in ("chosen", "rejected")]
    difference = column["num_chosen_tokens"] - column["num_rejected_tokens"]
    made = {"difference": difference.astype(np.float64), "gain": gains[0] - gains[1]}
    return pa.table({**{name: known[name] for name in ("pair_id", "prompt_hash", "held_out", "margin")}, **made})


def _estimates(policies: Sequence[pa.Table], clusters: Clusters) -> dict[str, Estimate | None]:
    """The estimate of each measure over policies of one setting, from their measured pairs, which are the same.

    Correlations are on the scale of Fisher's z, and None if a policy lacks them.
    """
    by_policy: dict[str, list[Measure | None]] = {}
    for pairs in policies:
        difference, margin, gain = (np.asarray(pairs[name]) for name in ("difference", "margin", "gain"))
        for name, measure in {
            "accuracy": mean((margin > 0).astype(np.float64), clusters),
            "margin": mean(margin, clusters),
            "pearson": pearson(difference, margin, clusters),
            "spearman": spearman(difference, margin, clusters),
            "plain": pearson(difference, gain, clusters),
            "plain_spearman": spearman(difference, gain, clusters),
        }.items():
            by_policy.setdefault(name, []).append(measure)
    found: dict[str, Estimate | None] = {}
    for name, measures in by_policy.items():
        known = [measure for measure in measures if measure is not None]
        found[name] = Estimate.of(known) if len(known) == len(policies) else None
    return found


def _figure(name: str, estimate: Estimate | None, clusters: Clusters) -> dict[str, Any]:
    """A measure as the report shows it: mean and 95 % interval, each None where it is not defined."""
    if estimate is None:
        return {"mean": None, "interval": None}
    interval: Interval | None
    if name == "accuracy":
        shown, interval = estimate.mean, share_interval(estimate, clusters)
    elif name in _CORRELATIONS:
        shown, interval = float(np.tanh(estimate.mean)), correlation_interval(estimate)
    else:
        shown, interval = estimate.mean, mean_interval(estimate)
    return {"mean": shown, "interval": list(interval) if interval else None}


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
    pairs: pa.Table
    """Its pairs, from `measured_pairs`."""

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


class _Together(NamedTuple):
    """The policies of one or two settings on the pairs that all of them have measured."""

    policies: list[pa.Table]
    clusters: Clusters


def sweep_table(trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """A row for each setting, in order of appearance: means over its seeds, and how it compares with the first setting.

    A training that occurs twice counts once. `parts` has the measures on the pairs that all seeds have measured; each
    is {"mean", "interval"}, both None if a seed lacks the measure. The interval of several seeds contains the variance
    over seeds and over prompts; that of one seed describes its policy alone. `against` has the differences from the
    first setting, on the pairs that both have measured: this setting minus the first. `p_holm` is corrected for all
    tests of the table. `differs` lists the differences from the first training's settings, except the loss and beta.
    """
    once: dict[str, Trained] = {}
    for one in trained:
        once.setdefault(digest(one.settings), one)
    groups: dict[str, list[Trained]] = {}
    for one in once.values():
        groups.setdefault(digest(one.without_seed), []).append(one)
    first, *others = groups.values()
    rows = [_sweep_row(first, first, {}), *(_sweep_row(group, first, _against(group, first)) for group in others)]
    tests = [test for row in rows for part in row["against"].values() for test in part["measures"].values()]
    for test, p_holm in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"], test["verdict"] = p_holm, _verdict(test["difference"], p_holm)
    return rows


def _sweep_row(group: Sequence[Trained], first: Sequence[Trained], against: dict[str, Any]) -> dict[str, Any]:
    loss = group[0].details["loss"]
    lines = differences(first[0].without_seed, group[0].without_seed)
    return {
        "loss": loss,
        "loss_name": PAIR_LOSSES[loss].title,
        "beta": group[0].details["beta"],
        "paper": PAIR_LOSSES[loss].paper_correlation,
        "differs": [line for line in lines if not line.startswith(("objective.loss: ", "objective.beta: "))],
        "seeds": [one.settings["recipe"]["seed"] for one in group],
        "places": [one.place for one in group],
        "parts": {
            part: {
                "pairs": found.clusters.num_pairs,
                "prompts": found.clusters.num,
                "measures": {
                    name: _figure(name, estimate, found.clusters)
                    for name, estimate in _estimates(found.policies, found.clusters).items()
                },
            }
            for part in _PARTS
            if (found := _together(group, part))
        },
        "against": against,
    }


def _together(trained: Sequence[Trained], part: str) -> _Together | None:
    """The policies on the pairs of a part that all have measured, in the same order; None if there is no such pair."""
    policies = [_only(one.pairs, part) for one in trained]
    common = policies[0]["pair_id"].combine_chunks()
    for pairs in policies[1:]:
        common = common.filter(pc.is_in(common, value_set=pairs["pair_id"].combine_chunks()))
    if not len(common):
        return None
    policies = [pairs.filter(pc.is_in(pairs["pair_id"], value_set=common)) for pairs in policies]
    return _Together(policies, Clusters.of(np.asarray(policies[0]["prompt_hash"])))


def _against(group: Sequence[Trained], first: Sequence[Trained]) -> dict[str, Any]:
    """A setting minus the first, for each part; measures that one of the two lacks are absent."""
    parts = {}
    for part in _PARTS:
        if (found := _together([*group, *first], part)) is None:
            continue
        ours = _estimates(found.policies[: len(group)], found.clusters)
        theirs = _estimates(found.policies[len(group) :], found.clusters)
        measures = {}
        for name in _COMPARED:
            one, other = ours[name], theirs[name]
            if one is None or other is None:
                continue
            if name == "accuracy":
                test = compare_shares(one, other, found.clusters)
            else:
                test = compare_correlations(one, other)
            measures[name] = _shown(test)
        parts[part] = {
            "pairs": found.clusters.num_pairs,
            "prompts": found.clusters.num,
            "over_seeds": min(len(group), len(first)) > 1,
            "measures": measures,
        }
    return parts


def _shown(test: Comparison) -> dict[str, Any]:
    interval = list(test.interval) if test.interval else None
    return {"difference": test.difference, "interval": interval, "p": test.p}


def _verdict(difference: float, p_holm: float) -> str:
    if np.isnan(p_holm):
        return "not tested"
    if p_holm >= SIGNIFICANT:
        return "no difference shown"
    return "higher" if difference > 0 else "lower"


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
    return template.render(facts=facts, charts=drawn, sections=sections, p_value=p_value)
