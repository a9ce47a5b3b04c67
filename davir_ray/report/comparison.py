"""The report of a comparison: from the models' measurements to facts, tables and the page.

Pure functions: no files, no models. An arm is a set of rows to train on; each arm is trained with several seeds, in a
size (`rows`) and a schedule (`reading`: equal tokens, equal epochs, or as many steps as the full set). Held-out losses
are nats per token; the other measures have units of their own.

Where there are several sizes, the best is chosen on one half of the held-out prompts, and everything is reported on the
other: a size that is the best by luck is not reported with its luck.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.compare import DRAWN, MAX_PASSES, TrialName
from davir_ray.errors import DataError
from davir_ray.formulas.hashing import drawn
from davir_ray.formulas.statistics import Examples, Floats, Ints, Outcome, Panel, seed_correlation
from davir_ray.report import charts
from davir_ray.report.contrasts import ON_AVERAGE, Contrast, Scope, contrasts_of, corrected
from davir_ray.report.facts import json_ready, named_values
from davir_ray.report.page import decimal, environment, number, p_value

SELECTION, FULL, RANDOM = "selection", "full", "random"

Key = tuple[str, int, str]
"""An arm, its size and its schedule."""

ARM_MEANING = {
    "selection": "the rows that the run selected, or its mixture if it has one",
    "random": "the same number of rows, drawn by hash",
    "random_matched": "drawn rows with the same histogram of response lengths and the same number of response tokens",
    "lowest": "the same number of rows, from the other end of the ranking",
    "rho": "the same number of rows, the highest by RHO summed over the response (base minus reference loss, not "
    "divided)",
    "full": "every prepared example",
}
READING_MEANING = {
    "tokens": "every arm is trained for as many response tokens, to the nearest step, as random rows of its size have "
    "in the recipe’s number of epochs, so an arm of short responses takes more steps",
    "epochs": "every arm is trained for the recipe’s number of epochs, so a smaller set takes fewer steps",
    "steps": "every arm is trained for the number of optimiser steps that the full set takes, so a smaller set is "
    "repeated",
}
LIMITS = [
    "The comparison shows the effect of these rows on this base, with this recipe, on this held-out data. Results on a "
    "small base need not hold for a large one, which may already know what a small model learns first.",
    "A loss is not a judgement: a lower loss on held-out answers means that such answers became likelier, not that "
    "a person would prefer what the model writes.",
    "With few seeds the spread between models is uncertain. Intervals and p-values account for it by Student’s t, with "
    "one estimate for all arms of a size and schedule, so with two or three seeds only large differences are detected; "
    "“not resolved” does not mean that there is none.",
    "Models of several seeds on one set of rows say whether these rows train a better model, not whether the method "
    "would choose such rows again: with another reference or another pool, other rows would be selected. Several runs, "
    "whose references are trained anew, say that.",
    "Intervals are of 95 % each, not adjusted for the number of intervals. All p-values but the primary test’s are.",
    "Models of different arms that have the same seed are taken for independent. If they are alike, the tests are "
    "cautious.",
    "Held-out rows are left out if the run’s training pool has the same text, the same prompt (of five words or more), "
    "or a near copy (5-grams of words with a Jaccard similarity of at least 0.7). Paraphrases, translations and shared "
    "passages of longer texts are not found.",
]

_SECTIONS = [
    ("glance", "At a glance"),
    ("results", "Results"),
    ("lengths", "By length"),
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
        ("row_set", pa.int64()),
        ("num_shared", pa.int64()),
        ("num_trained_tokens", pa.int64()),
    ]
)
"""comparison.parquet: a row for each model, measure and source; source is null for all sources together."""

RESULTS = pa.schema(
    [
        ("measure", pa.string()),
        ("source", pa.string()),
        ("rows", pa.int64()),
        ("reading", pa.string()),
        ("arm", pa.string()),
        ("num_heldout", pa.int64()),
        ("num_models", pa.int64()),
        ("num_units", pa.int64()),
        ("units", pa.string()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
"""results.parquet: a row for each measure, source, size, reading and arm, with the mean over its models and its 95 %
interval, over how many of what (seeds, draws or runs)."""

TESTS = pa.schema(
    [
        ("measure", pa.string()),
        ("source", pa.string()),
        ("rows", pa.int64()),
        ("reading", pa.string()),
        ("arm", pa.string()),
        ("against", pa.string()),
        ("question", pa.string()),
        ("primary", pa.bool_()),
        ("num_heldout", pa.int64()),
        ("num_differing", pa.int64()),
        *((name, pa.float64()) for name in ("mean", "low", "high", "margin", "degrees")),
        *((name, pa.float64()) for name in ("p", "p_holm", "p_level", "p_level_holm", "p_models")),
        ("untested", pa.string()),
        ("verdict", pa.string()),
    ]
)
"""tests.parquet: a row for each difference on the page, see Contrast."""

_TEST_KEY = ("measure", "source", "rows", "reading", "arm", "against", "question")
"""What identifies a row of TESTS."""

NUM_LENGTHS = 4
"""Ranges of length, with about as many held-out examples each, that the loss is shown for."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that is measured on held-out examples; it is never negative."""

    name: str
    title: str
    short: str
    """Name in the header of a table column."""
    unit: str
    lower_is_better: bool
    margin_of: str
    """The measure in the settings whose margin counts."""
    is_share: bool = False
    """Whether the values are answers, right (1) or wrong (0)."""
    tested: bool = True
    """Whether differences are tested; else they are only shown with their intervals."""


