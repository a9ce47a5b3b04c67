"""The facts of preference training are those of its margins; its page holds them, and nothing that is not escaped."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from margin_facts import facts_of, manifests, margin_table
from outline import Outline
from run_facts import EVIL
from scipy import stats

from davir_ray.report.alignment import alignment_facts, render_alignment


def test_the_facts_are_those_of_the_margins() -> None:
    table = margin_table()
    facts = facts_of(table)
    frame = table.to_pandas()
    frame = frame[frame["status"] == "ok"]
    assert facts["books"] == {"read": 210, "rejected": 10, "pairs": 200, "trained": 160, "not_measured": 3}
    for name, part in (("trained", frame[~frame["held_out"]]), ("held_out", frame[frame["held_out"]])):
        told = facts["parts"][name]
        difference = part["num_chosen_tokens"] - part["num_rejected_tokens"]
        assert told["pairs"] == len(part)
        assert told["accuracy"] == pytest.approx((part["margin"] > 0).mean())
        low, high = told["accuracy_interval"]
        assert low < told["accuracy"] < high
        assert told["loss"] == pytest.approx(part["loss"].mean())
        assert told["length"]["pearson"] == pytest.approx(np.corrcoef(difference, part["margin"])[0, 1])
        low, high = told["length"]["pearson_interval"]
        z = np.arctanh(told["length"]["pearson"])
        half = stats.norm.ppf(0.975) / np.sqrt(len(part) - 3)
        assert [low, high] == pytest.approx([np.tanh(z - half), np.tanh(z + half)])
        assert told["length"]["spearman"] == pytest.approx(difference.corr(part["margin"], method="spearman"))


def test_a_run_without_held_out_pairs_has_no_such_part() -> None:
    table = margin_table()
    trained = table.filter(pc.invert(table["held_out"]))
    assert facts_of(trained)["parts"].keys() == {"trained"}


def test_margins_that_do_not_vary_have_no_correlation() -> None:
    table = margin_table()
    at = table.schema.get_field_index("margin")
    same = table.set_column(at, "margin", pa.array([0.0] * table.num_rows))
    told = facts_of(same)["parts"]["trained"]
    assert told["length"] == {"pearson": None, "pearson_interval": None, "spearman": None}
    assert told["accuracy"] == 0
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
