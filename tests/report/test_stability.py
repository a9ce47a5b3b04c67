"""What the page says of stability: measured over several references, mostly noise, or not measured."""

import re
from dataclasses import replace
from typing import Any

import pytest
from run_facts import report_inputs, stability_manifest

from davir_ray.report import ReportInputs, render_page, summarise


def inputs_with(overlap: float | None, *options: Any, **changed: Any) -> ReportInputs:
    """A run with repeats."""
    inputs = report_inputs()
    measured = stability_manifest(overlap, *options, **changed)
    return replace(inputs, manifests={**inputs.manifests, "stability": measured})


def page_and_findings(inputs: ReportInputs) -> tuple[str, list[tuple[bool, str]]]:
    facts = summarise(inputs)
    page = " ".join(render_page(facts).split())
    section = re.search(r'<section id="stability">.*?</section>', page)
    assert section is not None
    told = ("tability", "overlap", "every reference")
    found = [(row["look"], row["text"]) for row in facts["findings"] if any(word in row["text"] for word in told)]
    return section[0], found


def test_with_one_reference_it_says_what_to_do() -> None:
    section, findings = page_and_findings(report_inputs())
    told = "Stability: not measured (one reference); score again with another seed and rank with --rank.repeats."
    assert findings == [(False, told)]
    assert told in section


@pytest.mark.parametrize(("overlap", "look"), [(0.29, True), (0.31, False), (-0.02, True)])
def test_a_small_overlap_is_called_noise(overlap: float, look: bool) -> None:
    section, [finding] = page_and_findings(inputs_with(overlap))
    assert finding[0] is look
    assert finding[1].startswith("The selection is mostly noise: " if look else "The selections of two references")
    assert f"overlap by {overlap:.2f} beyond chance".replace("-", "−") in finding[1]
    assert "50 % of the selected rows are among the best of every reference" in finding[1]
    for shown in ("3 references", "best 40 of 1,000", "2 and 3", "3 of 3 runs", "50.0 %", "0.125", "33.3 %", "0.960"):
        assert shown in section
    assert "jackknife over the references" in section
    assert "runs/&lt;2&gt;" in section


def test_an_interval_over_rows_says_what_it_leaves_out() -> None:
    section, _ = page_and_findings(inputs_with(0.5, "rows", 2))
    assert "it does not include how much references vary, which two do not show" in section
    section, _ = page_and_findings(inputs_with(0.5, "rows"))
    assert "which these, which all overlap alike, do not show" in section


def test_where_every_row_is_selected_there_is_no_overlap() -> None:
    section, findings = page_and_findings(inputs_with(None, place_sd=None))
    assert findings == [
        (False, "50 % of the selected rows are among the best of every reference; every row is selected.")
    ]
    assert "beyond chance" not in findings[0][1]
    assert "No row was scored by two references." in section