LOSS = Measure(
    name="loss",
    title="Held-out loss",
    short="loss",
    unit="nats per response token",
    lower_is_better=True,
    margin_of="loss",
)
LOSS_BY_EXAMPLE = replace(
    LOSS,
    name="loss_by_example",
    title="Held-out loss, the mean of each example’s mean",
    short="loss by example",
    tested=False,
)
STRICT = Measure(
    name="exact_match",
    title="Exact match of the marked answer",
    short="strict exact match",
    unit="share of the questions",
    lower_is_better=False,
    margin_of="exact_match",
    is_share=True,
)
FLEXIBLE = replace(
    STRICT, name="exact_match_flexible", title="Exact match of the last number", short="flexible exact match"
)


@dataclass(frozen=True, kw_only=True)
class TrialFacts:
    """What is reported about one fine-tune."""

    row_set: int
    """Number of the draw, or of the run, whose rows the model was trained on."""
    num_examples: int
    num_shared: int
    """Different rows that are also in the selection of that size; with several runs, in that of the first."""
    num_response_tokens: int
    num_trained_tokens: int
    """Response tokens that the model was trained on, each counted every time: by the mean of its rows."""
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
    prompts: Ints
    """Hash of the prompt of each example: those with the same prompt are one cluster."""
    lengths: Ints
    """Response tokens of each example."""
    weights: Floats
    """Weight of each example: its tokens, or 1."""
    values: Mapping[TrialName, Floats]
    """For each fine-tune its value on each example; the measure is their sum divided by the sum of the weights."""
    base: Floats | None = None
    """The values of the untrained base."""
    without_value: int = 0
    """Number of held-out examples that are left out because a model has no value for them."""

    def of(self, rows: npt.NDArray[np.bool_]) -> "Measured":
        """The measure of these examples alone."""
        return replace(
            self,
            sources=self.sources[rows],
            prompts=self.prompts[rows],
            lengths=self.lengths[rows],
            weights=self.weights[rows],
            values={name: values[rows] for name, values in self.values.items()},
            base=None if self.base is None else self.base[rows],
        )

    @property
    def examples(self) -> Examples:
        """The examples, clustered by prompt and stratified by source."""
        clusters, strata = (np.unique(of, return_inverse=True)[1] for of in (self.prompts, self.sources))
        return Examples(weights_E=self.weights, clusters_E=clusters, strata_E=strata)


