"""The facts of a comparison are those of its measurements, computed here another way; its page shows and loads them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from comparison_facts import PAIRS, TRIAL, comparison_inputs, distinct, trial_names
from outline import Outline
from run_facts import EVIL
from scipy import stats

from davir_ray.compare.copies import Reason
from davir_ray.config.compare import TrialName
from davir_ray.errors import DataError
from davir_ray.report import charts
from davir_ray.report.comparison import contrasts_table, results_table, summarise_comparison
from davir_ray.report.comparison_page import render_comparison, replicates
from davir_ray.report.measured import FLEXIBLE, LOSS, LOSS_BY_EXAMPLE, STRICT, ComparisonInputs, Measure, Measured

ARMS, SIZE, SEEDS = ("selection", "random", "lowest"), 100, range(3)


def matches(measure: Measure, sources: list[str], names: list[TrialName], share: float, draw_from: int) -> Measured:
    """Answers of every model that are right or wrong by chance, the selection's right more often."""
    draw = np.random.default_rng(draw_from)
    rates = {name: share + 0.2 * (name.arm == "selection") for name in names}
    values = {name: (draw.random(len(sources)) < rate).astype(float) for name, rate in rates.items()}
    return measured_on(measure, sources, values)


def measured_on(measure: Measure, sources: list[str], values: dict[TrialName, np.ndarray]) -> Measured:
    """A measure of questions with prompts of their own, each of weight 1."""
    num = len(sources)
    return Measured(
        measure=measure, sources=np.array(sources), prompts=distinct(num), lengths=np.arange(num), weights=np.ones(num),
        values=values,
    )  # fmt: skip


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


def contrast(facts: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    wanted = {"arm": "selection", "against": "random", "question": "on average", **wanted}
    (found,) = [row for row in facts["contrasts"] if all(row[name] == value for name, value in wanted.items())]
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
    test = contrast(facts, reading="steps", source="gsm8k")
    weights = measured.weights[of_gsm8k]
    assert test["mean"] == pytest.approx((own - other).mean(axis=0).sum() / weights.sum())
    # By hand: delete-one jackknife over the examples, Student's t.
    difference = (own - other).mean(axis=0)
    without = np.array([np.delete(difference, i).sum() / np.delete(weights, i).sum() for i in range(20)])
    scale = np.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum())
    degrees = weights.sum() ** 2 / (weights**2).sum() - 1
    assert test["p_models"] == pytest.approx(2 * stats.t.sf(abs(test["mean"]) / scale, degrees))
    assert test["low"] < test["mean"] < test["high"]


def test_the_tests_are_the_pairs_that_were_asked_for() -> None:
    facts, _ = summarise_comparison(comparison_inputs(pairs=[("lowest", "full"), ("selection", "rho")]))
    pairs = {(row["arm"], row["against"]) for row in facts["contrasts"]}
    assert pairs == {("lowest", "full")}  # rho was not trained


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


def holm_by_hand(p: dict[Any, float]) -> dict[Any, float]:
    """Step down: the least p by the number of tests, the next by one fewer, none below the one before, none above 1."""
    corrected, before = {}, 0.0
    for tests_left, arm in zip(range(len(p), 0, -1), sorted(p, key=p.__getitem__), strict=True):
        before = corrected[arm] = min(1.0, max(before, tests_left * p[arm]))
    return corrected


def test_one_test_is_primary_and_all_others_are_corrected_together() -> None:
    facts, _ = summarise_comparison(two_skills())
    assert len(facts["contrasts"]) == len(STAGES) * len(PAIRS)
    primary = [row for row in facts["contrasts"] if row["primary"]]
    assert [(row["arm"], row["against"], row["measure"], row["source"], row["reading"]) for row in primary] == [
        ("selection", "random", "loss", None, "epochs")
    ]
    assert primary[0]["p_holm"] == primary[0]["p"]
    for name in ("p", "p_level"):
        others = {place: row[name] for place, row in enumerate(facts["contrasts"]) if not row["primary"]}
        tests = {place: p for place, p in others.items() if p is not None}
        assert len(tests) == facts["num_tests"]
        expected = holm_by_hand(tests)
        found = {place: facts["contrasts"][place][f"{name}_holm"] for place in tests}
        assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_the_first_configured_reading_has_the_primary_test() -> None:
    inputs = comparison_inputs(settings={"readings": ["steps", "epochs"]})
    facts, _ = summarise_comparison(inputs)
    assert [row["reading"] for row in facts["contrasts"] if row["primary"]] == ["steps"]


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
    for row in facts["contrasts"]:
        own, other = by_seed(row, row["arm"]), by_seed(row, row["against"])
        assert row["mean"] == pytest.approx(np.mean(own) - np.mean(other))
    for row in facts["skills"][:-1]:
        for cell in row["cells"]:
            alone = cell["measure"] == "exact_match_flexible" or cell["source"] == "all sources"
            group = None if alone else cell["source"]
            own = by_seed({**row, "measure": cell["measure"], "source": group}, row["arm"])
            assert cell["mean"] == pytest.approx(np.mean(own))
    losses = inputs.measures[0]
    assert losses.base is not None
    for row, cell in zip(facts["base_results"], facts["skills"][-1]["cells"], strict=False):
        there = np.isin(losses.sources, row["source"] or np.unique(losses.sources))
        assert row["mean"] == cell["mean"] == pytest.approx(losses.base[there].sum() / losses.weights[there].sum())


