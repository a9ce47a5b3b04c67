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

from davir_ray.report.alignment import Trained, alignment_facts, render_alignment, sweep_table


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
        low, high = found["length"]["pearson_interval"]
        z = np.arctanh(found["length"]["pearson"])
        half = stats.norm.ppf(0.975) / np.sqrt(len(part) - 3)
        assert [low, high] == pytest.approx([np.tanh(z - half), np.tanh(z + half)])
        assert found["length"]["spearman"] == pytest.approx(difference.corr(part["margin"], method="spearman"))


def test_a_run_without_held_out_pairs_has_no_such_part() -> None:
    table = margin_table()
    trained = table.filter(pc.invert(table["held_out"]))
    assert facts_of(trained)["parts"].keys() == {"trained"}


def test_margins_that_do_not_vary_have_no_correlation() -> None:
    table = margin_table()
    at = table.schema.get_field_index("margin")
    same = table.set_column(at, "margin", pa.array([0.0] * table.num_rows))
    found = facts_of(same)["parts"]["trained"]
    assert found["length"] == {"pearson": None, "pearson_interval": None, "spearman": None}
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
    details = {"loss": loss, "beta": beta or 0.1}
    return Trained(place=f"runs/{loss}-{seed}", fingerprint=fingerprint, details=details, parts=parts)


def test_a_setting_is_a_row_with_the_mean_and_students_interval_over_its_seeds() -> None:
    found = sweep_table([trained(0, 0.5), trained(0, 0.9, "ipo"), trained(1, 0.6), trained(2, 0.4)])
    assert [(row["loss"], row["seeds"], row["paper"]) for row in found] == [
        ("dpo", [0, 1, 2], 0.38),
        ("ipo", [0], -0.1),
    ]
    assert found[0]["places"] == ["runs/dpo-0", "runs/dpo-1", "runs/dpo-2"]
    measures = found[0]["parts"]["trained"]
    interval = stats.ttest_1samp([0.5, 0.6, 0.4], 0).confidence_interval(0.95)
    assert measures["accuracy"] == {
        "mean": pytest.approx(0.5),
        "interval": pytest.approx([interval.low, interval.high]),
    }
    assert measures["margin"] == {
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


def test_held_out_pairs_are_reported_where_every_seed_has_them() -> None:
    both, one = sweep_table([trained(0, held_out=part(0.1)), trained(1, held_out=part(0.3)), trained(0, loss="ipo")])
    assert both["parts"]["held_out"]["accuracy"]["mean"] == pytest.approx(0.2)
    assert one["parts"].keys() == {"trained"}


def test_the_page_has_the_table_where_there_are_others() -> None:
    facts = facts_of(margin_table())
    assert "Compared with other trainings" not in render_alignment(facts)
    others = sweep_table([trained(0, 0.51, held_out=part(0.4)), trained(1, 0.53)])
    page = render_alignment({**facts, "sweep": others})
    low, high = 52 - (half := 100 * stats.t.ppf(0.975, 1) * np.std([0.51, 0.53], ddof=1) / np.sqrt(2)), 52 + half
    assert f"52.0<br><small>{low:.1f} to {high:.1f}</small>" in page
    assert "Compared with other trainings" in page
    assert not Outline(page).unclosed