@dataclass(frozen=True, kw_only=True)
class ComparisonInputs:
    """What the facts are computed from."""

    settings: dict[str, Any]
    run: str
    base: str
    recipe: dict[str, Any]
    pairs: list[tuple[str, str]]
    """The pairs of arms that are tested, the primary test first; empty where only one arm was trained."""
    margins: Mapping[str, float]
    """By measure of the settings, the size of a difference that would not matter."""
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
    sizes = sorted({rows for rows, _ in settings})
    primary_rows, primary_reading, chosen = sizes[0], _primary_reading(inputs, settings), None
    halves = [drawn(measured.prompts, 0.5, "choosing half") for measured in measures]
    can_choose = all(len(np.unique(measures[0].prompts[half])) > 1 for half in (halves[0], ~halves[0]))
    if len(sizes) > 1 and can_choose:
        chosen = _chosen(inputs, measures[0].of(halves[0]), sizes, primary_reading)
        reported = [measured.of(~half) for measured, half in zip(measures, halves, strict=True)]
        measures = [measured for measured in reported if len(measured.weights)]
        primary_rows = chosen["rows"]
    contrasts: list[Contrast] = []
    results, base_results, by_length, table = [], [], [], []
    for measured in measures:
        names = np.unique(measured.sources).tolist()
        for source in [None, *names] if len(names) > 1 else [None]:
            part = measured if source is None else measured.of(measured.sources == source)
            name = {"measure": measured.measure.name, "source": source}
            outcomes = _outcomes(inputs.trials, part.values)
            panel = Panel(outcomes, part.examples)
            results += [name | row for row in _results(part, panel, outcomes, sorted(settings))]
            contrasts += _contrasts(inputs, part, source, panel, outcomes, sorted(settings))
            if source is None and measured.measure is LOSS:
                by_length = list(_by_length(inputs, part, sorted(settings)))
            if part.base is not None:
                base = Panel({None: Outcome(values_SE=part.base[None])}, part.examples)
                base_results.append(name | _mean(part.measure, base, None))
            for trial, trained in inputs.trials.items():
                value = float(part.values[trial].sum()) / float(part.weights.sum())
                table.append(
                    name | trial._asdict() | asdict(trained) | {"value": value, "num_heldout": len(part.weights)}
                )
    tested = corrected(
        contrasts,
        lambda one: (
            [(one.arm, one.against)] == inputs.pairs[:1]
            and one.question == ON_AVERAGE
            and (one.measure, one.source) == (measures[0].measure.name, None)
            and (one.rows, one.reading) == (primary_rows, primary_reading)
        ),
    )
    sources, num_rows = np.unique(measures[0].sources, return_counts=True)
    facts = {
        "format": 2,
        "run": inputs.run,
        "base": inputs.base,
        "arms": _arms(inputs.trials),
        "sizes_without_steps": _sizes_without_steps(inputs),
        "equal_models": _equal_models(inputs),
        "outside_selection": bool(inputs.settings.get("outside_selection")),
        "match_prompts": bool(inputs.settings.get("match_prompts")),
        "measures": [
            {
                **asdict(measured.measure),
                "sources": np.unique(measured.sources),
                "without_value": measured.without_value,
                "margin": inputs.margins[measured.measure.margin_of],
            }
            for measured in measures
        ],
        "heldout": {
            "read": inputs.heldout["read"],
            "left_out": inputs.heldout.get("left_out", 0),
            "rejected": inputs.heldout["rejected"],
            "in_training_pool": inputs.in_training_pool,
            "chosen_on": 0 if chosen is None else chosen["num_heldout"],
            "in_pool_by_reason": dict(inputs.in_pool_by_reason),
            "pool_rows_not_read": inputs.num_pool_rows_not_read,
            "measured": len(measures[0].sources),
            "prompts": len(np.unique(measures[0].prompts)),
            "sources": [{"source": name, "rows": rows} for name, rows in zip(sources, num_rows, strict=True)],
        },
        "results": results,
        "base_results": base_results,
        "contrasts": [asdict(one) | {"verdict": one.verdict} for one in tested],
        "num_tests": sum(one.p is not None and not one.primary for one in tested),
        "chosen": chosen,
        "too_few_to_choose": len(sizes) > 1 and not can_choose,
        "by_length": by_length,
        "seed_correlation": _seed_correlation(inputs.trials, measures[0], (primary_rows, primary_reading)),
        "limits": LIMITS,
        "recipe": named_values(inputs.recipe),
        "settings": named_values(inputs.settings),
    }
    ready = json_ready(facts)
    return ready | {"skills": _skills(ready)}, pa.Table.from_pylist(table, TABLE)


def _primary_reading(inputs: ComparisonInputs, settings: set[tuple[int, str]]) -> str:
    """The first of the configured readings that was trained."""
    trained = {reading for _, reading in settings}
    configured: list[str] = inputs.settings.get("readings", [])
    return next(reading for reading in [*configured, *sorted(trained)] if reading in trained)


def _chosen(inputs: ComparisonInputs, half: Measured, sizes: Sequence[int], reading: str) -> dict[str, Any]:
    """The size with which the primary test's first arm, or else the first one there is, does best on this half."""
    trained = [name.arm for name in inputs.trials if name.arm != FULL]
    arm = next(arm for arm in [*(arm for arm, _ in inputs.pairs[:1]), *trained] if arm in trained)
    outcomes = _outcomes(inputs.trials, half.values)
    panel = Panel(outcomes, half.examples)
    by_size = [
        {"rows": rows, "mean": panel.mean(key).mean} for rows in sizes if (key := (arm, rows, reading)) in outcomes
    ]
    sign = 1 if half.measure.lower_is_better else -1
    best = min(by_size, key=lambda row: (sign * row["mean"], row["rows"]))
    return {"rows": best["rows"], "arm": arm, "reading": reading, "by_size": by_size, "num_heldout": len(half.weights)}