def of_nothing_but_chance(draw: np.random.Generator) -> ComparisonInputs:
    """Arms that are all as good on average: draws, models on them, and examples vary."""
    arms = ("selection", "random", "lowest", "rho", "random_matched")
    names = [TrialName(arm, SIZE, "epochs", seed) for arm in arms for seed in SEEDS]
    tokens, difficulty = draw.integers(1, 50, 40).astype(float), draw.normal(2, 1, 40)
    values = {}
    for name in names:
        of_draw = draw.normal(0, 0.05) if name.arm == "random" else 0
        values[name] = tokens * (difficulty + of_draw + draw.normal(0, 0.1) + draw.normal(0, 0.3, 40))
    measured = replace(measured_on(LOSS, ["alpaca"] * 40, values), weights=tokens)
    pairs = [(arm, other) for place, arm in enumerate(arms) for other in arms[place + 1 :]]
    return replace(comparison_inputs(names), pairs=pairs, measures=[measured])


def test_a_page_where_there_is_nothing_shows_nothing() -> None:
    """The primary test errs in one page of twenty, and so do all the others together."""
    draw, held, marked, uncorrected, rounds = np.random.default_rng(4), 0, 0, 0, 300
    for _ in range(rounds):
        facts, _ = summarise_comparison(of_nothing_but_chance(draw))
        test = contrast(facts)
        held += test["low"] <= 0 <= test["high"]
        others = [row for row in facts["contrasts"] if not row["primary"]]
        marked += any(row["verdict"] in ("better", "worse") for row in others)
        uncorrected += any(row["p"] is not None and row["p"] < 0.05 for row in others)
    # 95 % of 300 is 285, give or take 4.
    assert 0.90 <= held / rounds <= 0.99
    assert marked / rounds <= 0.075
    assert uncorrected / rounds > 0.1


def test_several_sizes_are_chosen_on_one_half_of_the_prompts_and_reported_on_the_other() -> None:
    inputs = comparison_inputs(trial_names((50, 100, 200), ("epochs",)))
    (measured,) = inputs.measures
    better = {
        name: values - measured.weights * 0.5 * (name.arm == "selection" and name.rows == 100)
        for name, values in measured.values.items()
    }
    twice = np.repeat(distinct(30), 2)  # pairs of rows with one prompt are not separated
    facts, _ = summarise_comparison(replace(inputs, measures=[replace(measured, values=better, prompts=twice)]))
    assert facts["chosen"]["rows"] == 100
    (primary,) = [row for row in facts["contrasts"] if row["primary"]]
    assert (primary["rows"], primary["p_holm"]) == (100, pytest.approx(3 * primary["p"], rel=1e-9, abs=0))
    halves = facts["heldout"]["chosen_on"], facts["heldout"]["measured"]
    assert sum(halves) == 60
    assert all(half % 2 == 0 and half > 10 for half in halves)
    assert {row["num_heldout"] for row in facts["results"] if row["source"] is None} == {halves[1]}
    assert "on half of the held-out prompts" in section(render_comparison(facts), "glance")


def test_draws_say_nothing_of_the_draws_of_another_arm() -> None:
    names = [
        TrialName(arm, SIZE, "epochs", seed) for arm in ("selection", "random", "random_matched") for seed in SEEDS
    ]
    inputs = comparison_inputs(names)
    trials = {name: replace(TRIAL, row_set=name.seed * (name.arm != "selection")) for name in names}
    (measured,) = inputs.measures
    moved = {
        name: values + measured.weights * name.seed * (name.arm == "random_matched")
        for name, values in measured.values.items()
    }
    found = [
        contrast(summarise_comparison(replace(inputs, trials=trials, measures=measures))[0], source=None)
        for measures in (inputs.measures, [replace(measured, values=moved)])
    ]
    assert found[0] == found[1]


