"""The page: everything escaped, nothing loaded, the same bytes each time, every count shown."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from outline import Outline
from run_facts import evil_inputs, example, manifest, report_inputs

from davir_ray.report import render_page, summarise
from davir_ray.report.charts import step_curve
from davir_ray.report.page import decimal, duration, fold_sources, number, shade, share


@pytest.fixture(scope="module")
def page() -> str:
    """The page of an ordinary run."""
    return render_page(summarise(report_inputs()))


def test_markup_in_the_data_is_shown_as_text() -> None:
    outline = Outline(render_page(summarise(evil_inputs())))
    assert "script" not in outline.tags
    assert outline.unclosed == []
    # Base, reference, order, settings, source table, reject, examples, tokens, planted, manifest: each at least once.
    assert outline.text.count("<script>alert(1)</script>") > 30
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert not [value for _, value in outline.attributes if value and "alert" in value]


def test_every_element_is_closed(page: str) -> None:
    assert Outline(page).unclosed == []


def test_the_page_loads_nothing(page: str) -> None:
    outline = Outline(page)
    assert not {"script", "link", "iframe", "img", "object", "embed", "audio", "video"} & set(outline.tags)
    assert set(re.findall(r"https?://[^/\"'\s<)]+", page)) == {"https://arxiv.org"}
    assert "default-src 'none'" in page  # the browser holds to it too
    assert not re.search(r"@import|@font-face|url\((?!#)", page)
    assert not [value for name, value in outline.attributes if name in ("src", "srcset", "action")]


def test_links_and_references_lead_to_ids_of_the_page_and_ids_are_unique(page: str) -> None:
    attributes = Outline(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    inside = {value[1:] for name, value in attributes if name in ("href", "xlink:href") and value and value[0] == "#"}
    assert inside | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_the_same_inputs_give_the_same_bytes(page: str) -> None:
    assert render_page(summarise(report_inputs())) == page


def test_the_page_can_be_made_from_the_json_file(page: str) -> None:
    assert render_page(json.loads(json.dumps(summarise(report_inputs())))) == page


def test_counts_names_and_settings_are_shown() -> None:
    inputs = report_inputs()
    counts = {"read": 1_234_567, "prepared": 1_234_560, "rejected": 7, "empty_response": 7}
    inputs.manifests["prepare"] = inputs.manifests["prepare"] | {"counts": counts}
    text = Outline(render_page(summarise(inputs))).text
    for shown in (
        "1,234,567",
        "1,234,560",
        "tiny-base",
        "The first 10 %",
        "empty_response",
        "zero_base_nll",
        "a.jsonl",
    ):
        assert shown in text
    assert "select.top_fraction" in text
    assert "sha256:abc" in text
    assert "does not reconcile" in text


def test_charts_take_the_pages_colours_and_have_a_label(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) == 8
    for chart in charts:
        assert re.search(r'role="img" aria-label="[^"]+"', chart)
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id="|url\(#|href="#)[^")]+', "", chart))
        assert "var(--" in chart


def test_a_token_is_shaded_by_how_far_its_loss_moved(page: str) -> None:
    assert [shade({"base": 3.0, "reference": r}) for r in (3.05, 2.85, 2.5, -1.0)] == ["", "g1", "g2", "g5"]
    assert [shade({"base": 1.0, "reference": r}) for r in (1.2, 2.0, 9.0)] == ["w1", "w3", "w5"]
    assert shade({"base": None, "reference": 1.0}) == ""
    assert '<span class="g4" title="3.00 → 0.50 nats">Yes</span>' in page


def test_a_sample_is_said_to_be_one(page: str) -> None:
    sampled = render_page(summarise(report_inputs(num_scored=10**9)))
    assert "40 of 1,000,000,000 rows" in sampled
    assert "uniform sample" not in page


def test_an_outside_reference_and_no_training_are_said() -> None:
    inputs = report_inputs(config={"base": "b", "reference": "outside/model"})
    del inputs.manifests["finetune"]
    text = Outline(render_page(summarise(inputs))).text
    assert "outside/model" in text
    assert "did not train its reference" in text
    assert "Training the reference" not in text


def test_numbers_are_written_for_people() -> None:
    assert [number(1234567), number(None)] == ["1,234,567", "not recorded"]
    assert [decimal(-0.1234), decimal(12345.6), decimal(-1e300)] == ["−0.123", "12,346", "−1e+300"]
    assert decimal(None) == "not defined"
    assert [share(0.0625), share(None)] == ["6.2 %", "not defined"]
    assert [duration(1.25), duration(61), duration(7260), duration(None)] == [
        "1.2 s",
        "1 min 1 s",
        "2 h 1 min",
        "not recorded",
    ]


def test_many_sources_are_folded_without_losing_a_share() -> None:
    sources: list[dict[str, Any]] = [
        {"name": f"s{i}", "rows": 1, "share_of_all": 0.01, "share_of_selected": 0.01} for i in range(100)
    ]
    folded = fold_sources(sources)
    assert len(folded) == 13
    assert folded[-1]["name"] == "88 other sources"
    assert sum(row["share_of_all"] for row in folded) == pytest.approx(1)
    assert sum(row["rows"] for row in folded) == 100


def test_headings_go_down_one_level_at_a_time(page: str) -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_navigation_names_every_section_in_order(page: str) -> None:
    navigation = page[page.index("<nav") : page.index("</nav>")]
    linked = re.findall(r'<li><a href="#(\w+)">', navigation)
    assert linked == re.findall(r'<section id="(\w+)">', page)
    assert {"scores", "losses", "length", "selection", "examples", "training", "throughput", "rows"} <= set(linked)


def test_throughput_is_left_out_where_none_is_recorded() -> None:
    inputs = report_inputs()
    inputs.manifests["score"] = manifest({"scored": 40, "ok": 40, "zero_base_nll": 1})
    outline = Outline(render_page(summarise(inputs)))
    assert "Throughput" not in outline.text
    assert ("id", "throughput") not in outline.attributes


def test_one_point_of_throughput_gives_figures_and_no_chart() -> None:
    inputs = report_inputs()
    inputs.manifests["score"]["details"]["throughput"] = {"seconds": [20.0], "tokens": [5000]}
    page = render_page(summarise(inputs))
    assert "250 tokens per second" in page
    assert page.count("<svg") == 7


def test_a_training_of_one_step_is_a_mark_in_its_chart() -> None:
    marks = [
        re.findall(r'<g clip-path="[^"]+">\s*<use', step_curve(c, "", "", "")) for c in ([[1, 0.7]], [[1, 0.7], [2, 1]])
    ]
    assert [len(found) for found in marks] == [1, 0]


def test_each_example_is_shown_once_and_those_with_tokens_are_unfolded() -> None:
    plain = [example(rank=rank, example_id=rank, tokens=None) for rank in range(1, 21)]
    kept = [example(rank=rank, example_id=rank) for rank in (3, 8, 30)]
    inputs = report_inputs(top=plain, middle=[], bottom=plain[-5:], with_tokens={"best": kept, "worst": kept})
    page = render_page(summarise(inputs))
    assert re.findall(r"<h4>Rank (\d+)</h4>", page) == ["3", "8", "30"]
    listed = [int(rank) for rank in re.findall(r"<summary><span>Rank (\d+)</span>", page)]
    assert listed == [rank for rank in range(1, 21) if rank not in (3, 8)]


def test_a_page_of_long_examples_and_many_groups_stays_small() -> None:
    length = 1000
    losses = {"base_token_nll": [3.25] * length, "reference_token_nll": [0.5] * length, "tokens": [" word"] * length}
    rows = [example(example_id=i, prompt="a word " * 9000, response="b " * 20_000, **losses) for i in range(72)]
    with_tokens = {"best": rows[60:64], "middle": rows[64:68], "worst": rows[68:]}
    inputs = report_inputs(top=rows[:20], middle=rows[20:40], bottom=rows[40:60], with_tokens=with_tokens)
    inputs.config["sources"] = [{"name": f"source {i}", "path": "s3://bucket/" + 80 * "x"} for i in range(5000)]
    inputs.manifests["select"]["details"]["groups"] = [
        {"group": f"group {i}", "eligible": 9, "selected": 3, "tokens": 99} for i in range(5000)
    ]
    inputs.manifests["rank"]["details"]["rows_by_bin"] = [200_000] * 5000
    page = render_page(summarise(inputs))
    assert len(page.encode()) < 2_000_000
    assert "And 4,800 more, in report.json." in page
    assert page.count(" … 488 more tokens</pre>") == 12
    assert "(60,000 more characters)" in page
