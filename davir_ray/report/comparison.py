"""The report of a comparison: from the models' measurements to facts, tables and the page.

Pure functions: no files, no models. An arm is a set of rows to train on; each arm is trained with several seeds, in a
size (`rows`) and a schedule (`reading`: as many epochs, or as many steps, as the full set). Held-out losses are nats
per token; the other measures have units of their own.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.compare import DRAWN, TrialName
from davir_ray.errors import DataError
from davir_ray.formulas.statistics import Interval, Outcome, Panel, holm
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
    "Held-out rows that occur word for word in the run’s training pool are left out. Paraphrases and near copies are "
    "not found.",
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
    most: float | None
    """Largest possible value. None: no limit."""

    def clipped(self, interval: Interval) -> Interval:
        """An interval of this measure, cut to the values that are possible."""
        return interval.clipped(0.0, math.inf if self.most is None else self.most)


LOSS = Measure(
    name="loss",
    title="Held-out loss",
    short="loss",
    unit="nats per response token",
    lower_is_better=True,
    most=None,
)
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
    weights: npt.NDArray[np.float64]
    """Weight of each example: its tokens, or 1."""
    values: Mapping[TrialName, npt.NDArray[np.float64]]
    """For each fine-tune its value on each example; the measure is their sum divided by the sum of the weights."""
    base: npt.NDArray[np.float64] | None = None
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
    trials: Mapping[TrialName, TrialFacts]
    measures: list[Measured]


def summarise_comparison(inputs: ComparisonInputs) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts of the page, ready for JSON, and the rows of TABLE."""
    measures = [measured for measured in inputs.measures if len(measured.sources)]
    if not measures:
        raise DataError(
            f"no held-out example is left to measure on: {inputs.in_training_pool} of {inputs.heldout['prepared']} are "
            f"in the run's training pool, {inputs.measures[0].without_value} have no value; give data that the run has "
            "not seen"
        )
    inputs = replace(inputs, measures=measures)
    results = [result for measured in measures for result in _results(inputs, measured)]
    sources = measures[0].sources
    facts = {
        "format": 1,
        "run": inputs.run,
        "base": inputs.base,
        "seeds": inputs.settings["seeds"],
        "arms": _arms(inputs),
        "measures": [
            {
                **asdict(measured.measure),
                "sources": np.unique(measured.sources).tolist(),
                "without_value": measured.without_value,
            }
            for measured in inputs.measures
        ],
        "heldout": {
            "read": inputs.heldout["read"],
            "rejected": inputs.heldout["rejected"],
            "in_training_pool": inputs.in_training_pool,
            "measured": len(sources),
            "sources": [{"source": str(name), "rows": int((sources == name).sum())} for name in np.unique(sources)],
        },
        "results": results,
        "base_results": [row for measured in inputs.measures for row in _base(measured)],
        "limits": LIMITS,
        "recipe": named_values(inputs.recipe),
        "settings": named_values(inputs.settings),
    }
    ready = json_ready(facts)
    return ready | {"skills": _skills(ready)}, [row for measured in inputs.measures for row in _table(inputs, measured)]