def test_models_that_took_the_same_steps_are_one() -> None:
    names = trial_names((SIZE,), ("epochs",))
    drawn = {name: replace(TRIAL, row_set=name.seed if name.arm == "random" else 0) for name in names}
    recipe = {"batch_size": TRIAL.num_examples, "lora_rank": None}
    facts, _ = summarise_comparison(comparison_inputs(names, trials=drawn, recipe=recipe))
    assert {row["arm"]: row["num_models"] for row in facts["results"]} == {
        "selection": 1, "random": 3, "lowest": 1, "full": 1,
    }  # fmt: skip
    assert contrast(facts, source=None)["untested"] == "one model"


def test_rows_with_one_prompt_are_one_example() -> None:
    inputs = comparison_inputs(trial_names((SIZE,), ("epochs",)))
    (measured,) = inputs.measures
    twice = replace(
        measured.of(np.tile(np.arange(60), 2)),
        prompts=np.tile(measured.prompts, 2),  # type: ignore[arg-type]
    )
    once, doubled = (
        contrast(summarise_comparison(replace(inputs, measures=[one]))[0], source=None) for one in (measured, twice)
    )
    for name in ("mean", "low", "high", "p"):
        assert doubled[name] == pytest.approx(once[name])


def test_a_size_is_not_chosen_on_a_single_prompt() -> None:
    inputs = comparison_inputs(trial_names((50, 100), ("epochs",)))
    one = replace(inputs.measures[0], prompts=np.zeros(60, np.int64))
    facts, _ = summarise_comparison(replace(inputs, measures=[one]))
    assert (facts["chosen"], facts["too_few_to_choose"], facts["heldout"]["measured"]) == (None, True, 60)
    assert "too few held-out prompts to choose" in section(render_comparison(facts), "glance")


def test_the_loss_by_length_and_by_example_is_shown_and_not_tested() -> None:
    inputs = comparison_inputs()
    (measured,) = inputs.measures
    by_example = replace(
        measured, measure=LOSS_BY_EXAMPLE, weights=np.ones(60), base=None,
        values={name: values / measured.weights for name, values in measured.values.items()},
    )  # fmt: skip
    facts, _ = summarise_comparison(replace(inputs, measures=[measured, by_example]))
    for row in facts["contrasts"]:
        assert (row["p"] is None) == (row["measure"] == "loss_by_example")
        assert row["low"] < row["mean"] < row["high"]
    cells = [row for row in facts["by_length"] if (row["arm"], row["reading"]) == ("selection", "steps")]
    assert sum(row["num_heldout"] for row in cells) == 60
    assert len(cells) == 4
    for row in cells:
        there = (measured.lengths >= row["shortest"]) & (measured.lengths <= row["longest"])
        assert there.sum() == row["num_heldout"]
        of_arm = [
            np.mean([measured.values[TrialName(arm, 100, "steps", seed)][there].sum() for seed in SEEDS])
            for arm in ("selection", "random")
        ]
        assert row["mean"] == pytest.approx((of_arm[0] - of_arm[1]) / measured.weights[there].sum())


def test_the_page_says_what_an_interval_is_over() -> None:
    inputs = comparison_inputs(trial_names((SIZE,), ("epochs",)))
    runs = {name: replace(facts, row_set=name.seed % 2) for name, facts in inputs.trials.items()}
    facts, _ = summarise_comparison(inputs)
    assert {row["arm"]: replicates(row) for row in facts["results"]} == {
        "selection": "3 models on one set of rows", "random": "3 draws", "lowest": "3 models on one set of rows",
        "full": "3 models on one set of rows",
    }  # fmt: skip
    facts, _ = summarise_comparison(replace(inputs, trials=runs))
    assert replicates(result(facts, arm="selection", source=None)) == "2 runs’ selections, 3 models"
    assert "2 draws, 3 models" in section(render_comparison(facts), "results")


