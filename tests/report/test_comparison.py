"""The facts of a comparison are those of its measurements, computed here another way; its page shows and loads them."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from comparison_facts import TRIAL, comparison_inputs, trial_names
from outline import Outline
from run_facts import EVIL
from scipy import stats

from davir_ray.compare.copies import Reason
from davir_ray.config.compare import TrialName
from davir_ray.errors import DataError
from davir_ray.report.comparison import (
    FLEXIBLE,
    LOSS,
    STRICT,
    ComparisonInputs,
    Measure,
    Measured,
    render_comparison,
    results_table,
    summarise_comparison,
    verdict,
)

ARMS, SIZE, SEEDS = ("selection", "random", "lowest"), 100, range(3)


def matches(measure: Measure, sources: list[str], names: list[TrialName], share: float, draw_from: int) -> Measured:
    """Answers of every model that are right or wrong by chance, the selection's right more often."""
    draw = np.random.default_rng(draw_from)
    rates = {name: share + 0.2 * (name.arm == "selection") for name in names}
    values = {name: (draw.random(len(sources)) < rate).astype(float) for name, rate in rates.items()}
    return Measured(measure=measure, sources=np.array(sources), weights=np.ones(len(sources)), values=values)


def two_skills() -> ComparisonInputs:
    """Loss and strict answers on two sources, flexible ones on one; three seeds of four arms."""
    inputs = comparison_inputs(trial_names((SIZE,)))
    names = list(inputs.trials)
    strict = matches(STRICT, ["alpaca"] * 30 + ["gsm8k"] * 50, names, 0.3, 1)
    flexible = matches(FLEXIBLE, ["gsm8k"] * 50, names, 0.4, 2)
    return replace(inputs, measures=[*inputs.measures, strict, flexible])


def mixed_verdicts() -> ComparisonInputs:
    """The selection does better than random on the small source and worse on the large one: pooled it does worse."""
    inputs = comparison_inputs(trial_names((SIZE,), ("epochs",)))
    (measured,) = inputs.measures
    moved = np.where(measured.sources == "gsm8k", -1.0, 2.0)
    values = {
        name: values + measured.weights * moved * (name.arm == "selection") for name, values in measured.values.items()
    }
    return replace(inputs, measures=[replace(measured, values=values)])


def section(page: str, name: str) -> str:
    """Text of one section of the page."""
    start = page.index(f'<section id="{name}">')
    return Outline(page[start : page.index("</section>", start)]).text


STAGES = [
    (measure, source, reading)
    for measure, source in (
        ("loss", None), ("loss", "alpaca"), ("loss", "gsm8k"), ("exact_match", None), ("exact_match", "alpaca"),
        ("exact_match", "gsm8k"), ("exact_match_flexible", None),
    )
    for reading in ("epochs", "steps")
]  # fmt: skip
"""Measure, source and reading of every table of `two_skills`."""


def of_stage(row: dict[str, Any]) -> tuple[str, str | None, str]:
    return row["measure"], row["source"], row["reading"]


def figures(inputs: ComparisonInputs) -> dict[tuple[str, str | None, TrialName], float]:
    """By measure, source (None: all) and model: values by weights, summed over the examples one by one."""
    sums: dict[tuple[str, str | None, TrialName], list[tuple[float, float]]] = {}
    for measured in inputs.measures:
        several = len(set(measured.sources.tolist())) > 1
        for name, values in measured.values.items():
            for source, value, weight in zip(measured.sources.tolist(), values, measured.weights, strict=True):
                for group in (None, source) if several else (None,):
                    sums.setdefault((measured.measure.name, group, name), []).append((value, weight))
    return {key: np.sum(found, axis=0)[0] / np.sum(found, axis=0)[1] for key, found in sums.items()}


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
    assert "random" not in result(facts, arm="random", reading="steps", source="gsm8k")["against"]