def results_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the facts as rows of RESULTS."""
    own = set(RESULTS.names)
    return [
        {name: value for name, value in row.items() if name in own}
        | {f"against_{baseline}_{name}": test[name] for baseline, test in row["against"].items() for name in _TEST}
        for row in facts["results"]
    ]


def render_comparison(facts: dict[str, Any]) -> str:
    """Return the page as HTML; the same facts give the same bytes."""
    functions = {"verdict": verdict, "p_value": p_value, "number": number, "decimal": decimal}
    template = environment().get_template("comparison.html.j2", globals=functions)
    return template.render(
        facts=facts,
        sections=_SECTIONS,
        columns=_columns(facts),
        skills=_by_setting(facts["skills"]),
        parts=list(_parts(facts)),
        findings=_by_setting(_findings(facts)),
        arm_meaning=ARM_MEANING,
        reading_meaning=READING_MEANING,
    )


def _arms(inputs: ComparisonInputs) -> list[dict[str, Any]]:
    """The facts of each arm, size and reading: means and ranges over its seeds."""
    seeds: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for name, facts in inputs.trials.items():
        seeds.setdefault((name.arm, name.rows, name.reading), []).append(asdict(facts))
    arms = []
    for (arm, rows, reading), found in seeds.items():
        by_field = {field: [facts[field] for facts in found] for field in found[0]}
        means = {field: float(np.mean(values)) for field, values in by_field.items()}
        ranges = {field: [min(values), max(values)] for field, values in by_field.items()}
        arms.append({"arm": arm, "rows": rows, "reading": reading, **means, "ranges": ranges})
    return arms


def _groups(measured: Measured) -> Iterable[tuple[str | None, npt.NDArray[np.bool_]]]:
    """All sources together, and each source if there are several, with a mask of its examples."""
    yield None, np.ones(len(measured.sources), bool)
    names = np.unique(measured.sources)
    for name in names if len(names) > 1 else ():
        yield str(name), measured.sources == name


def _outcomes(inputs: ComparisonInputs, measured: Measured, rows: npt.NDArray[np.bool_]) -> dict[Any, Outcome]:
    """The outcomes on some of the examples, by (arm, size, reading)."""
    seeds: dict[Any, list[Any]] = {}
    for name in sorted(inputs.trials, key=lambda name: name.seed):
        seeds.setdefault((name.arm, name.rows, name.reading), []).append(measured.values[name][rows])
    weights = measured.weights[rows]
    return {
        key: Outcome(
            values_SE=np.stack(values), weights_E=weights, draws_rows=key[0] in DRAWN, takes_all=key[0] == FULL
        )
        for key, values in seeds.items()
    }


def _results(inputs: ComparisonInputs, measured: Measured) -> Iterable[dict[str, Any]]:
    """A row for each source, size, reading and arm; the full set is compared with every size and reading."""
    settings = {(name.rows, name.reading) for name in inputs.trials if name.arm != FULL}
    settings = settings or {(name.rows, name.reading) for name in inputs.trials}
    for source, rows in _groups(measured):
        outcomes = _outcomes(inputs, measured, rows)
        panel = Panel(outcomes)
        for size, reading in sorted(settings):
            compared = {key[0]: key for key in outcomes if key[0] == FULL or key[1:] == (size, reading)}
            tests = {name: _tests(panel, name, compared) for name in BASELINES}
            for arm, key in compared.items():
                outcome = outcomes[key]
                yield {
                    "measure": measured.measure.name,
                    "source": source,
                    "rows": size,
                    "reading": reading,
                    "arm": arm,
                    "num_heldout": int(rows.sum()),
                    "mean": outcome.mean,
                    **measured.measure.clipped(panel.interval(key))._asdict(),
                    "by_seed": outcome.by_seed.tolist(),
                    "against": {name: found[arm] for name, found in tests.items() if arm in found},
                }


def _tests(panel: Panel, baseline: str, arms: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every other arm against the baseline, p-values corrected for the number of arms (Holm)."""
    if baseline not in arms:
        return {}
    found = {arm: panel.difference(key, arms[baseline]) for arm, key in arms.items() if arm != baseline}
    corrected = holm([test.p for test in found.values()])
    return {
        arm: {"mean": test.mean, **test.interval._asdict(), "p": test.p, "p_holm": p, "p_examples": test.p_examples}
        for (arm, test), p in zip(found.items(), corrected, strict=True)
    }


def _base(measured: Measured) -> Iterable[dict[str, Any]]:
    """The untrained base on each source."""
    if measured.base is None:
        return
    for source, rows in _groups(measured):
        outcome = Outcome(values_SE=measured.base[None, rows], weights_E=measured.weights[rows])
        yield {
            "measure": measured.measure.name, "source": source, "mean": outcome.mean,
            **measured.measure.clipped(Panel({None: outcome}).interval(None))._asdict(),
        }  # fmt: skip