def test_answers_that_differ_on_few_questions_are_not_tested_and_have_an_interval() -> None:
    names = [TrialName(arm, SIZE, "epochs", seed) for arm in ("selection", "random") for seed in SEEDS]
    right = np.zeros(80)
    values = dict.fromkeys(names, right)
    facts, _ = summarise_comparison(
        replace(comparison_inputs(names), measures=[measured_on(STRICT, ["q"] * 80, values)])
    )
    test = contrast(facts)
    assert (test["num_differing"], test["p"], test["untested"]) == (0, None, "fewer than 10 differ")
    assert test["low"] < 0 < test["high"]
    some = {name: (np.arange(80) < 12 * (name.arm == "selection")).astype(float) for name in names}
    facts, _ = summarise_comparison(replace(comparison_inputs(names), measures=[measured_on(STRICT, ["q"] * 80, some)]))
    test = contrast(facts)
    assert test["num_differing"] == 12
    # Twelve questions of one sign: 2 of 2**12 assignments of signs are as far from 0.
    assert 2**-11 <= test["p"] < 1.5 * 2**-11
    assert test["verdict"] == "better"


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


def test_the_tables_have_a_row_for_each_arm_and_each_difference() -> None:
    facts, _ = summarise_comparison(two_skills())
    for table, rows in ((results_table(facts), facts["results"]), (contrasts_table(facts), facts["contrasts"])):
        assert table.to_pylist() == [{name: row[name] for name in table.column_names} for row in rows]


def test_the_interval_of_a_share_is_of_shares() -> None:
    """One right answer of a model of three: Student's t over the seeds would reach below 0."""
    inputs = comparison_inputs(trial_names((SIZE,)))
    names, sources = list(inputs.trials), np.array(["gsm8k"] * 50)
    values = {name: np.eye(1, 50, name.seed)[0] * (name.seed == 0) for name in names}
    few = measured_on(STRICT, sources.tolist(), values)
    most = replace(few, measure=FLEXIBLE, values={name: 1 - value for name, value in values.items()})
    facts, _ = summarise_comparison(replace(inputs, measures=[few, most]))
    for row in facts["results"]:
        assert 0 <= row["low"] < row["mean"] < row["high"] <= 1


@pytest.mark.parametrize("sizes", [(100,), (50, 100, 200)])
def test_the_page_shows_every_number_and_loads_nothing(sizes: tuple[int, ...]) -> None:
    facts, _ = summarise_comparison(comparison_inputs(trial_names(sizes)))
    page = render_comparison(facts)
    assert page == render_comparison(facts)
    outline = Outline(page)
    assert outline.unclosed == []
    for row in facts["contrasts"]:
        assert f"{row['mean']:.3f}".replace("-", "−") in outline.text
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
    inputs = comparison_inputs(run=EVIL, base=EVIL, settings={EVIL: EVIL}, recipe={EVIL: EVIL})
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
    sources = ("all sources", "alpaca", "gsm8k")
    columns = [(measure, source) for measure in ("loss", "exact_match") for source in sources]
    columns += [("exact_match_flexible", "gsm8k")]
    for row in skills[:-1]:
        assert [(cell["measure"], cell["source"]) for cell in row["cells"]] == columns
        for cell in row["cells"]:
            alone = cell["measure"] == "exact_match_flexible" or cell["source"] == "all sources"
            group = None if alone else cell["source"]
            own = {name: row[name] for name in ("rows", "reading", "arm")}
            found = result(facts, measure=cell["measure"], source=group, **own)
            assert {name: cell[name] for name in ("mean", "low", "high")} == {
                name: found[name] for name in ("mean", "low", "high")
            }
    assert [cell is not None for cell in skills[-1]["cells"]] == [True] * 3 + [False] * 4
    text = section(render_comparison(facts), "glance")
    for row in skills:
        for cell in filter(None, row["cells"]):
            assert f"{cell['mean']:.3f}{cell['low']:.3f} to {cell['high']:.3f}" in text


def test_the_verdict_is_that_of_each_source() -> None:
    facts, _ = summarise_comparison(mixed_verdicts())
    verdicts = {source: contrast(facts, source=source)["verdict"] for source in (None, "alpaca", "gsm8k")}
    assert verdicts["alpaca"] == "worse"
    assert verdicts["gsm8k"] == "better"


def test_one_measure_on_one_source_needs_no_table_of_skills() -> None:
    inputs = comparison_inputs()
    (measured,) = inputs.measures
    one = replace(measured, sources=np.array(["alpaca"] * len(measured.sources)))
    facts, _ = summarise_comparison(replace(inputs, measures=[one]))
    assert facts["skills"] == []
    text = section(render_comparison(facts), "glance")
    assert "primary test" in text
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


def arms_of(names: list[TrialName] | None = None, **fields: Any) -> str:
    """Text of the page's section of the arms, each white space one blank."""
    facts, _ = summarise_comparison(comparison_inputs(names, **fields))
    return " ".join(section(render_comparison(facts), "arms").split())


