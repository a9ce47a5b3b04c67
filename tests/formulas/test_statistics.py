"""Intervals that hold what they say, tests that agree with scipy's, no differences where there are none."""

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from davir_ray.formulas.statistics import (
    Difference,
    Estimate,
    Examples,
    Interval,
    Outcome,
    Panel,
    holm,
    seed_correlation,
    share_interval,
    sign_flips,
)

Floats = np.ndarray


def difference(arm: Outcome, other: Outcome, weights: Floats, *more: Outcome, shares: bool = False) -> Difference:
    outcomes = {"arm": arm, "other": other, **dict(enumerate(more))}
    return Panel(outcomes, Examples.independent(weights)).difference("arm", "other", shares=shares)


def mean_of(values: Floats, examples: Examples) -> Estimate:
    return Panel({"arm": Outcome(values_SE=values)}, examples).mean("arm")


def test_the_mean_is_that_of_tokens_not_of_examples() -> None:
    weights = np.array([10.0, 1.0])
    panel = Panel({"arm": Outcome(values_SE=np.array([[10.0, 1.0], [20.0, 3.0]]))}, Examples.independent(weights))
    assert panel.by_model("arm").tolist() == [1.0, 23 / 11]
    assert panel.mean("arm").mean == pytest.approx((1.0 + 23 / 11) / 2)


def test_one_model_and_even_weights_agree_with_scipy() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(1.0, 1, 40), draw.normal(1.1, 1, 40)
    found = difference(Outcome(values_SE=a[None]), Outcome(values_SE=b[None]), np.ones(40))
    scipys = stats.ttest_rel(a, b)
    assert found.estimate.p == found.of_models.p == pytest.approx(scipys.pvalue, rel=1e-9)
    assert tuple(found.estimate.interval) == pytest.approx(tuple(scipys.confidence_interval()))
    assert found.lone == "one model"


def test_the_variance_of_a_ratio_is_the_jackknifes() -> None:
    draw = np.random.default_rng(3)
    weights = draw.lognormal(3, 1, 60)
    values = weights * draw.normal(2.0, 0.5, 60)
    without = np.array([np.delete(values, place).sum() / np.delete(weights, place).sum() for place in range(60)])
    jackknife = 59 / 60 * ((without - without.mean()) ** 2).sum()
    assert mean_of(values[None], Examples.independent(weights)).variance == pytest.approx(jackknife)