def _outcomes(trials: Mapping[TrialName, TrialFacts], values: Mapping[TrialName, Floats]) -> dict[Hashable, Outcome]:
    """The models of each arm, size and schedule, in the order of their seeds."""
    models: dict[Key, list[TrialName]] = {}
    for trial in sorted(values, key=lambda trial: trial.seed):
        models.setdefault((trial.arm, trial.rows, trial.reading), []).append(trial)
    return {
        key: Outcome(
            values_SE=np.stack([values[trial] for trial in found]),
            row_sets=[trials[trial].row_set for trial in found],
            kind="draws" if key[0] in DRAWN else "runs",
            group=FULL if key[0] == FULL else key[1:],
        )
        for key, found in models.items()
    }


def _compared(outcomes: Mapping[Hashable, Outcome], setting: tuple[int, str]) -> dict[str, Key]:
    """The arms that are compared in a size and schedule, by name."""
    keys: Iterator[Any] = iter(outcomes)
    return {key[0]: key for key in keys if key[0] == FULL or key[1:] == setting}


def _results(
    part: Measured, panel: Panel, outcomes: Mapping[Hashable, Outcome], settings: Sequence[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """Mean of every arm in each setting (size and schedule)."""
    for setting in settings:
        for arm, key in _compared(outcomes, setting).items():
            outcome = outcomes[key]
            yield {
                "rows": setting[0],
                "reading": setting[1],
                "arm": arm,
                "num_heldout": len(part.weights),
                "num_models": outcome.num_models,
                "num_units": outcome.num_units,
                "units": outcome.units,
                **_mean(part.measure, panel, key),
                "by_seed": panel.by_model(key),
            }


def _contrasts(
    inputs: ComparisonInputs,
    part: Measured,
    source: str | None,
    panel: Panel,
    outcomes: Mapping[Hashable, Outcome],
    settings: Sequence[tuple[int, str]],
) -> Iterator[Contrast]:
    """The differences of the wanted pairs in each setting; without p-values where the measure is not tested."""
    measure = part.measure
    for rows, reading in settings:
        scope = Scope(
            measure=measure.name,
            source=source,
            rows=rows,
            reading=reading,
            is_share=measure.is_share,
            lower_is_better=measure.lower_is_better,
            margin=inputs.margins[measure.margin_of],
            num_heldout=len(part.weights),
            tested=measure.tested,
        )
        yield from contrasts_of(scope, inputs.pairs, _compared(outcomes, (rows, reading)), panel)


def _by_length(
    inputs: ComparisonInputs, part: Measured, settings: Sequence[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """For each range of held-out lengths, every arm minus the second arm of the primary test; these are not tested."""
    edges = np.unique(np.quantile(part.lengths, np.linspace(0, 1, NUM_LENGTHS + 1)[1:-1], method="higher"))
    range_E = np.searchsorted(edges, part.lengths, side="right")
    against = inputs.pairs[0][1] if inputs.pairs else ""
    for place in np.unique(range_E).tolist():
        some = part.of(range_E == place)
        outcomes = _outcomes(inputs.trials, some.values)
        panel = Panel(outcomes, some.examples)
        for setting in settings:
            arms = _compared(outcomes, setting)
            for arm in arms if against in arms else ():
                if arm != against:
                    found = panel.difference(arms[arm], arms[against]).estimate
                    yield {
                        "shortest": int(some.lengths.min()),
                        "longest": int(some.lengths.max()),
                        "num_heldout": len(some.weights),
                        "rows": setting[0],
                        "reading": setting[1],
                        "arm": arm,
                        "against": against,
                        "mean": found.mean,
                        **found.interval._asdict(),
                    }


def _seed_correlation(
    trials: Mapping[TrialName, TrialFacts], measured: Measured, setting: tuple[int, str]
) -> float | None:
    """How alike the models of one seed are in different arms of the primary size and schedule."""
    arms: dict[str, dict[int, float]] = {}
    for trial in trials:
        if (trial.rows, trial.reading) == setting:
            arms.setdefault(trial.arm, {})[trial.seed] = float(measured.values[trial].sum() / measured.weights.sum())
    return seed_correlation(list(arms.values()))


def _mean(measure: Measure, panel: Panel, name: Hashable) -> dict[str, float]:
    """The mean over the models with its interval, within the values that are possible."""
    found = panel.mean(name)
    interval = panel.share(name) if measure.is_share else found.interval
    return {"mean": found.mean, **interval.clipped(0.0, 1.0 if measure.is_share else math.inf)._asdict()}


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
        counts = {"num_models": len(found), "num_sets": len(set(by_field["row_set"]))}
        arms.append({"arm": arm, "rows": rows, "reading": reading, **counts, **means, "ranges": ranges})
    return arms


def _sizes_without_steps(inputs: ComparisonInputs) -> list[int]:
    """Sizes for which the schedule `steps` was asked for and left out, as it takes too many passes."""
    if "steps" not in inputs.settings.get("readings", ()):
        return []
    sizes = {name.rows for name in inputs.trials if name.arm != FULL}
    return sorted(sizes - {name.rows for name in inputs.trials if name.reading == "steps"})


def _equal_models(inputs: ComparisonInputs) -> list[dict[str, Any]]:
    """Arms several models of which took the same steps: a fine-tune of all weights with all rows in each batch."""
    recipe = inputs.recipe
    if recipe.get("lora_rank") is not None:
        return []
    models = Counter(
        (name.arm, name.rows, name.reading, facts.row_set)
        for name, facts in inputs.trials.items()
        if facts.num_examples <= recipe.get("batch_size", 0)
    )
    same = sorted({(arm, rows) for (arm, rows, *_), count in models.items() if count > 1})
    return [{"arm": arm, "rows": rows} for arm, rows in same]


def results_table(facts: dict[str, Any]) -> pa.Table:
    """The results of the facts as the table RESULTS."""
    return pa.Table.from_pylist(facts["results"], RESULTS)


def contrasts_table(facts: dict[str, Any]) -> pa.Table:
    """The differences of the facts as the table TESTS."""
    return pa.Table.from_pylist(facts["contrasts"], TESTS)


def render_comparison(facts: dict[str, Any]) -> str:
    """Return the page as HTML; the same facts give the same bytes."""
    functions = {"p_value": p_value, "replicates": replicates, "number": number, "decimal": decimal}
    template = environment().get_template("comparison.html.j2", globals=functions)
    return template.render(
        facts=facts,
        sections=[(id, name) for id, name in _SECTIONS if id != "lengths" or facts["by_length"]],
        primary=next((one for one in facts["contrasts"] if one["primary"]), None),
        measures={measure["name"]: measure for measure in facts["measures"]},
        tests={tuple(one[name] for name in _TEST_KEY): one for one in facts["contrasts"]},
        columns=_columns(facts),
        skills=_by_setting(facts["skills"]),
        parts=_parts(facts),
        findings=_by_setting(_findings(facts)),
        lengths=_lengths(facts),
        drawn=DRAWN,
        arm_meaning=ARM_MEANING,
        reading_meaning=READING_MEANING,
        max_passes=MAX_PASSES,
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
            "cells": [_cell(column, found.get(column["key"])) for column in columns],
        }
        for (rows, reading, arm), found in _by_arm(facts).items()
    ]


def _cell(column: dict[str, Any], row: dict[str, Any] | None) -> dict[str, Any] | None:
    """One measure of an arm; None where it was not measured."""
    if row is None:
        return None
    return {
        "measure": column["measure"]["name"],
        "source": column["source"],
        **{name: row[name] for name in ("mean", "low", "high")},
    }


def _findings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The tested pairs: for each a row of differences, one for each measure and source."""
    found: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for one in facts["contrasts"]:
        pair = one["rows"], one["reading"], one["arm"], one["against"], one["question"]
        found.setdefault(pair, {})[one["measure"], one["source"]] = one
    names = ("rows", "reading", "arm", "against", "question")
    rows = [
        dict(zip(names, pair, strict=True))
        | {"cells": [{"column": column, "test": tests.get(column["key"])} for column in _columns(facts)]}
        for pair, tests in found.items()
    ]
    return sorted(rows, key=itemgetter("rows", "reading"))


def _lengths(facts: dict[str, Any]) -> list[tuple[tuple[int, str], list[tuple[str, list[dict[str, Any]]]]]]:
    """The losses by length: for each size and schedule a row for each arm, with a difference for each range."""
    rows = sorted(facts["by_length"], key=itemgetter("rows", "reading", "arm", "shortest"))
    return [
        (setting, [(arm, list(cells)) for arm, cells in groupby(of_setting, itemgetter("arm"))])
        for setting, of_setting in groupby(rows, itemgetter("rows", "reading"))
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


def replicates(row: dict[str, Any]) -> str:
    """What an arm's interval is over, in words: the models of one set of rows, draws of rows, or several runs."""
    units, models = row["num_units"], row["num_models"]
    if row["units"] == "seeds":
        return "1 model" if models == 1 else f"{models} models on one set of rows"
    named = f"{units} {'draws' if row['units'] == 'draws' else 'runs’ selections'}"
    return named if models == units else f"{named}, {models} models"