def test_the_page_says_which_rules_of_the_selection_bind_the_other_arms() -> None:
    text = arms_of()
    assert "min_response_tokens, max_response_tokens and drop_duplicates: random, lowest. The selection’s" in text
    assert "min_score, balance and quotas do not apply to them." in text
    assert "Drawn rows may be selected ones, too" in text
    assert "Drawn rows are none that a run selected." in arms_of(settings={"outside_selection": True})
    few = [name for name in trial_names() if name.arm in ("selection", "full")]
    assert "do not apply" not in arms_of(few)
    matched = [TrialName("random_matched", SIZE, "tokens", seed) for seed in SEEDS]
    assert "prompt lengths" not in arms_of(matched)
    assert "as many rows in each range of prompt lengths, too" in arms_of(matched, settings={"match_prompts": True})


def test_an_arm_of_another_order_is_explained_and_drawn() -> None:
    arms = ("selection", "random", "order:ifd", "order:base_mean_nll")
    names = [TrialName(arm, SIZE, "tokens", seed) for arm in arms for seed in SEEDS]
    text = arms_of(names)
    for order in ("ifd", "base_mean_nll"):
        assert f"order:{order}the same number of rows, the highest by {order}" in text
    assert "selection, order:ifd, order:base_mean_nll: every model of an arm has the same rows" in text
    facts, _ = summarise_comparison(comparison_inputs(names))
    drawn = charts.comparison([row for row in facts["results"] if row["source"] is None], "nats", "loss")
    assert "order:ifd" in drawn
    assert "order:base_mean_nll" in drawn


def test_the_page_says_what_the_models_of_an_arm_are_replicates_of() -> None:
    names = [name for name in trial_names((SIZE,), ("tokens",)) if name.arm != "full"]
    inputs = comparison_inputs(names)
    of_one = arms_of(
        names,
        trials={name: replace(TRIAL, row_set=name.seed if name.arm == "random" else 0) for name in names},
    )
    assert "selection, lowest: every model of an arm has the same rows, those of one run." in of_one
    assert "replicates of the method: their" not in of_one
    assert "Several models were trained on each draw" not in of_one
    sets = {name: replace(TRIAL, row_set=name.seed if name.arm != "random" else name.seed // 2) for name in names}
    text = arms_of(names, trials=sets)
    assert "have 3 sets of rows, those of 3 runs" in text
    assert "replicates of the method: their" in text
    assert "Several models were trained on each draw" in text
    facts, _ = summarise_comparison(replace(inputs, trials=sets))
    counts = {row["arm"]: (row["num_models"], row["num_sets"]) for row in facts["arms"]}
    assert counts == {"selection": (3, 3), "random": (3, 2), "lowest": (3, 3)}


def test_the_page_names_arms_whose_models_take_the_same_steps() -> None:
    names = trial_names((SIZE,), ("tokens",))
    drawn = {name: replace(TRIAL, row_set=name.seed if name.arm == "random" else 0) for name in names}
    recipe = {"batch_size": TRIAL.num_examples, "lora_rank": None}

    def named(**changes: Any) -> bool:
        text = arms_of(names, trials=drawn, recipe=recipe | changes)
        found = (
            "A batch has all rows of these arms: full (1,000 rows), lowest (100 rows), selection (100 rows)." in text
        )
        assert found == ("take the same steps" in text)
        return found

    assert named()
    assert not named(batch_size=TRIAL.num_examples - 1)
    assert not named(lora_rank=4)


def test_the_page_shows_what_was_trained_on_and_says_what_was_left_out() -> None:
    names = [name for name in trial_names((50, SIZE)) if (name.rows, name.reading) != (50, "steps")]
    trials = {name: replace(TRIAL, num_shared=11 + name.seed, num_trained_tokens=8123) for name in names}
    text = arms_of(names, trials=trials, settings={"readings": ["epochs", "steps"]})
    assert "1211 to 13" in text
    assert "8,123" in text
    assert "“same steps” is left out for 50 rows: it would take more than 20 passes" in text
    assert "is left out for" not in arms_of(settings={"readings": ["epochs", "steps"]})
    assert "same learning rate, which was tuned for none of them" in text


def test_the_page_says_how_many_models_an_arm_has() -> None:
    names = [TrialName("selection", SIZE, "tokens", seed) for seed in range(2)]
    names += [TrialName("random", SIZE, "tokens", seed) for seed in range(5)]
    facts, _ = summarise_comparison(comparison_inputs(names, settings={"seeds": {"random": 5, "default": 2}}))
    assert "same recipe, 2 to 5 models each" in Outline(render_comparison(facts)).text
