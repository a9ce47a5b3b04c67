"""The report of a comparison: from the models' measurements to facts, tables and the page.

Pure functions: no files, no models. An arm is a set of rows to train on; each arm is trained with several seeds, in a
size (`rows`) and a schedule (`reading`: as many epochs, or as many steps, as the full set). Held-out losses are nats
per token; the other measures have units of their own.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.compare import DRAWN, TrialName
from davir_ray.errors import DataError
from davir_ray.formulas.statistics import Floats, Outcome, Panel, holm
from davir_ray.report import charts
from davir_ray.report.facts import json_ready, named_values
from davir_ray.report.page import NOT_DEFINED, decimal, environment, number

SELECTION, FULL, RANDOM = "selection", "full", "random"
BASELINES = (RANDOM, FULL)
"""Arms that every other arm is tested against."""

SIGNIFICANT = 0.05

ARM_MEANING = {
    "selection": "the rows that the run selected, or its mixture if it has one",
    "random": "the same number of rows, drawn by hash, different ones for each seed",
    "random_matched": "drawn rows with the same histogram of response lengths and the same number of response tokens",
    "lowest": "the same number of rows, from the other end of the ranking",
    "rho": "the same number of rows, the highest by RHO summed over the response (base minus reference loss, not "
    "divided)",
    "full": "every prepared example",
}
READING_MEANING = {
    "epochs": "every arm is trained for the recipe’s number of epochs, so a smaller set takes fewer steps",
    "steps": "every arm is trained for the number of optimiser steps that the full set takes, so a smaller set is "
    "repeated",
}
LIMITS = [
    "The comparison shows the effect of these rows on this base, with this recipe, on this held-out data. Results on a "
    "small base need not hold for a large one, which may already know what a small model learns first.",
    "A loss is not a judgement: a lower loss on held-out answers means that such answers became likelier, not that "
    "a person would prefer what the model writes.",
    "With few seeds the spread between models is uncertain. Intervals and p-values account for it by Student’s t with "
    "one degree of freedom less than seeds, so with two or three seeds only large differences are detected; if none is "
    "detected, there may still be one.",
    "The selection is one set of rows. Against arms that are drawn, the question is whether it does better than one "
    "more draw would. With another reference or another pool, other rows would have been selected.",
    "p (these models) accounts for the held-out examples alone: it says whether these very models differ, not whether "
    "newly trained models would.",
    "Held-out rows are left out if the run’s training pool has the same text, the same prompt (of five words or more), "
    "or a near copy (5-grams of words with a Jaccard similarity of at least 0.7). Paraphrases, translations and shared "
    "passages of longer texts are not found.",
]

_SECTIONS = [
    ("glance", "At a glance"),
    ("results", "Results"),
    ("arms", "Arms"),
    ("heldout", "Held-out data"),
    ("limits", "Known limits"),
    ("settings", "Settings"),
]

TABLE = pa.schema(
    [
        ("arm", pa.string()),
        ("rows", pa.int64()),
        ("reading", pa.string()),
        ("seed", pa.int64()),
        ("measure", pa.string()),
        ("source", pa.string()),
        ("value", pa.float64()),
        ("num_heldout", pa.int64()),
        ("num_examples", pa.int64()),
        ("num_response_tokens", pa.int64()),
        ("num_steps", pa.int64()),
    ]
)
"""comparison.parquet: a row for each model, measure and source; source is null for all sources together."""

_TEST = ("mean", "low", "high", "p", "p_holm", "p_examples")
RESULTS = pa.schema(
    [
        ("measure", pa.string()),
        ("source", pa.string()),
        ("rows", pa.int64()),
        ("reading", pa.string()),
        ("arm", pa.string()),
        ("num_heldout", pa.int64()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        *((f"against_{baseline}_{name}", pa.float64()) for baseline in BASELINES for name in _TEST),
    ]
)
"""results.parquet: a row for each measure, source, size, reading and arm, with the mean over the seeds, its 95 %
interval, and the difference from each baseline with interval and p-values; null where there is no such difference."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that is measured on held-out examples; it is never negative."""

    name: str
    title: str
    short: str
    """Name in the header of a table column."""
    unit: str
    lower_is_better: bool
    most: float = math.inf
    """Largest possible value."""


