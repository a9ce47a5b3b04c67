"""The facts of a comparison: from the models' measurements to what its page and its tables say.

Pure functions: no files, no models. An arm is a set of rows to train on; each arm is trained with several seeds, in a
size (`rows`) and a schedule (`reading`: equal tokens, equal epochs, or as many steps as the full set). Held-out losses
are nats per token; the other measures have units of their own.

Where there are several sizes, the best is chosen on one half of the held-out prompts, and everything is reported on the
other, so that a size is not reported with the luck of its examples. The luck of its models it keeps: they are the same
on both halves.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from davir_ray.config.compare import DRAWN, FULL, TrialName
from davir_ray.errors import DataError
from davir_ray.formulas.hashing import drawn
from davir_ray.formulas.statistics import Floats, Outcome, Panel, seed_correlation
from davir_ray.report.contrasts import ON_AVERAGE, Contrast, Scope, contrasts_of, corrected
from davir_ray.report.facts import json_ready, named_values
from davir_ray.report.measured import LOSS, ComparisonInputs, Measure, Measured, TrialFacts

Key = tuple[str, int, str]
"""An arm, its size and its schedule."""

LIMITS = [
    "The comparison shows the effect of these rows on this base, with this recipe, on this held-out data. Results on a "
    "small base need not hold for a large one, which may already know what a small model learns first.",
    "A loss is not a judgement: a lower loss on held-out answers means that such answers became likelier, not that "
    "a person would prefer what the model writes.",
    "With few seeds the spread between models is uncertain. Intervals and p-values account for it by Student’s t, with "
    "one estimate for the arms of a size and schedule whose models have the same rows, so with two or three seeds only "
    "large differences are detected; “not resolved” does not mean that there is none.",
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
        ("within_margin", pa.bool_()),
    ]
)
"""tests.parquet: a row for each difference on the page, see Contrast."""

NUM_LENGTHS = 4
"""Ranges of length, with about as many held-out examples each, that the loss is shown for."""


class _Reported(NamedTuple):
    """What the page reports."""

    measures: list[Measured]
    settings: list[tuple[int, str]]
    """The sizes and schedules in which arms are compared."""
    primary: tuple[int, str]
    """The size and schedule of the primary test."""
    chosen: dict[str, Any] | None
    """How the size was chosen on the other half of the held-out prompts; None where it was not."""
    too_few_to_choose: bool


def summarise_comparison(inputs: ComparisonInputs) -> tuple[dict[str, Any], pa.Table]:
    """The facts of the page, ready for JSON, and the table TABLE."""
    reported = _reported(inputs)
    contrasts: list[Contrast] = []
    results, base_results, table = [], [], []
    for measured in reported.measures:
        names = np.unique(measured.sources).tolist()
        for source in [None, *names] if len(names) > 1 else [None]:
            part = measured if source is None else measured.of(measured.sources == source)
            name = {"measure": measured.measure.name, "source": source}
            outcomes = _outcomes(inputs, part.values)
            panel = Panel(outcomes, part.examples)
            results += [name | row for row in _results(part, panel, outcomes, reported.settings)]
            contrasts += _contrasts(inputs, part, source, panel, outcomes, reported.settings)
            if part.base is not None:
                base = Panel({None: Outcome(values_SE=part.base[None])}, part.examples)
                base_results.append(name | _mean(part.measure, base, None))
            for trial, trained in inputs.trials.items():
                value = float(part.values[trial].sum()) / float(part.weights.sum())
                measure = {"value": value, "num_heldout": len(part.weights)}
                table.append(name | trial._asdict() | asdict(trained) | measure)
    first = reported.measures[0]
    tested = corrected(
        contrasts,
        lambda one: (
            [(one.arm, one.against)] == inputs.pairs[:1]
            and one.question == ON_AVERAGE
            and (one.measure, one.source) == (inputs.measures[0].measure.name, None)
            and (one.rows, one.reading) == reported.primary
        ),
        num_sizes=1 if reported.chosen is None else len(reported.chosen["by_size"]),
    )
    shown = [measured.measure for measured in reported.measures]
    by_loss = next((measured for measured in reported.measures if measured.measure is LOSS), None)
    facts = {
        "format": 2,
        "run": inputs.run,
        "base": inputs.base,
        "arms": _arms(inputs.trials),
        "sizes_without_steps": _sizes_without_steps(inputs),
        "equal_models": _equal_models(inputs),
        "outside_selection": bool(inputs.settings.get("outside_selection")),
        "match_prompts": bool(inputs.settings.get("match_prompts")),
        "not_measured": [one.measure.title for one in inputs.measures if one.measure not in shown],
        "measures": [
            {
                **asdict(measured.measure),
                "sources": np.unique(measured.sources),
                "without_value": measured.without_value,
                "margin": inputs.margins[measured.measure.margin_of],
            }
            for measured in reported.measures
        ],
        "heldout": _heldout(inputs, first, reported.chosen),
        "results": results,
        "base_results": base_results,
        "contrasts": [asdict(one) | {"verdict": one.verdict, "within_margin": one.within_margin} for one in tested],
        "num_tests": sum(one.p is not None and not one.primary for one in tested),
        "chosen": reported.chosen,
        "too_few_to_choose": reported.too_few_to_choose,
        "by_length": [] if by_loss is None else list(_by_length(inputs, by_loss, reported.settings)),
        "seed_correlation": _seed_correlation(inputs.trials, first, reported.primary),
        "limits": LIMITS,
        "recipe": named_values(inputs.recipe),
        "settings": named_values(inputs.settings),
    }
    ready = json_ready(facts)
    return ready | {"skills": _skills(ready)}, pa.Table.from_pylist(table, TABLE)


def _reported(inputs: ComparisonInputs) -> _Reported:
    """What the page reports; DataError if there is nothing to measure on."""
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
    reading = next(iter(inputs.settings.get("readings", [])), min(reading for _, reading in settings))
    sizes = sorted(rows for rows, its_reading in settings if its_reading == reading)
    if len(sizes) < 2:
        rows = sizes[0] if sizes else min(settings)[0]
        return _Reported(measures, sorted(settings), (rows, reading), None, too_few_to_choose=False)
    halves = [drawn(measured.prompts, 0.5, "choosing half") for measured in measures]
    if min(len(np.unique(measures[0].prompts[half])) for half in (halves[0], ~halves[0])) < 2:
        return _Reported(measures, sorted(settings), (sizes[0], reading), None, too_few_to_choose=True)
    chosen = _chosen(inputs, measures[0].of(halves[0]), sizes, reading)
    others = [measured.of(~half) for measured, half in zip(measures, halves, strict=True)]
    measures = [measured for measured in others if len(measured.weights)]
    return _Reported(measures, sorted(settings), (chosen["rows"], reading), chosen, too_few_to_choose=False)


def _heldout(inputs: ComparisonInputs, first: Measured, chosen: dict[str, Any] | None) -> dict[str, Any]:
    """What became of the held-out rows; `first` is the first measure."""
    sources, num_rows = np.unique(first.sources, return_counts=True)
    return {
        "read": inputs.heldout["read"],
        "left_out": inputs.heldout.get("left_out", 0),
        "rejected": inputs.heldout["rejected"],
        "in_training_pool": inputs.in_training_pool,
        "in_pool_by_reason": dict(inputs.in_pool_by_reason),
        "pool_rows_not_read": inputs.num_pool_rows_not_read,
        "chosen_on": 0 if chosen is None else chosen["num_heldout"],
        "measured": len(first.sources),
        "prompts": len(np.unique(first.prompts)),
        "sources": [{"source": name, "rows": rows} for name, rows in zip(sources, num_rows, strict=True)],
    }


def _chosen(inputs: ComparisonInputs, half: Measured, sizes: Sequence[int], reading: str) -> dict[str, Any]:
    """The size with which the primary test's first arm, or else the first one there is, does best on this half."""
    trained = [name.arm for name in inputs.trials if name.arm != FULL]
    arm = next(arm for arm in [*(arm for arm, _ in inputs.pairs[:1]), *trained] if arm in trained)
    outcomes = _outcomes(inputs, half.values)
    panel = Panel(outcomes, half.examples)
    by_size = [
        {"rows": rows, "mean": panel.mean(key).mean} for rows in sizes if (key := (arm, rows, reading)) in outcomes
    ]
    sign = 1 if half.measure.lower_is_better else -1
    best = min(by_size, key=lambda row: (sign * row["mean"], row["rows"]))
    return {"rows": best["rows"], "arm": arm, "reading": reading, "by_size": by_size, "num_heldout": len(half.weights)}