def test_rows_in_the_pool_are_counted_by_reason_and_every_reason_is_explained() -> None:
    by_reason = dict(zip(Reason, (1204, 31, 5), strict=True))
    inputs = replace(comparison_inputs(), in_training_pool=1240, in_pool_by_reason=by_reason, num_pool_rows_not_read=9)
    facts, _ = summarise_comparison(inputs)
    assert facts["heldout"]["in_pool_by_reason"] == {"word_for_word": 1204, "same_prompt": 31, "near_copy": 5}
    assert facts["heldout"]["pool_rows_not_read"] == 9
    text = section(render_comparison(facts), "heldout")
    for shown in ("training pool1,240", "word for word1,204", "another response31", "at least 0.7)5", "Of 9 rows"):
        assert shown in " ".join(text.split())
    limits = " ".join(section(render_comparison(facts), "limits").split())
    assert "Paraphrases, translations and shared passages of longer texts are not found." in limits


def holm_by_hand(p: dict[str, float]) -> dict[str, float]:
    """Step down: the least p by the number of tests, the next by one fewer, none below the one before, none above 1."""
    corrected, before = {}, 0.0
    for tests_left, arm in zip(range(len(p), 0, -1), sorted(p, key=p.__getitem__), strict=True):
        before = corrected[arm] = min(1.0, max(before, tests_left * p[arm]))
    return corrected


@pytest.mark.parametrize("baseline", ["random", "full"])
def test_p_values_are_corrected_for_the_arms_of_one_table(baseline: str) -> None:
    facts, _ = summarise_comparison(two_skills())
    for measure, source, reading in STAGES:
        rows = [row for row in facts["results"] if of_stage(row) == (measure, source, reading)]
        tests = {row["arm"]: row["against"][baseline] for row in rows if row["arm"] != baseline}
        assert len(tests) == len(ARMS)
        expected = holm_by_hand({arm: test["p"] for arm, test in tests.items()})
        assert {arm: test["p_holm"] for arm, test in tests.items()} == pytest.approx(expected, rel=1e-9, abs=0)


def test_every_figure_is_that_of_the_values_of_the_examples() -> None:
    inputs = two_skills()
    facts, table = summarise_comparison(inputs)
    expected = figures(inputs)
    found = {
        (row["measure"], row["source"], TrialName(row["arm"], row["rows"], row["reading"], row["seed"])): row
        for row in table.to_pylist()
    }
    assert len(found) == len(table)
    assert {key: row["value"] for key, row in found.items()} == pytest.approx(expected)
    sizes = {("loss", None): 60, ("loss", "alpaca"): 40, ("loss", "gsm8k"): 20, ("exact_match", None): 80}
    sizes |= {("exact_match", "alpaca"): 30, ("exact_match", "gsm8k"): 50, ("exact_match_flexible", None): 50}
    assert {key[:2]: row["num_heldout"] for key, row in found.items()} == sizes

    def by_seed(row: dict[str, Any], arm: str) -> list[float]:
        rows, reading = (1000, "epochs") if arm == "full" else (row["rows"], row["reading"])
        return [expected[row["measure"], row["source"], TrialName(arm, rows, reading, seed)] for seed in SEEDS]

    assert len(facts["results"]) == len(STAGES) * (len(ARMS) + 1)
    for row in facts["results"]:
        own = by_seed(row, row["arm"])
        assert row["by_seed"] == pytest.approx(own)
        assert row["mean"] == pytest.approx(np.mean(own))
        assert row["num_heldout"] == sizes[row["measure"], row["source"]]
        assert row["against"].keys() == {"random", "full"} - {row["arm"]}
        for baseline, test in row["against"].items():
            assert test["mean"] == pytest.approx(np.mean(own) - np.mean(by_seed(row, baseline)))
    for row in facts["skills"][:-1]:
        for cell in row["cells"]:
            group = None if cell["measure"] == "exact_match_flexible" else cell["source"]
            own = by_seed({**row, "measure": cell["measure"], "source": group}, row["arm"])
            assert cell["mean"] == pytest.approx(np.mean(own))
    losses = inputs.measures[0]
    assert losses.base is not None
    for row, cell in zip(facts["base_results"][1:], facts["skills"][-1]["cells"], strict=False):
        there = losses.sources == row["source"]
        assert row["mean"] == cell["mean"] == pytest.approx(losses.base[there].sum() / losses.weights[there].sum())