LOSS = Measure(name="loss", title="Held-out loss", short="loss", unit="nats per response token", lower_is_better=True)
STRICT = Measure(
    name="exact_match",
    title="Exact match of the marked answer",
    short="strict exact match",
    unit="share of the questions",
    lower_is_better=False,
    most=1,
)
FLEXIBLE = replace(
    STRICT, name="exact_match_flexible", title="Exact match of the last number", short="flexible exact match"
)


@dataclass(frozen=True, kw_only=True)
class TrialFacts:
    """What is reported about one fine-tune."""

    num_examples: int
    num_response_tokens: int
    num_steps: int
    final_loss: float
    """Loss of the last batch, nats per token."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure of every model on the same held-out examples."""

    measure: Measure
    sources: npt.NDArray[np.str_]
    """Source of each example."""
    weights: Floats
    """Weight of each example: its tokens, or 1."""
    values: Mapping[TrialName, Floats]
    """For each fine-tune its value on each example; the measure is their sum divided by the sum of the weights."""
    base: Floats | None = None
    """The values of the untrained base."""
    without_value: int = 0
    """Number of held-out examples that are left out because a model has no value for them."""


@dataclass(frozen=True, kw_only=True)
class ComparisonInputs:
    """What the facts are computed from."""

    settings: dict[str, Any]
    run: str
    base: str
    recipe: dict[str, Any]
    heldout: dict[str, int]
    """Counts of the held-out data's prepare stage."""
    in_training_pool: int
    """Number of held-out rows that are left out because the run contains them too."""
    in_pool_by_reason: Mapping[str, int]
    """These rows by the reason, one of davir_ray.compare.copies.Reason."""
    num_pool_rows_not_read: int
    """Number of rows of the run of which only the rendered text is compared."""
    trials: Mapping[TrialName, TrialFacts]
    measures: list[Measured]


def summarise_comparison(inputs: ComparisonInputs) -> tuple[dict[str, Any], pa.Table]:
    """The facts of the page, ready for JSON, and the table TABLE."""
    measures = [measured for measured in inputs.measures if len(measured.sources)]
    if not measures:
        raise DataError(
            f"no held-out example is left to measure on: {inputs.in_training_pool} of {inputs.heldout['prepared']} are "
            f"in the run's training pool, {inputs.measures[0].without_value} have no value; give data that the run has "
            "not seen"
        )
    # The full set is compared with every size and schedule.
    settings = {(name.rows, name.reading) for name in inputs.trials if name.arm != FULL}
    settings = settings or {(name.rows, name.reading) for name in inputs.trials}
    results, base_results, table = [], [], []
    for measured in measures:
        names = np.unique(measured.sources).tolist()
        for source in [None, *names] if len(names) > 1 else [None]:
            rows = slice(None) if source is None else measured.sources == source
            name, weights = {"measure": measured.measure.name, "source": source}, measured.weights[rows]
            values = {trial: values[rows] for trial, values in measured.values.items()}
            results += [name | row for row in _results(measured.measure, values, weights, sorted(settings))]
            if measured.base is not None:
                base = Outcome(values_SE=measured.base[None, rows], weights_E=weights)
                base_results.append(name | _mean(measured.measure, Panel({None: base}), None, base))
            for trial, trained in inputs.trials.items():
                value = float(values[trial].sum()) / float(weights.sum())
                table.append(name | trial._asdict() | asdict(trained) | {"value": value, "num_heldout": len(weights)})
    sources, num_rows = np.unique(measures[0].sources, return_counts=True)
    facts = {
        "format": 1,
        "run": inputs.run,
        "base": inputs.base,
        "seeds": inputs.settings["seeds"],
        "arms": _arms(inputs.trials),
        "measures": [
            {
                **asdict(measured.measure),
                "sources": np.unique(measured.sources),
                "without_value": measured.without_value,
            }
            for measured in measures
        ],
        "heldout": {
            "read": inputs.heldout["read"],
            "left_out": inputs.heldout.get("left_out", 0),
            "rejected": inputs.heldout["rejected"],
            "in_training_pool": inputs.in_training_pool,
            "in_pool_by_reason": dict(inputs.in_pool_by_reason),
            "pool_rows_not_read": inputs.num_pool_rows_not_read,
            "measured": len(measures[0].sources),
            "sources": [{"source": name, "rows": rows} for name, rows in zip(sources, num_rows, strict=True)],
        },
        "results": results,
        "base_results": base_results,
        "limits": LIMITS,
        "recipe": named_values(inputs.recipe),
        "settings": named_values(inputs.settings),
    }
    ready = json_ready(facts)
    return ready | {"skills": _skills(ready)}, pa.Table.from_pylist(table, TABLE)