def test_a_ratio_has_the_degrees_of_its_effective_number_of_examples() -> None:
    weights = np.array([8.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = mean_of(np.array([[16.0, 3.0, 1.0, 2.0, 2.5, 1.5]]), Examples.independent(weights))
    assert found.degrees == pytest.approx(max(1.0, 13**2 / 69 - 1))


def test_where_examples_are_alike_the_models_alone_give_the_t_interval() -> None:
    by_seed = np.array([1.0, 1.3, 1.7])
    found = mean_of(np.repeat(by_seed[:, None], 50, axis=1), Examples.independent(np.ones(50)))
    assert tuple(found.interval) == pytest.approx(stats.t.interval(0.95, 2, by_seed.mean(), stats.sem(by_seed)))


def test_noise_of_a_model_on_an_example_counts_once() -> None:
    """The two-way layout of the textbooks: (MS of models + MS of examples - MS of both) / (S E)."""
    draw = np.random.default_rng(5)
    values = draw.normal(0, 1, (4, 1)) + draw.normal(2, 1, (1, 30)) + draw.normal(0, 0.7, (4, 30))
    whole, of_models, of_examples = values.mean(), values.mean(axis=1), values.mean(axis=0)
    ms_models = 30 * ((of_models - whole) ** 2).sum() / 3
    ms_examples = 4 * ((of_examples - whole) ** 2).sum() / 29
    ms_both = sum(
        (values[s, e] - of_models[s] - of_examples[e] + whole) ** 2 for s, e in product(range(4), range(30))
    ) / (3 * 29)
    found = mean_of(values, Examples.independent(np.ones(30)))
    assert found.variance == pytest.approx((ms_models + ms_examples - ms_both) / 120)
    # The last mean square has so many degrees that its own variance is left out.
    degrees = (ms_models + ms_examples - ms_both) ** 2 / (ms_models**2 / 3 + ms_examples**2 / 29)
    assert found.degrees == pytest.approx(degrees)


def test_arms_of_a_group_share_their_estimate_of_how_much_models_vary() -> None:
    """Three arms whose models differ by a constant on all examples: their mean squares are averaged."""
    spreads = (0.1, 0.5, 0.9)
    outcomes = [
        Outcome(values_SE=np.repeat(spread * np.array([[-1.0], [0.0], [1.0]]), 20, axis=1), group="g")
        for spread in spreads
    ]
    found = difference(outcomes[0], outcomes[1], np.ones(20), outcomes[2]).estimate
    assert found.variance == pytest.approx(np.mean([spread**2 for spread in spreads]) * 2 / 3)
    assert found.degrees == pytest.approx(6)


def test_examples_of_one_prompt_are_one() -> None:
    draw = np.random.default_rng(6)
    values, weights = draw.normal(2, 1, (2, 25)), draw.integers(1, 9, 25).astype(float)
    once = mean_of(values * weights, Examples.independent(weights))
    twice = Examples(
        weights_E=np.tile(weights, 2), clusters_E=np.tile(np.arange(25), 2), strata_E=np.zeros(50, np.int64)
    )
    found = mean_of(np.tile(values * weights, 2), twice)
    assert (found.variance, found.degrees) == pytest.approx((once.variance, once.degrees))


def test_a_difference_between_the_sources_is_no_variance() -> None:
    draw = np.random.default_rng(7)
    values, strata = draw.normal(0, 1, 30), np.array([0] * 10 + [1] * 20)
    examples = Examples(weights_E=np.ones(30), clusters_E=np.arange(30), strata_E=strata)
    found = mean_of((values + 100 * strata)[None], examples)
    sums = (10 * values[:10].var(ddof=1) + 20 * values[10:].var(ddof=1)) / 30**2
    assert found.variance == pytest.approx(sums)
    assert found.degrees == 28


def test_a_source_with_a_single_prompt_is_put_with_others() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    lone = Examples(weights_E=np.ones(4), clusters_E=np.arange(4), strata_E=np.array([0, 0, 0, 1]))
    assert mean_of(values[None], lone).variance == pytest.approx(values.var(ddof=1) / 4)


def simulated(
    draw: np.random.Generator, *, seeds: int, ratio: float, effect: float = 0.0, num_arms: int = 5
) -> tuple[Difference, float]:
    """Two arms of several, `effect` standard errors apart; `ratio` is the seeds' variance by that of the examples.

    Tokens are log-normal. Each example is harder for one arm than for the other, and each model has noise on it.
    """
    weights = np.exp(draw.normal(0, 1, 120)).round() + 1
    effective = weights.sum() ** 2 / (weights**2).sum()
    of_examples = 2 * (0.3**2 + 0.3**2 / seeds) / effective
    of_seed = math.sqrt(ratio * of_examples * seeds / 2)
    shift, difficulty = effect * math.sqrt(of_examples * (1 + ratio)), draw.normal(2, 1, 120)
    outcomes = []
    for place in range(num_arms):
        of_arm = difficulty + draw.normal(0, 0.3, 120) + (shift if place == 0 else 0.0)
        values = of_arm + draw.normal(0, of_seed, (seeds, 1)) + draw.normal(0, 0.3, (seeds, 120))
        outcomes.append(Outcome(values_SE=values * weights, group="one size and schedule"))
    return difference(outcomes[0], outcomes[1], weights, *outcomes[2:]), shift


@pytest.mark.slow
@pytest.mark.parametrize("num_arms", [2, 5])
@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("ratio", [1 / 3, 1, 3])
def test_an_interval_holds_the_truth_as_often_as_it_says(seeds: int, ratio: float, num_arms: int) -> None:
    """Of 2,000 intervals of 95 % about 1,900 hold the truth; 1.5 % is three standard errors."""
    draw, held, rejected, rounds = np.random.default_rng(11), 0, 0, 2000
    for _ in range(rounds):
        found, _ = simulated(draw, seeds=seeds, ratio=ratio, num_arms=num_arms)
        held += found.estimate.interval.low <= 0 <= found.estimate.interval.high
        rejected += found.estimate.p < 0.05
    assert 0.935 <= held / rounds <= 0.965
    assert rejected == rounds - held


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "least"), [(3, 0.70), (8, 0.76)])
def test_a_difference_of_2_8_standard_errors_is_found_as_often_as_the_docs_say(seeds: int, least: float) -> None:
    """With known variances 80 % of such differences would be found."""
    draw = np.random.default_rng(12)
    found = [simulated(draw, seeds=seeds, ratio=1, effect=2.8)[0].estimate.p < 0.05 for _ in range(1000)]
    assert least <= np.mean(found) <= 0.86