def of_nothing_but_chance(draw: np.random.Generator) -> ComparisonInputs:
    """A selection that is one more random set: sets, models on them, and examples vary."""
    names = [TrialName(arm, SIZE, "epochs", seed) for arm in ("selection", "random") for seed in SEEDS]
    tokens, difficulty, of_selection = (
        draw.integers(1, 50, 40).astype(float),
        draw.normal(2, 1, 40),
        draw.normal(0, 0.1),
    )
    values = {}
    for name in names:
        of_set = of_selection if name.arm == "selection" else draw.normal(0, 0.1)
        values[name] = tokens * (difficulty + of_set + draw.normal(0, 0.1) + draw.normal(0, 0.3, 40))
    measured = Measured(measure=LOSS, sources=np.array(["alpaca"] * 40), weights=tokens, values=values)
    return replace(comparison_inputs(names), measures=[measured])


def test_the_interval_of_a_difference_holds_nothing_where_there_is_none() -> None:
    draw, held, rounds = np.random.default_rng(4), 0, 200
    for _ in range(rounds):
        facts, _ = summarise_comparison(of_nothing_but_chance(draw))
        test = result(facts, arm="selection")["against"]["random"]
        held += test["low"] <= 0 <= test["high"]
    # 95 % of 200 is 190, give or take 3; few seeds with normal noise hold a little more.
    assert 0.90 <= held / rounds <= 0.99


def test_the_full_set_is_compared_in_both_readings_and_with_every_size() -> None:
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
    of_all = {(row["arm"], row["reading"], row["seed"]): row for row in table.to_pylist() if row["source"] is None}
    (measured,) = inputs.measures
    for name, values in measured.values.items():
        value = of_all[name.arm, name.reading, name.seed]["value"]
        assert value == pytest.approx(values.sum() / measured.weights.sum())


def test_the_results_have_a_row_for_each_arm_with_its_interval_and_tests() -> None:
    facts, _ = summarise_comparison(two_skills())
    table = results_table(facts).to_pylist()
    assert len(table) == len(facts["results"])
    for row, found in zip(table, facts["results"], strict=True):
        assert {name: row[name] for name in ("measure", "source", "rows", "reading", "arm", "mean", "low", "high")} == {
            name: found[name] for name in ("measure", "source", "rows", "reading", "arm", "mean", "low", "high")
        }
        for baseline in ("random", "full"):
            test = found["against"].get(baseline, {})
            for name in ("mean", "low", "high", "p", "p_holm", "p_examples"):
                assert row[f"against_{baseline}_{name}"] == test.get(name)


def test_the_interval_of_a_share_is_of_shares() -> None:
    """One right answer of fifty: Student's t over the seeds reaches below 0."""
    inputs = comparison_inputs(trial_names((SIZE,)))
    names, sources = list(inputs.trials), np.array(["gsm8k"] * 50)
    values = {name: np.eye(1, 50, name.seed)[0] * (name.seed == 0) for name in names}
    few = Measured(measure=STRICT, sources=sources, weights=np.ones(50), values=values)
    most = replace(few, measure=FLEXIBLE, values={name: 1 - value for name, value in values.items()})
    facts, _ = summarise_comparison(replace(inputs, measures=[few, most]))
    ends = {"exact_match": set(), "exact_match_flexible": set()}
    for row in facts["results"]:
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1
        ends[row["measure"]] |= {row["low"], row["high"]}
    assert 0 in ends["exact_match"]
    assert 1 in ends["exact_match_flexible"]


def test_a_verdict_needs_a_low_p_and_seeds_and_knows_which_way_is_better() -> None:
    lower, higher = asdict(LOSS), asdict(STRICT)
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