def _table(inputs: ComparisonInputs, measured: Measured) -> Iterable[dict[str, Any]]:
    """Rows of TABLE."""
    for source, rows in _groups(measured):
        weight = float(measured.weights[rows].sum())
        for name, facts in inputs.trials.items():
            yield {
                "arm": name.arm, "rows": name.rows, "reading": name.reading, "seed": name.seed,
                "measure": measured.measure.name, "source": source,
                "value": float(measured.values[name][rows].sum()) / weight, "num_heldout": int(rows.sum()),
                "num_examples": facts.num_examples, "num_response_tokens": facts.num_response_tokens,
                "num_steps": facts.num_steps,
            }  # fmt: skip


def _parts(facts: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The parts of the page's results: for each measure, source and reading a table for each size, and one chart."""
    numbers = count(1)
    for measure in facts["measures"]:
        own = [row for row in facts["results"] if row["measure"] == measure["name"]]
        bases = {row["source"]: row for row in facts["base_results"] if row["measure"] == measure["name"]}
        for source in dict.fromkeys(row["source"] for row in own):
            for reading in dict.fromkeys(row["reading"] for row in own):
                rows = [row for row in own if (row["source"], row["reading"]) == (source, reading)]
                yield _part(f"part-{next(numbers)}", measure, source, reading, rows) | {"base": bases.get(source)}


def _part(
    name: str, measure: dict[str, Any], source: str | None, reading: str, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    sizes = sorted({row["rows"] for row in rows})
    best_first = sorted(rows, key=lambda row: row["mean"] if measure["lower_is_better"] else -row["mean"])
    return {
        "id": name,
        "measure": measure,
        "source": source,
        "reading": reading,
        "tables": [{"rows": size, "results": [row for row in best_first if row["rows"] == size]} for size in sizes],
        "chart": charts.comparison(rows, measure["unit"], name),
    }


def _columns(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each measure on each of its sources; `group` is the name of that source in the rows of results."""
    return [
        {"measure": measure, "source": source, "group": source if len(measure["sources"]) > 1 else None}
        for measure in facts["measures"]
        for source in measure["sources"]
    ]


def _skills(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm, and the untrained base, with every measure on every source; empty if that is a single column."""
    columns = _columns(facts)
    if len(columns) < 2:
        return []
    arms: dict[tuple[int | None, str | None, str], dict[Any, dict[str, Any]]] = {}
    for row in facts["results"]:
        arms.setdefault((row["rows"], row["reading"], row["arm"]), {})[row["measure"], row["source"]] = row
    for row in facts["base_results"]:
        arms.setdefault((None, None, "base"), {})[row["measure"], row["source"]] = row
    return [
        {
            "rows": rows,
            "reading": reading,
            "arm": arm,
            "cells": [_cell(column, found, facts["seeds"]) for column in columns],
        }
        for (rows, reading, arm), found in arms.items()
    ]


def _cell(column: dict[str, Any], found: Mapping[Any, dict[str, Any]], seeds: int) -> dict[str, Any] | None:
    """One measure of an arm, and the verdict of its test against random; None where it was not measured."""
    row = found.get((column["measure"]["name"], column["group"]))
    if row is None:
        return None
    return {
        "measure": column["measure"]["name"],
        "source": column["source"],
        "mean": row["mean"],
        "low": row["low"],
        "high": row["high"],
        "against_random": verdict(row.get("against", {}).get(RANDOM), column["measure"], seeds),
    }


def _findings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The selection compared with each baseline: a row of cells, one for each measure and source."""
    found: dict[tuple[int, str, str], dict[Any, dict[str, Any]]] = {}
    for row in facts["results"]:
        for baseline, test in row["against"].items() if row["arm"] == SELECTION else ():
            tests = found.setdefault((row["rows"], row["reading"], baseline), {})
            tests[row["measure"], row["source"]] = test
    return [
        {
            "rows": rows,
            "reading": reading,
            "baseline": baseline,
            "cells": [
                {"column": column, "test": tests[column["measure"]["name"], column["group"]]}
                for column in _columns(facts)
            ],
        }
        for (rows, reading, baseline), tests in found.items()
    ]


def _by_setting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table grouped by size and reading, in order of first appearance."""
    settings: dict[tuple[int | None, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault((row["rows"], row["reading"]), []).append(row)
    return [{"rows": size, "reading": reading, "lines": lines} for (size, reading), lines in settings.items()]


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
