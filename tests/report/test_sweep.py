"""Trainings side by side: seeds of one setting are one row, and nothing counts twice."""

from typing import Any

import numpy as np
import pytest
from margin_facts import facts_of, margin_table
from outline import Outline
from scipy import stats

from davir_ray.report.alignment import render_alignment
from davir_ray.report.sweep import Trained, sweep_table


def part(accuracy: float, pearson: float | None = 0.2) -> dict[str, Any]:
    length = {"pearson": pearson, "spearman": 0.1}
    return {"accuracy": accuracy, "margin": 3 * accuracy, "length": length, "length_of_gains": {"pearson": 0.3}}


def trained(
    seed: int = 0,
    accuracy: float = 0.5,
    loss: str = "dpo",
    *,
    rate: float = 1e-6,
    frozen: str = "f",
    beta: float | None = None,
    **parts: Any,
) -> Trained:
    fingerprint = {
        "base": "b",
        "examples": "e",
        "frozen": frozen,
        "objective": {"loss": loss, "beta": beta},
        "recipe": {"seed": seed, "learning_rate": rate},
    }
    parts = {"trained": part(accuracy), **parts}
    return Trained(f"runs/{loss}-{seed}", fingerprint, {"loss": loss, "beta": beta or 0.1}, parts)


def test_a_setting_is_a_row_with_the_mean_and_students_interval_over_its_seeds() -> None:
    found = sweep_table([trained(0, 0.5), trained(0, 0.9, "ipo"), trained(1, 0.6), trained(2, 0.4)])
    assert [(row["loss"], row["seeds"], row["paper"]) for row in found] == [
        ("dpo", [0, 1, 2], 0.38),
        ("ipo", [0], -0.1),
    ]
    assert found[0]["places"] == ["runs/dpo-0", "runs/dpo-1", "runs/dpo-2"]
    told = found[0]["parts"]["trained"]
    interval = stats.ttest_1samp([0.5, 0.6, 0.4], 0).confidence_interval(0.95)
    assert told["accuracy"] == {"mean": pytest.approx(0.5), "interval": pytest.approx([interval.low, interval.high])}
    assert told["margin"] == {
        "mean": pytest.approx(1.5),
        "interval": pytest.approx([3 * interval.low, 3 * interval.high]),
    }
    assert found[1]["parts"]["trained"]["accuracy"] == {"mean": pytest.approx(0.9), "interval": None}


def test_an_interval_stays_where_the_figure_can_be() -> None:
    (row,) = sweep_table([trained(0, 1.0), trained(1, 0.9)])
    assert row["parts"]["trained"]["accuracy"]["interval"][1] == 1.0
    assert row["parts"]["trained"]["margin"]["interval"][1] > 3.0


def test_one_training_found_twice_is_no_second_seed() -> None:
    """Copied, or done again on a machine whose frozen losses have other last bits."""
    (row,) = sweep_table([trained(0, 0.5), trained(0, 0.5), trained(0, 0.5, frozen="other bits"), trained(1, 0.7)])
    assert row["seeds"] == [0, 1]
    assert row["parts"]["trained"]["accuracy"]["mean"] == pytest.approx(0.6)


def test_a_default_beta_is_the_number_that_it_stands_for() -> None:
    (row,) = sweep_table([trained(0, 0.5), trained(1, 0.7, beta=0.1), trained(0, 0.5, beta=0.1)])
    assert row["seeds"] == [0, 1]
    usual, larger = sweep_table([trained(0), trained(0, beta=0.2)])
    assert (usual["beta"], larger["beta"]) == (0.1, 0.2)


def test_another_setting_is_another_row_and_says_what_differs() -> None:
    first, second = sweep_table([trained(0), trained(1, rate=2e-4)])
    assert first["differs"] == []
    assert second["differs"] == ["recipe.learning_rate: 1e-06 → 0.0002"]


def test_a_figure_that_a_seed_does_not_have_has_no_mean() -> None:
    (row,) = sweep_table([trained(0), trained(1, trained=part(0.5, pearson=None))])
    assert row["parts"]["trained"]["pearson"] == {"mean": None, "interval": None}
    assert row["parts"]["trained"]["spearman"]["mean"] == pytest.approx(0.1)


def test_held_out_pairs_are_told_where_every_seed_has_them() -> None:
    both, one = sweep_table([trained(0, held_out=part(0.1)), trained(1, held_out=part(0.3)), trained(0, loss="ipo")])
    assert both["parts"]["held_out"]["accuracy"]["mean"] == pytest.approx(0.2)
    assert one["parts"].keys() == {"trained"}


def test_the_page_has_the_table_where_there_are_others() -> None:
    facts = facts_of(margin_table())
    assert "Beside other trainings" not in render_alignment(facts)
    others = sweep_table([trained(0, 0.51, held_out=part(0.4)), trained(1, 0.53)])
    page = render_alignment({**facts, "sweep": others})
    low, high = 52 - (half := 100 * stats.t.ppf(0.975, 1) * np.std([0.51, 0.53], ddof=1) / np.sqrt(2)), 52 + half
    assert f"52.0<br><small>{low:.1f} to {high:.1f}</small>" in page
    assert "Beside other trainings" in page
    assert not Outline(page).unclosed