def test_the_docs_table_of_detectable_differences() -> None:
    """A difference of so many nats is found in four cases of five, by the noncentral t distribution."""
    text = (Path(__file__).parents[2] / "docs" / "comparisons.md").read_text()
    rows = re.findall(r"\| ([\d,]+) \| (\d) \| (0\.\d+) \| (0\.\d+) \|", text)
    assert len(rows) == 6
    for examples, models, *stated in rows:
        for of_model, difference in zip((0.005, 0.02), stated, strict=True):
            num, seeds = int(examples.replace(",", "")), int(models)
            over_examples, of_arm = 0.15**2 / num, of_model**2 / seeds
            total = over_examples + 2 * of_arm
            # Three arms share the estimate of the selection's models, random has its own.
            of_arms = of_arm**2 / (3 * (seeds - 1)) + of_arm**2 / (seeds - 1)
            degrees = total**2 / (over_examples**2 / (num - 1) + of_arms)
            limit = stats.t.ppf(0.975, degrees)
            power = stats.nct.sf(limit, degrees, float(difference) / math.sqrt(total))
            assert power == pytest.approx(0.8, abs=0.04)


def drawn_arm(draw: np.random.Generator, difficulty: Floats, num_draws: int, seeds: int, spread: float) -> Outcome:
    lucks = np.repeat(draw.normal(0, spread, num_draws), seeds)
    models = [difficulty + luck + draw.normal(0, 0.05) + draw.normal(0, 0.3, 100) for luck in lucks]
    sets = np.repeat(np.arange(num_draws), seeds).tolist()
    return Outcome(values_SE=np.stack(models), row_sets=sets, kind="draws", group="drawn")


def fixed_arm(draw: np.random.Generator, difficulty: Floats, luck: float = 0.0) -> Outcome:
    models = [difficulty + luck + draw.normal(0, 0.05) + draw.normal(0, 0.3, 100) for _ in range(4)]
    return Outcome(values_SE=np.stack(models), group="g")


@pytest.mark.slow
@pytest.mark.parametrize(("num_draws", "spread", "most"), [(8, 0.0, 0.065), (8, 0.1, 0.065), (3, 0.1, 0.08)])
def test_an_arm_as_good_as_the_draws_on_average_is_called_other_one_time_in_twenty(
    num_draws: int, spread: float, most: float
) -> None:
    """Beside an arm of matched draws that hardly vary, which tell nothing of these draws."""
    draw, rejected, rounds = np.random.default_rng(13), 0, 1000
    for _ in range(rounds):
        difficulty = draw.normal(2, 1, 100)
        drawn = drawn_arm(draw, difficulty, num_draws, 1, spread)
        matched = replace(drawn_arm(draw, difficulty, num_draws, 1, spread / 10), group="matched")
        fixed, other = fixed_arm(draw, difficulty), fixed_arm(draw, difficulty)
        rejected += difference(fixed, drawn, np.ones(100), matched, other).estimate.p < 0.05
    assert 0.03 <= rejected / rounds <= most


@pytest.mark.slow
def test_a_lucky_draw_seldom_beats_one_more_draw_and_often_the_average() -> None:
    draw, rounds, average, another = np.random.default_rng(14), 500, 0, 0
    for _ in range(rounds):
        difficulty = draw.normal(2, 1, 100)
        lucky = fixed_arm(draw, difficulty, draw.normal(0, 0.2))
        found = difference(lucky, drawn_arm(draw, difficulty, 8, 2, 0.2), np.ones(100), fixed_arm(draw, difficulty))
        average += found.estimate.p < 0.05
        assert found.another_draw is not None
        another += found.another_draw.p < 0.05
    assert average / rounds > 0.2
    assert 0.01 <= another / rounds <= 0.08


def test_one_more_draw_varies_as_the_draws_do_without_their_seeds() -> None:
    """By hand: all examples alike, draws of 1.0 and 2.0 and 4.0 on average, with seeds 0.1 to either side."""
    by_model = np.array([0.9, 1.1, 1.9, 2.1, 3.9, 4.1])
    drawn = Outcome(
        values_SE=np.repeat(by_model[:, None], 10, axis=1), row_sets=[0, 0, 1, 1, 2, 2], kind="draws", group="g"
    )
    fixed = Outcome(values_SE=np.repeat(np.array([[1.4], [1.6]]), 10, axis=1), group="g")
    found = difference(fixed, drawn, np.ones(10))
    between, within, own = np.var([1, 2, 4], ddof=1), 0.02, 0.02
    assert found.estimate.variance == pytest.approx(own / 2 + between / 3)
    assert found.another_draw is not None
    assert found.another_draw.variance == pytest.approx(own / 2 + between / 3 + between - within / 2)
    alone = Outcome(values_SE=drawn.values_SE[::2], row_sets=[0, 1, 2], kind="draws", group="g")
    assert difference(fixed, alone, np.ones(10)).another_draw is None