def _outcomes(inputs: ComparisonInputs, values: Mapping[TrialName, Floats]) -> dict[Hashable, Outcome]:
    """The models of each arm, size and schedule, in the order of their seeds; of models that are equal, the first.

    Arms whose models have the same rows share the estimate of how much models vary; the others vary in their own ways.
    """
    models: dict[Key, list[TrialName]] = {}
    for trial in sorted(values, key=lambda trial: trial.seed):
        models.setdefault((trial.arm, trial.rows, trial.reading), []).append(trial)
    equal = {(row["arm"], row["rows"]) for row in _equal_models(inputs)}
    outcomes: dict[Hashable, Outcome] = {}
    for key, found in models.items():
        sets = [inputs.trials[trial].row_set for trial in found]
        if key[:2] in equal:
            sets, firsts = (part.tolist() for part in np.unique(sets, return_index=True))
            found = [found[first] for first in firsts]
        own = key[0] == FULL or key[0] in DRAWN or len(set(sets)) > 1
        outcomes[key] = Outcome(
            values_SE=np.stack([values[trial] for trial in found]),
            row_sets=sets,
            kind="draws" if key[0] in DRAWN else "runs",
            group=key if own else key[1:],
        )
    return outcomes


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
        outcomes = _outcomes(inputs, some.values)
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


def columns_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each measure on all sources together and, where there are several, on each; `key` finds it in the results."""
    columns = []
    for measure in facts["measures"]:
        sources = measure["sources"]
        if len(sources) > 1:
            columns.append({"measure": measure, "source": "all sources", "key": (measure["name"], None)})
        for source in sources:
            columns.append(
                {"measure": measure, "source": source, "key": (measure["name"], source if len(sources) > 1 else None)}
            )
    return columns


def _by_arm(facts: dict[str, Any]) -> dict[tuple[Any, ...], dict[Any, dict[str, Any]]]:
    """The results by size, schedule and arm, then by measure and source; those of the untrained base come last."""
    arms: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for row in [*facts["results"], *facts["base_results"]]:
        arm = row.get("rows"), row.get("reading"), row.get("arm", "base")
        arms.setdefault(arm, {})[row["measure"], row["source"]] = row
    return arms


def _skills(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm, and the untrained base, with every measure on every source; empty if that is a single column."""
    columns = columns_of(facts)
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
