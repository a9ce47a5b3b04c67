"""The facts of a comparison are those of its measurements, computed here another way; its page shows and loads them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from comparison_facts import comparison_inputs, trial_names
from outline import Outline
from run_facts import EVIL
from scipy import stats

from davir_ray.comparison_config import TrialName
from davir_ray.errors import DataError
from davir_ray.report.comparison import (
    LOSS,
    STRICT,
    render_comparison,
    summarise_comparison,
    verdict,
)


def result(facts: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    (found,) = [row for row in facts["results"] if all(row[name] == value for name, value in wanted.items())]
    return dict(found)


def test_means_and_tests_are_those_of_the_values() -> None:
    inputs = comparison_inputs()
    facts, _ = summarise_comparison(inputs)
    (measured,) = inputs.measures
    of_gsm8k = measured.sources == "gsm8k"
    own, other = (
        np.stack([measured.values[TrialName(arm, 100, "steps", seed)][of_gsm8k] for seed in range(3)])
        for arm in ("selection", "random")
    )
    found = result(facts, arm="selection", reading="steps", source="gsm8k")
    means = own.sum(axis=1) / measured.weights[of_gsm8k].sum()
    assert found["by_seed"] == pytest.approx(means.tolist())
    assert found["low"] < found["mean"] < found["high"]
    test = found["against"]["random"]
    assert test["mean"] == pytest.approx((own - other).mean(axis=0).sum() / measured.weights[of_gsm8k].sum())
    assert test["p_examples"] == pytest.approx(stats.ttest_rel(own.mean(axis=0), other.mean(axis=0)).pvalue)
    assert test["p"] <= test["p_holm"] <= 3 * test["p"]
    assert "random" not in result(facts, arm="random", reading="steps", source="gsm8k")["against"]


def test_the_full_set_stands_in_both_readings_and_beside_every_size() -> None:
    facts, _ = summarise_comparison(comparison_inputs(trial_names((50, 100))))
    rows = [row for row in facts["results"] if row["arm"] == "full" and row["source"] is None]
    assert sorted((row["rows"], row["reading"]) for row in rows) == [
        (50, "epochs"), (50, "steps"), (100, "epochs"), (100, "steps"),
    ]  # fmt: skip
    assert len({row["mean"] for row in rows}) == 1
    assert len([row for row in facts["arms"] if row["arm"] == "full"]) == 1


def test_the_table_has_a_row_for_each_model_and_source() -> None:
    inputs = comparison_inputs()
    _, table = summarise_comparison(inputs)
    assert len(table) == len(inputs.trials) * 3
    of_all = {(row["arm"], row["reading"], row["seed"]): row for row in table if row["source"] is None}
    (measured,) = inputs.measures
    for name, values in measured.values.items():
        value = of_all[name.arm, name.reading, name.seed]["value"]
        assert value == pytest.approx(values.sum() / measured.weights.sum())


def test_a_verdict_needs_a_low_p_and_seeds_and_knows_which_way_is_better() -> None:
    lower, higher = LOSS._asdict(), STRICT._asdict()
    test = {"mean": -0.2, "p_holm": 0.01}
    assert verdict(test, lower, 3) == "better"
    assert verdict(test, higher, 3) == "worse"
    assert verdict({**test, "p_holm": 0.2}, lower, 3) == "no difference shown"
    assert verdict(test, lower, 1) == ""
    assert verdict({**test, "p_holm": None}, lower, 3) == ""


@pytest.mark.parametrize("sizes", [(100,), (50, 100, 200)])
def test_the_page_shows_every_number_and_loads_nothing(sizes: tuple[int, ...]) -> None:
    facts, _ = summarise_comparison(comparison_inputs(trial_names(sizes)))
    page = render_comparison(facts)
    assert page == render_comparison(facts)
    outline = Outline(page)
    assert outline.unclosed == []
    assert not {"script", "link", "iframe", "img"} & set(outline.tags)
    ids = [value for name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for name, value in outline.attributes if name == "href" and value and value[0] == "#"}
    assert links <= set(ids)
    for row in facts["results"]:
        assert f"{row['mean']:.3f}" in outline.text
    for limit in facts["limits"]:
        assert limit in outline.text
    assert outline.tags.count("svg") == 2 * 3


def test_markup_in_names_is_shown_as_text() -> None:
    inputs = comparison_inputs(run=EVIL, base=EVIL, settings={"seeds": 1, EVIL: EVIL}, recipe={EVIL: EVIL})
    (measured,) = inputs.measures
    sources = np.array([EVIL] * 40 + ["gsm8k"] * 20)
    facts, _ = summarise_comparison(replace(inputs, measures=[replace(measured, sources=sources)]))
    outline = Outline(render_comparison(facts))
    assert "script" not in outline.tags
    assert outline.text.count("<script>alert(1)</script>") > 5


def test_nothing_left_to_measure_on_is_an_error() -> None:
    inputs = comparison_inputs()
    (measured,) = inputs.measures
    empty = replace(
        measured, sources=measured.sources[:0], weights=measured.weights[:0],
        values={name: values[:0] for name, values in measured.values.items()}, base=np.empty(0),
    )  # fmt: skip
    with pytest.raises(DataError, match="2 of 63 are in the run's training pool"):
        summarise_comparison(replace(inputs, measures=[empty]))