def test_an_arm_of_one_model_or_one_draw_is_not_tested_whatever_the_other_has() -> None:
    draw = np.random.default_rng(18)
    one, three = (Outcome(values_SE=draw.normal(2, 1, (num, 30)), group="g") for num in (1, 3))
    full = Outcome(values_SE=draw.normal(2, 1, (1, 30)), group="full")
    single_draw = Outcome(values_SE=draw.normal(2, 1, (3, 30)), row_sets=[0, 0, 0], kind="draws", group="d")
    draws = Outcome(values_SE=draw.normal(2, 1, (3, 30)), row_sets=[0, 1, 2], kind="draws", group="d2")
    panel = Panel(
        {"3": three, "full": full, "1 draw": single_draw, "3 draws": draws}, Examples.independent(np.ones(30))
    )
    found = {other: panel.difference("3", other).lone for other in ("full", "1 draw", "3 draws")}
    assert found == {"full": "one model", "1 draw": "one draw", "3 draws": None}
    assert difference(one, three, np.ones(30)).lone is None  # what three models of the group vary by, is known


def test_a_clear_difference_is_found_and_turns_its_sign_with_the_order() -> None:
    draw = np.random.default_rng(9)
    weights, difficulty = draw.integers(1, 30, 100).astype(float), draw.normal(2.0, 1.0, 100)
    good, bad = (
        Outcome(values_SE=(difficulty + mean + draw.normal(0, 0.05, (3, 1)) + draw.normal(0, 0.3, (3, 100))) * weights)
        for mean in (0.0, 1.0)
    )
    better, worse = difference(good, bad, weights).estimate, difference(bad, good, weights).estimate
    assert better.p < 0.01
    assert better.interval.high < 0 < worse.interval.low
    assert better.mean == pytest.approx(-worse.mean)
    assert better.p == pytest.approx(worse.p)


def test_equal_outcomes_have_no_difference_and_one_example_shows_nothing() -> None:
    values = np.random.default_rng(11).normal(2, 1, (1, 20))
    same = difference(Outcome(values_SE=values), Outcome(values_SE=values), np.ones(20)).estimate
    assert (same.mean, same.p, tuple(same.interval)) == (0.0, 1.0, (0.0, 0.0))
    single = difference(Outcome(values_SE=np.ones((1, 1))), Outcome(values_SE=np.zeros((1, 1))), np.ones(1)).estimate
    assert math.isnan(single.p)
    assert math.isnan(single.interval.low)


def test_no_p_value_is_zero() -> None:
    assert Estimate(mean=1e6, variance=1e-12, degrees=1e6).p > 0
    constant = difference(Outcome(values_SE=np.ones((1, 9))), Outcome(values_SE=np.zeros((1, 9))), np.ones(9))
    assert math.isnan(constant.estimate.p)  # no variance was seen: there is no test
    assert 0 < sign_flips(np.ones(500)) < 1e-100
    assert 2**-11 <= sign_flips(np.ones(12)) < 1.5 * 2**-11  # two assignments of 4,096
    weights = np.random.default_rng(1).integers(1, 60, 50).astype(float)
    constant = difference(Outcome(values_SE=0.1 * weights[None]), Outcome(values_SE=np.zeros((1, 50))), weights)
    assert math.isnan(constant.estimate.p)  # rounding errors are no variance


def test_two_one_sided_tests_agree_with_scipy() -> None:
    values = np.random.default_rng(15).normal(0.01, 0.1, 50)
    found = mean_of(values[None], Examples.independent(np.ones(50)))
    above = stats.ttest_1samp(values, -0.05, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.05, alternative="less").pvalue
    assert found.p_beyond(0.05) == pytest.approx(max(above, below))
    assert Estimate(mean=0.2, variance=0.01, degrees=9).p_beyond(0.05) > 0.5


