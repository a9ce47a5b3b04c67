"""The report of preference training: facts equal to the margins', an escaped page, and a sweep that counts once.

In a sweep the seeds of one setting are one row, and no training counts twice.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from margin_facts import facts_of, manifests, margin_table
from outline import Outline
from run_facts import EVIL
from scipy import stats

from davir_ray.formulas.clusters import Clusters, Estimate, compare_shares, mean
from davir_ray.report.alignment import Trained, alignment_facts, measured_pairs, render_alignment, sweep_table


def test_the_facts_are_those_of_the_margins() -> None:
    table = margin_table()
    facts = facts_of(table)
    frame = table.to_pandas()
    frame = frame[frame["status"] == "ok"]
    assert facts["books"] == {
        "read": 210,
        "left_out": 0,
        "rejected": 10,
        "pairs": 200,
        "trained": 160,
        "not_measured": 3,
    }
    for name, part in (("trained", frame[~frame["held_out"]]), ("held_out", frame[frame["held_out"]])):
        found = facts["parts"][name]
        difference = part["num_chosen_tokens"] - part["num_rejected_tokens"]
        assert found["pairs"] == len(part)
        assert found["accuracy"] == pytest.approx((part["margin"] > 0).mean())
        low, high = found["accuracy_interval"]
        assert low < found["accuracy"] < high
        assert found["loss"] == pytest.approx(part["loss"].mean())
        assert found["length"]["pearson"] == pytest.approx(np.corrcoef(difference, part["margin"])[0, 1])
        assert found["length"]["spearman"] == pytest.approx(difference.corr(part["margin"], method="spearman"))
        gain = part["policy_chosen"] - part["frozen_chosen"] - part["policy_rejected"] + part["frozen_rejected"]
        assert found["length_of_gains"]["pearson"] == pytest.approx(np.corrcoef(difference, gain)[0, 1])
        assert found["prompts"] == part["prompt_hash"].nunique() < len(part)
        members = list(part.reset_index().groupby("prompt_hash").indices.values())
        values = np.column_stack([difference, part["margin"]])

        def z(drawn: Any, values: Any = values, members: Any = members) -> float:
            return float(np.arctanh(np.corrcoef(values[np.concatenate([members[one] for one in drawn])].T)[0, 1]))

        drawn = stats.bootstrap((range(len(members)),), z, vectorized=False, n_resamples=1000, method="basic", rng=0)
        low, high = np.arctanh(found["length"]["pearson_interval"])
        assert high - low == pytest.approx(2 * stats.t.ppf(0.975, len(members) - 1) * drawn.standard_error, rel=0.15)
        low, high = found["length"]["spearman_interval"]
        assert low < found["length"]["spearman"] < high


def test_pairs_that_repeat_their_prompts_have_wider_intervals() -> None:
    """Each pair stands four times, so there is no more to learn from it than from one."""
    table = margin_table(count=100, unknown=0)
    at = table.schema.get_field_index("prompt_hash")
    alone = table.set_column(at, "prompt_hash", table["pair_id"])
    repeated = pa.concat_tables([alone] * 4)
    once, often = (facts_of(one)["parts"]["trained"] for one in (alone, repeated))
    assert (once["prompts"], often["prompts"], often["pairs"]) == (80, 80, 320)
    assert often["accuracy_interval"] == pytest.approx(once["accuracy_interval"], abs=0.01)
    for name in ("pearson_interval", "spearman_interval"):
        assert often["length"][name] == pytest.approx(once["length"][name], abs=0.01)


def test_an_accuracy_of_all_pairs_has_an_interval_that_is_no_point() -> None:
    table = margin_table(shift=100.0)
    found = facts_of(table)["parts"]["held_out"]
    assert found["accuracy"] == 1
    low, high = found["accuracy_interval"]
    # A score interval whose upper end is 1, for as many independent pairs as there are prompts.
    critical = stats.t.ppf(0.975, 19)
    assert (low, high) == (pytest.approx(20 / (20 + critical**2), abs=0.01), 1)


def test_a_run_without_held_out_pairs_has_no_such_part() -> None:
    table = margin_table()
    trained = table.filter(pc.invert(table["held_out"]))
    assert facts_of(trained)["parts"].keys() == {"trained"}


def test_margins_that_do_not_vary_have_no_correlation() -> None:
    table = margin_table()
    at = table.schema.get_field_index("margin")
    same = table.set_column(at, "margin", pa.array([0.0] * table.num_rows))
    found = facts_of(same)["parts"]["trained"]
    assert set(found["length"].values()) == {None}
    assert found["accuracy"] == 0
    assert "not defined" in render_alignment(facts_of(same))


@pytest.mark.parametrize(
    ("loss", "paper"), [("dpo", "0.38"), ("ipo", "−0.10"), ("davir_dpo", "0.07"), ("dpo_norm", "–")]
)
def test_the_page_has_the_papers_figure_beside_ours(loss: str, paper: str) -> None:
    page = render_alignment(facts_of(margin_table(), loss))
    assert f"<td>{paper}</td>" in page
    assert "0.38 for DPO" in page


def test_a_sample_says_so() -> None:
    table = margin_table()
    facts = alignment_facts(table, 10**9, manifests(), {})
    page = render_alignment(facts)
    assert "200 of 1,000,000,000 pairs" in page
    assert "A policy trained on 160 preference pairs" in page


def test_the_page_loads_nothing_and_escapes_what_it_shows() -> None:
    page = render_alignment(facts_of(margin_table(), base=EVIL))
    assert EVIL not in page
    outline = Outline(page)
    assert not outline.unclosed
    assert not {"script", "img", "link", "iframe"} & set(outline.tags)
    assert not [value for name, value in outline.attributes if name in ("src", "srcset", "onload", "onerror")]


# --- a sweep ---------------------------------------------------------------------------------------------------------


def trained(
    seed: int = 0,
    loss: str = "dpo",
    *,
    table: pa.Table | None = None,
    shift: float = 0.0,
    rate: float = 1e-6,
    frozen: str = "f",
    beta: float | None = None,
) -> Trained:
    fingerprint = {
        "base": "b",
        "examples": "e",
        "frozen": frozen,
        "objective": {"loss": loss, "beta": beta},
        "recipe": {"seed": seed, "learning_rate": rate},
    }
    if table is None:
        table = margin_table(seed=seed + 100 * (loss != "dpo"), shift=shift)
    details = {"loss": loss, "beta": beta or 0.1}
    return Trained(place=f"runs/{loss}-{seed}", fingerprint=fingerprint, details=details, pairs=measured_pairs(table))


def accuracies(one: Trained, *, held_out: bool) -> float:
    frame = one.pairs.to_pandas()
    return float((frame["margin"][frame["held_out"] == held_out] > 0).mean())


def test_a_setting_is_a_row_with_the_means_over_its_seeds() -> None:
    policies = [trained(0), trained(0, "ipo"), trained(1), trained(2)]
    found = sweep_table(policies)
    assert [(row["loss"], row["seeds"], row["paper"]) for row in found] == [
        ("dpo", [0, 1, 2], 0.38),
        ("ipo", [0], -0.1),
    ]
    assert found[0]["places"] == ["runs/dpo-0", "runs/dpo-1", "runs/dpo-2"]
    for part, held_out in (("trained", False), ("held_out", True)):
        assert found[0]["parts"][part]["prompts"] == (19 if held_out else 80)
        measures = found[0]["parts"][part]["measures"]
        values = [accuracies(one, held_out=held_out) for one in policies if one.details["loss"] == "dpo"]
        assert measures["accuracy"]["mean"] == pytest.approx(np.mean(values))
        frames = [one.pairs.to_pandas() for one in policies if one.details["loss"] == "dpo"]
        z = [
            np.arctanh(stats.pearsonr(one["difference"], one["margin"]).statistic)
            for one in (frame[frame["held_out"] == held_out] for frame in frames)
        ]
        assert measures["pearson"]["mean"] == pytest.approx(np.tanh(np.mean(z)))
        low, high = measures["pearson"]["interval"]
        assert low < measures["pearson"]["mean"] < high
        assert measures["accuracy"]["interval"][0] < measures["accuracy"]["mean"] < measures["accuracy"]["interval"][1]


def test_more_seeds_do_not_take_away_the_chance_of_the_pairs() -> None:
    """Policies that are all alike have the interval of one."""
    table = margin_table()
    (one,) = sweep_table([trained(0, table=table)])
    (many,) = sweep_table([trained(seed, table=table) for seed in range(8)])
    assert len(many["seeds"]) == 8
    for name in ("margin", "pearson", "spearman", "plain"):
        expected = one["parts"]["trained"]["measures"][name]["interval"]
        assert many["parts"]["trained"]["measures"][name]["interval"] == pytest.approx(expected)


def test_seeds_that_differ_greatly_widen_the_interval_to_students_over_them() -> None:
    shifts = [-30.0, 0.0, 30.0]
    (row,) = sweep_table([trained(seed, shift=shift) for seed, shift in enumerate(shifts)])
    measures = row["parts"]["trained"]["measures"]
    means = [
        trained(seed, shift=shift).pairs.to_pandas().query("~held_out")["margin"].mean()
        for seed, shift in enumerate(shifts)
    ]
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert measures["margin"]["interval"] == pytest.approx(list(expected), rel=1e-2)
    assert measures["accuracy"]["interval"] == pytest.approx([0, 1], abs=0.15)


def test_one_training_found_twice_is_no_second_seed() -> None:
    """Copied, or done again on a machine whose frozen losses have other last bits."""
    policies = [trained(0), trained(0), trained(0, frozen="other bits"), trained(1)]
    (row,) = sweep_table(policies)
    assert row["seeds"] == [0, 1]
    values = [accuracies(policies[at], held_out=False) for at in (0, 3)]
    assert row["parts"]["trained"]["measures"]["accuracy"]["mean"] == pytest.approx(np.mean(values))


def test_a_default_beta_is_the_number_that_it_stands_for() -> None:
    (row,) = sweep_table([trained(0), trained(1, beta=0.1), trained(0, beta=0.1)])
    assert row["seeds"] == [0, 1]
    usual, larger = sweep_table([trained(0), trained(0, beta=0.2)])
    assert (usual["beta"], larger["beta"]) == (0.1, 0.2)


def test_another_setting_is_another_row_and_says_what_differs() -> None:
    first, second = sweep_table([trained(0), trained(1, rate=2e-4)])
    assert first["differs"] == []
    assert second["differs"] == ["recipe.learning_rate: 1e-06 → 0.0002"]


def test_a_figure_that_a_seed_does_not_have_has_no_mean_and_no_test() -> None:
    flat = margin_table()
    same = flat.set_column(flat.schema.get_field_index("margin"), "margin", pa.array([1.0] * flat.num_rows))
    row, other = sweep_table([trained(0), trained(1, table=same), trained(0, "ipo")])
    measures = row["parts"]["trained"]["measures"]
    assert measures["pearson"] == measures["spearman"] == {"mean": None, "interval": None}
    assert measures["plain"]["mean"] is not None
    assert other["against"]["trained"]["measures"].keys() == {"accuracy", "plain"}
    facts = {**facts_of(flat), "sweep": [row, other]}
    assert "not defined" in render_alignment(facts)


def test_settings_are_compared_on_the_pairs_that_all_have_measured() -> None:
    table = margin_table(unknown=40, seed=5)
    first, other = sweep_table([trained(0), trained(1), trained(0, "ipo", table=table)])
    assert (first["parts"]["trained"]["pairs"], other["parts"]["trained"]["pairs"]) == (159, 128)
    found = other["against"]["trained"]
    assert (found["pairs"], found["prompts"], found["over_seeds"]) == (128, 64, False)
    frames = [
        one.to_pandas().query("status == 'ok' and not held_out").set_index("pair_id")
        for one in (margin_table(seed=0), margin_table(seed=1), table)
    ]
    common = frames[2].index
    right = [(frame.loc[common]["margin"] > 0).astype(float).to_numpy() for frame in frames]
    clusters = Clusters.of(frames[2]["prompt_hash"].to_numpy())
    estimates = [Estimate.of([mean(one, clusters) for one in some]) for some in (right[2:], right[:2])]
    expected = compare_shares(*estimates, clusters)
    test = found["measures"]["accuracy"]
    assert test["difference"] == pytest.approx(right[2].mean() - (right[0].mean() + right[1].mean()) / 2)
    assert test["interval"] == pytest.approx(list(expected.interval or ()))
    assert test["p"] == pytest.approx(expected.p)


def test_settings_without_a_common_pair_are_not_compared() -> None:
    table = margin_table()
    halves = [table.filter(pc.less(table["pair_id"], 100)), table.filter(pc.greater_equal(table["pair_id"], 100))]
    rows = sweep_table([trained(0, table=halves[0]), trained(0, "ipo", table=halves[1])])
    assert rows[1]["against"] == {}
    page = render_alignment({**facts_of(table), "sweep": rows})
    assert "no pair is measured in both" in page
    assert not Outline(page).unclosed


def test_a_setting_is_called_higher_or_lower_only_by_the_corrected_test() -> None:
    policies = [
        trained(seed, loss, shift=shift)
        for loss, shift in (("dpo", 0.0), ("ipo", 1.5), ("dpo_norm", 0.0))
        for seed in range(3)
    ]
    first, higher, same = sweep_table(policies)
    assert first["against"] == {}
    tests = [test for row in (higher, same) for part in row["against"].values() for test in part["measures"].values()]
    assert len(tests) == 16
    ordered = sorted(tests, key=lambda test: test["p"])
    corrected, largest = [], 0.0
    for at, test in enumerate(ordered):
        largest = max(largest, min(1.0, (16 - at) * test["p"]))
        corrected.append(largest)
    assert [test["p_holm"] for test in ordered] == pytest.approx(corrected)
    assert higher["against"]["trained"]["measures"]["accuracy"]["verdict"] == "higher"
    assert same["against"]["trained"]["measures"]["accuracy"]["verdict"] == "no difference shown"
    for test in tests:
        expected = "no difference shown" if test["p_holm"] >= 0.05 else "higher" if test["difference"] > 0 else "lower"
        assert test["verdict"] == expected
    _, lower = sweep_table([*policies[3:6], *policies[:3]])
    assert lower["against"]["trained"]["measures"]["accuracy"]["verdict"] == "lower"


def test_the_page_has_the_tables_where_there_are_others() -> None:
    facts = facts_of(margin_table())
    assert "Compared with other trainings" not in render_alignment(facts)
    rows = sweep_table([*(trained(seed) for seed in range(4)), trained(0, "ipo", shift=1.5)])
    page = render_alignment({**facts, "sweep": rows})
    assert "Compared with other trainings" in page
    accuracy = rows[0]["parts"]["trained"]["measures"]["accuracy"]
    low, high = (100 * end for end in accuracy["interval"])
    assert f"{100 * accuracy['mean']:.1f}<br><small>{low:.1f} to {high:.1f}</small>" in page
    assert "<td>4</td>" in page
    assert "<td>1<br><small>this policy alone</small></td>" in page
    test = rows[1]["against"]["trained"]["measures"]["accuracy"]
    low, high = (100 * end for end in test["interval"])
    shown = f"{100 * test['difference']:.1f}<br><small>{low:.1f} to {high:.1f}<br>p &lt; 0.001</small><br>higher"
    assert shown in page
    assert "no difference shown" in page
    assert "its policy counts as fixed" in page
    assert not Outline(page).unclosed