def _results(
    measure: Measure, values: Mapping[TrialName, Floats], weights: Floats, settings: Sequence[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """Mean of every arm in each setting (size and schedule), and its differences from the baselines."""
    seeds: dict[tuple[str, int, str], list[Floats]] = {}
    for trial in sorted(values, key=lambda trial: trial.seed):
        seeds.setdefault((trial.arm, trial.rows, trial.reading), []).append(values[trial])
    outcomes: dict[Hashable, Outcome] = {
        key: Outcome(
            values_SE=np.stack(models), weights_E=weights, draws_rows=key[0] in DRAWN, takes_all=key[0] == FULL
        )
        for key, models in seeds.items()
    }
    panel = Panel(outcomes)
    for setting in settings:
        compared = {key[0]: key for key in seeds if key[0] == FULL or key[1:] == setting}
        tests = {baseline: _tests(panel, baseline, compared) for baseline in BASELINES if baseline in compared}
        for arm, key in compared.items():
            yield {
                "rows": setting[0],
                "reading": setting[1],
                "arm": arm,
                "num_heldout": len(weights),
                **_mean(measure, panel, key, outcomes[key]),
                "by_seed": outcomes[key].by_seed,
                "against": {baseline: found[arm] for baseline, found in tests.items() if arm in found},
            }


def _mean(measure: Measure, panel: Panel, name: Hashable, outcome: Outcome) -> dict[str, float]:
    """The mean over the seeds with its interval, cut to the values that are possible."""
    return {"mean": outcome.mean, **panel.interval(name).clipped(0.0, measure.most)._asdict()}


def _tests(panel: Panel, baseline: str, arms: Mapping[str, Hashable]) -> dict[str, dict[str, float]]:
    """Every other arm against the baseline, p-values corrected for the number of arms (Holm)."""
    found = {arm: panel.difference(key, arms[baseline]) for arm, key in arms.items() if arm != baseline}
    corrected = holm([test.p for test in found.values()])
    return {
        arm: {"mean": test.mean, **test.interval._asdict(), "p": test.p, "p_holm": p, "p_examples": test.p_examples}
        for (arm, test), p in zip(found.items(), corrected, strict=True)
    }


def _arms(trials: Mapping[TrialName, TrialFacts]) -> list[dict[str, Any]]:
    """The facts of each arm, size and schedule: means and ranges over its seeds."""
    seeds: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for name, facts in trials.items():
        seeds.setdefault((name.arm, name.rows, name.reading), []).append(asdict(facts))
    arms = []
    for (arm, rows, reading), found in seeds.items():
        by_field = {field: [facts[field] for facts in found] for field in found[0]}
        means = {field: np.mean(values) for field, values in by_field.items()}
        ranges = {field: [min(values), max(values)] for field, values in by_field.items()}
        arms.append({"arm": arm, "rows": rows, "reading": reading, **means, "ranges": ranges})
    return arms


def results_table(facts: dict[str, Any]) -> pa.Table:
    """The results of the facts as the table RESULTS."""
    rows = [
        row | {f"against_{baseline}_{name}": test[name] for baseline, test in row["against"].items() for name in test}
        for row in facts["results"]
    ]
    return pa.Table.from_pylist(rows, RESULTS)


def render_comparison(facts: dict[str, Any]) -> str:
    """Return the page as HTML; the same facts give the same bytes."""
    functions = {"verdict": verdict, "p_value": p_value, "number": number, "decimal": decimal}
    template = environment().get_template("comparison.html.j2", globals=functions)
    return template.render(
        facts=facts,
        sections=_SECTIONS,
        columns=_columns(facts),
        skills=_by_setting(facts["skills"]),
        parts=_parts(facts),
        findings=_by_setting(_findings(facts)),
        arm_meaning=ARM_MEANING,
        reading_meaning=READING_MEANING,
    )


def _columns(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each measure on each of its sources; `key` finds its row among the results of an arm."""
    return [
        {
            "measure": measure,
            "source": source,
            "key": (measure["name"], source if len(measure["sources"]) > 1 else None),
        }
        for measure in facts["measures"]
        for source in measure["sources"]
    ]


def _by_arm(facts: dict[str, Any]) -> dict[tuple[Any, ...], dict[Any, dict[str, Any]]]:
    """The results by size, schedule and arm, then by measure and source; those of the untrained base come last."""
    arms: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for row in [*facts["results"], *facts["base_results"]]:
        arm = row.get("rows"), row.get("reading"), row.get("arm", "base")
        arms.setdefault(arm, {})[row["measure"], row["source"]] = row
    return arms


def _skills(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm, and the untrained base, with every measure on every source; empty if that is a single column."""
    columns = _columns(facts)
    if len(columns) < 2:
        return []
    return [
        {
            "rows": rows,
            "reading": reading,
            "arm": arm,
            "cells": [_cell(column, found.get(column["key"]), facts["seeds"]) for column in columns],
        }
        for (rows, reading, arm), found in _by_arm(facts).items()
    ]


def _cell(column: dict[str, Any], row: dict[str, Any] | None, seeds: int) -> dict[str, Any] | None:
    """One measure of an arm, and the verdict of its test against random; None where it was not measured."""
    if row is None:
        return None
    return {
        "measure": column["measure"]["name"],
        "source": column["source"],
        **{name: row[name] for name in ("mean", "low", "high")},
        "against_random": verdict(row.get("against", {}).get(RANDOM), column["measure"], seeds),
    }


def _findings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The selection compared with each baseline: a row of cells, one for each measure and source."""
    return [
        {
            "rows": rows,
            "reading": reading,
            "baseline": baseline,
            "cells": [
                {"column": column, "test": found[column["key"]]["against"][baseline]} for column in _columns(facts)
            ],
        }
        for (rows, reading, arm), found in _by_arm(facts).items()
        if arm == SELECTION
        for baseline in next(iter(found.values()))["against"]
    ]


def _by_setting(rows: list[dict[str, Any]]) -> list[tuple[tuple[int | None, str | None], list[dict[str, Any]]]]:
    """The rows of a table, which are in the order of their settings, grouped by size and schedule."""
    return [(setting, list(lines)) for setting, lines in groupby(rows, itemgetter("rows", "reading"))]


def _parts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of the page's results: for each measure, source and schedule a table for each size, and one chart."""
    measures = {measure["name"]: measure for measure in facts["measures"]}
    bases = {(row["measure"], row["source"]): row for row in facts["base_results"]}
    found: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {}
    for row in facts["results"]:
        found.setdefault((row["measure"], row["source"], row["reading"]), []).append(row)
    parts: list[dict[str, Any]] = []
    for (name, source, reading), rows in found.items():
        part = f"part-{len(parts) + 1}"
        measure = measures[name]
        sign = 1 if measure["lower_is_better"] else -1
        best_first = sorted(rows, key=lambda row: (row["rows"], sign * row["mean"]))
        parts.append(
            {
                "id": part,
                "measure": measure,
                "source": source,
                "reading": reading,
                "base": bases.get((name, source)),
                "tables": [(size, list(results)) for size, results in groupby(best_first, itemgetter("rows"))],
                "chart": charts.comparison(rows, measure["unit"], part),
            }
        )
    return parts


def verdict(test: dict[str, Any] | None, measure: dict[str, Any], seeds: int) -> str:
    """The result of a test in words; empty if only one model of each arm was trained."""
    if test is None or test["p_holm"] is None or seeds < 2:
        return ""
    if test["p_holm"] >= SIGNIFICANT:
        return "no difference shown"
    return "better" if (test["mean"] < 0) == measure["lower_is_better"] else "worse"


def p_value(p: float | None) -> str:
    """A p-value as text; the exact value is not meaningful below 0.001."""
    if p is None:
        return NOT_DEFINED
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