def test_the_interval_of_independent_questions_is_that_of_jeffreys() -> None:
    answers = np.array([[1.0] * 12 + [0.0] * 28])
    examples = Examples.independent(np.ones(40))
    found = share_interval(mean_of(answers, examples), 40)
    # The variance has n - 1 in it: 39 independent questions have it.
    expected = stats.beta.ppf([0.025, 0.975], 0.3 * 39 + 0.5, 0.7 * 39 + 0.5)
    assert tuple(found) == pytest.approx(expected)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_all_answers_wrong_or_right_are_no_certainty(right: float) -> None:
    examples = Examples.independent(np.ones(40))
    found = share_interval(mean_of(np.full((3, 40), right), examples), examples.num_clusters)
    far = stats.beta.ppf(0.975, 0.5, 40.5)
    assert tuple(found) == pytest.approx((0, far) if right == 0 else (1 - far, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "questions"), [(0.01, 60), (0.05, 60), (0.5, 60), (0.05, 400)])
def test_the_interval_of_a_share_holds_it(share: float, questions: int) -> None:
    """Three models of different strength answer questions of different difficulty."""
    draw, held, width, rounds = np.random.default_rng(16), 0, 0.0, 1000
    truth = np.mean([_right(draw, share, questions).mean() for _ in range(4000)])
    for _ in range(rounds):
        panel = Panel(
            {"arm": Outcome(values_SE=_right(draw, share, questions))}, Examples.independent(np.ones(questions))
        )
        low, high = panel.share("arm")
        held, width = held + (low <= truth <= high), width + high - low
    assert held / rounds >= 0.93
    # Not half as wide again as if all that is known were one model's answers.
    assert width / rounds < 1.5 * 2 * 1.96 * math.sqrt((truth * (1 - truth) + 1 / questions) / questions)


def _right(draw: np.random.Generator, share: float, questions: int) -> Floats:
    logit = math.log(share / (1 - share)) + draw.normal(0, 1.0, (1, questions)) + draw.normal(0, 0.2, (3, 1))
    return (draw.random((3, questions)) < 1 / (1 + np.exp(-logit))).astype(float)


def test_sources_all_right_and_all_wrong_are_no_certainty() -> None:
    answers = np.array([[0.0] * 50 + [1.0] * 50])
    strata = np.repeat([0, 1], 50)
    examples = Examples(weights_E=np.ones(100), clusters_E=np.arange(100), strata_E=strata)
    low, high = Panel({"arm": Outcome(values_SE=answers)}, examples).share("arm")
    far = stats.beta.ppf(0.975, 0.5, 50.5)
    assert (low, high) == pytest.approx((0.5 - far / 2, 0.5 + far / 2))


def test_a_difference_of_shares_is_never_a_point() -> None:
    none = Outcome(values_SE=np.zeros((3, 40)))
    panel = Panel({"arm": none, "other": none}, Examples.independent(np.ones(40)))
    far = stats.beta.ppf(0.975, 0.5, 40.5)
    assert tuple(panel.difference_of_shares("arm", "other")) == pytest.approx((-far, far))


def test_random_signs_are_all_signs() -> None:
    differences = np.array([0.5, 1.0, -0.5, 0.25, 0.75, 1.0, -0.25, 0.0, 1.0, 0.5])
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
    assert sign_flips(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact / 9999))


def test_the_correlation_of_seeds() -> None:
    draw = np.random.default_rng(17)
    common = draw.normal(0, 1, 50)
    arms = [dict(enumerate((common + draw.normal(0, 1, 50)).tolist())) for _ in range(3)]
    matrix = np.cov(np.array([list(arm.values()) for arm in arms]))
    pairs = [matrix[0, 1], matrix[0, 2], matrix[1, 2]]
    assert seed_correlation(arms) == pytest.approx(np.mean(pairs) / np.mean(np.diag(matrix)))
    assert seed_correlation(arms[:1]) is None
    assert seed_correlation([dict.fromkeys(range(4), 1.0), dict.fromkeys(range(4), 2.0)]) is None


def test_an_interval_is_cut_to_what_is_possible() -> None:
    assert Interval(-0.1, 1.2).clipped(0, 1) == (0, 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_by_its_definition(p: list[float]) -> None:
    """The i-th smallest is multiplied by the number of those not smaller, and none falls below one before it."""
    order = sorted(range(len(p)), key=lambda i: (p[i], i))
    adjusted, least = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, p[i] * (len(p) - place)))
        adjusted[i] = least
    assert holm(p) == pytest.approx(adjusted)


def test_holm_leaves_tests_that_are_none_out() -> None:
    assert holm([0.01, math.nan, 0.04])[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([]) == []
