"""The page of a comparison, from its facts."""

from itertools import groupby
from operator import itemgetter
from typing import Any

from davir_ray.config.compare import DRAWN, MAX_PASSES, is_ranked, order_of
from davir_ray.report import charts
from davir_ray.report.comparison import columns_of
from davir_ray.report.page import decimal, environment, number, p_value

ARM_MEANING = {
    "selection": "the rows that the run selected, or its mixture if it has one",
    "random": "the same number of rows, drawn by hash",
    "random_matched": "drawn rows with the same histogram of response lengths and the same number of response tokens",
    "lowest": "the same number of rows, from the other end of the ranking",
    "rho": "the same number of rows, the highest by rho_sum: the base’s loss of the whole response minus the "
    "reference’s",
    "full": "every prepared example",
}
READING_MEANING = {
    "tokens": "every arm but full is trained for as many response tokens, to the nearest step, as random rows of its "
    "size have in the recipe’s number of epochs, so an arm of short responses takes more steps; full is trained for "
    "the recipe’s epochs",
    "epochs": "every arm is trained for the recipe’s number of epochs, so a smaller set takes fewer steps",
    "steps": "every arm is trained for the number of optimiser steps that the full set takes, so a smaller set is "
    "repeated",
}
_SECTIONS = [
    ("glance", "At a glance"),
    ("results", "Results"),
    ("lengths", "By length"),
    ("arms", "Arms"),
    ("heldout", "Held-out data"),
    ("limits", "Known limits"),
    ("settings", "Settings"),
]

_TEST_KEY = ("measure", "source", "rows", "reading", "arm", "against", "question")
"""What identifies a row of TESTS."""


def render_comparison(facts: dict[str, Any]) -> str:
    """Return the page as HTML; the same facts give the same bytes."""
    functions = {"p_value": p_value, "replicates": replicates, "number": number, "decimal": decimal}
    template = environment().get_template("comparison.html.j2", globals=functions)
    names = {row["arm"] for row in facts["arms"]}
    by_order = {
        arm: f"the same number of rows, the highest by {order}" for arm in sorted(names) if (order := order_of(arm))
    }
    return template.render(
        facts=facts,
        sections=[(id, name) for id, name in _SECTIONS if id != "lengths" or facts["by_length"]],
        primary=next((one for one in facts["contrasts"] if one["primary"]), None),
        measures={measure["name"]: measure for measure in facts["measures"]},
        tests={tuple(one[name] for name in _TEST_KEY): one for one in facts["contrasts"]},
        columns=columns_of(facts),
        skills=_by_setting(facts["skills"]),
        parts=_parts(facts),
        findings=_by_setting(_findings(facts)),
        lengths=_lengths(facts),
        drawn=DRAWN,
        ranked_arms=[arm for arm in names if is_ranked(arm)],
        arm_meaning=ARM_MEANING | by_order,
        reading_meaning=READING_MEANING,
        max_passes=MAX_PASSES,
    )


def _findings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The tested pairs: for each a row of differences, one for each measure and source."""
    found: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for one in facts["contrasts"]:
        pair = one["rows"], one["reading"], one["arm"], one["against"], one["question"]
        found.setdefault(pair, {})[one["measure"], one["source"]] = one
    names = ("rows", "reading", "arm", "against", "question")
    rows = [
        dict(zip(names, pair, strict=True))
        | {"cells": [{"column": column, "test": tests.get(column["key"])} for column in columns_of(facts)]}
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