def test_one_table_has_every_arm_by_measure_and_source() -> None:
    facts, _ = summarise_comparison(two_skills())
    skills = facts["skills"]
    stages = [(SIZE, reading, arm) for reading in ("epochs", "steps") for arm in (*ARMS, "full")]
    assert [(row["rows"], row["reading"], row["arm"]) for row in skills] == [*stages, (None, None, "base")]
    columns = [("loss", "alpaca"), ("loss", "gsm8k"), ("exact_match", "alpaca"), ("exact_match", "gsm8k")]
    columns += [("exact_match_flexible", "gsm8k")]
    for row in skills[:-1]:
        assert [(cell["measure"], cell["source"]) for cell in row["cells"]] == columns
        for cell in row["cells"]:
            group = None if cell["measure"] == "exact_match_flexible" else cell["source"]
            own = {name: row[name] for name in ("rows", "reading", "arm")}
            found = result(facts, measure=cell["measure"], source=group, **own)
            assert {name: cell[name] for name in ("mean", "low", "high")} == {
                name: found[name] for name in ("mean", "low", "high")
            }
    assert [cell is not None for cell in skills[-1]["cells"]] == [True, True, False, False, False]
    text = section(render_comparison(facts), "glance")
    for row in skills:
        for cell in filter(None, row["cells"]):
            assert f"{cell['mean']:.3f}{cell['low']:.3f} to {cell['high']:.3f}" in text


def test_the_verdict_is_that_of_each_source_and_not_of_all_together() -> None:
    facts, _ = summarise_comparison(mixed_verdicts())
    (own,) = [row for row in facts["skills"] if row["arm"] == "selection"]
    assert [(cell["source"], cell["against_random"]) for cell in own["cells"]] == [
        ("alpaca", "worse"), ("gsm8k", "better"),
    ]  # fmt: skip
    text = section(render_comparison(facts), "glance")
    for source in (None, "alpaca", "gsm8k"):
        mean = result(facts, arm="selection", source=source)["against"]["random"]["mean"]
        assert (f"{mean:.3f}".replace("-", "−") in text) == (source is not None)


def test_one_measure_on_one_source_needs_no_table_of_skills() -> None:
    inputs = comparison_inputs()
    (measured,) = inputs.measures
    one = replace(measured, sources=np.array(["alpaca"] * len(measured.sources)))
    facts, _ = summarise_comparison(replace(inputs, measures=[one]))
    assert facts["skills"] == []
    text = section(render_comparison(facts), "glance")
    assert "verdict" in text
    assert "alpaca" not in text


def test_the_arms_are_reported_as_means_over_their_seeds_with_the_range_where_they_differ() -> None:
    inputs = comparison_inputs(trial_names((SIZE,), ("epochs",)))
    drawn = (3000, 3500, 4600)
    trials = {
        name: replace(TRIAL, num_response_tokens=drawn[name.seed] if name.arm == "random" else 2900)
        for name in inputs.trials
    }
    facts, _ = summarise_comparison(replace(inputs, trials=trials))
    found = {row["arm"]: (row["num_response_tokens"], row["ranges"]["num_response_tokens"]) for row in facts["arms"]}
    same = (2900, [2900, 2900])
    assert found == {"selection": same, "random": (3700, [3000, 4600]), "lowest": same, "full": same}
    text = section(render_comparison(facts), "arms")
    assert "3,7003,000 to 4,600" in text
    assert text.count("2,900") == 3


def test_the_page_says_that_the_rules_of_the_selection_do_not_bind_the_other_arms() -> None:
    facts, _ = summarise_comparison(comparison_inputs())
    text = section(render_comparison(facts), "arms")
    assert "all scored rows of the source: random, lowest. The selection’s own" in text
    assert "min_response_tokens, max_response_tokens, drop_duplicates, balance and quotas do not apply to them." in text
    few = [name for name in trial_names() if name.arm in ("selection", "full")]
    facts, _ = summarise_comparison(comparison_inputs(few))
    assert "do not apply" not in section(render_comparison(facts), "arms")
