"""The page: everything escaped, nothing loaded, the same bytes each time, every count shown."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pytest

from davir_ray import schema
from davir_ray.report import ReportInputs, render_page, summarise
from davir_ray.report.page import decimal, duration, fold_sources, number, shade, share

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "br", "link", "hr", "img", "input"}


class Outline(HTMLParser):
    """Elements, attributes, ids and text of a page; `unclosed` is empty where every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.unclosed: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def scores_table(sources: list[str]) -> pa.Table:
    """Forty scored rows, the four best selected, their sources taken in turn."""
    rows = [
        {
            "example_id": 2**60 + i,
            "content_hash": i,
            "source": sources[i % len(sources)],
            "num_prompt_tokens": 5,
            "num_response_tokens": 1 + i * i % 97,
            "truncated": False,
            "base_nll": 50.0,
            "reference_nll": 50.0 - i,
            "davir": i / 50,
            "rho_sum": float(i),
            "rho_mean": i / (1 + i * i % 97),
            "status": "ok",
            "selected": i >= 36,
        }
        for i in range(40)
    ]
    fields = [field for field in schema.SCORES if not field.name.endswith("token_nll")]
    return pa.Table.from_pylist(rows, schema=pa.schema([*fields, pa.field("selected", pa.bool_())]))


def example(**fields: Any) -> dict[str, Any]:
    """One ranked example of three tokens."""
    losses = {"davir": 0.5, "rho_sum": 3.0, "rho_mean": 1.0, "base_nll": 6.0, "reference_nll": 3.0}
    tokens = {"base_token_nll": [3.0, 2.0, 1.0], "reference_token_nll": [0.5, 2.5, 0.0], "tokens": ["Yes", ".", "</s>"]}
    texts = {"source": "alpaca", "prompt": "Say yes.", "response": "Yes."}
    return {"rank": 1, "example_id": 2**62, "num_response_tokens": 3} | losses | tokens | texts | fields


def manifest(counts: dict[str, int], **details: Any) -> dict[str, Any]:
    """A stage's manifest with the given counts."""
    facts = {"fingerprint": {"weights": "sha256:abc"}, "versions": {"python": "3.11"}, "seconds": 12.5, "files": [{}]}
    return {"counts": counts, "details": details, **facts}


def report_inputs(**fields: Any) -> ReportInputs:
    """A run whose books balance: two rejects, one example without a score."""
    reject = {"source": "alpaca", "source_file": "a.jsonl", "source_row": 7, "reason": "empty_response", "detail": "''"}
    inputs = ReportInputs(
        config={"base": "tiny-base", "reference": None, "rank": {"order": "davir"}, "select": {"top_fraction": 0.1}},
        manifests={
            "prepare": manifest({"read": 43, "prepared": 41, "rejected": 2, "empty_response": 2}),
            "finetune": manifest({"steps": 4}, loss_by_step=[[1, 4.0], [2, 3.5], [3, 3.2], [4, 3.0]]),
            "score": manifest({"scored": 40, "ok": 40, "zero_base_nll": 1}),
            "rank": manifest({"ranked": 40}),
            "select": manifest({"selected": 4}),
        },
        scores=scores_table(["alpaca", "gsm8k"]),
        num_scored=40,
        top=[example()],
        bottom=[example(rank=40, tokens=None)],
        rejects=pa.Table.from_pylist([reject], schema=schema.REJECTS),
    )
    return replace(inputs, **fields)


def evil_inputs() -> ReportInputs:
    """Markup in every text that comes from outside."""
    texts = {"source": EVIL, "prompt": EVIL * 50, "response": EVIL, "tokens": [EVIL, ".", EVIL]}
    reject = {"source": EVIL, "source_file": EVIL, "source_row": 1, "reason": EVIL, "detail": EVIL}
    details = manifest({EVIL: 1}) | {name: {EVIL: {EVIL: EVIL}} for name in ("details", "fingerprint", "versions")}
    planted_class = {"name": EVIL, "share_of_all": 1, "share_of_selected": 1, "share_of_random": 1, "mean_davir": 0}
    return report_inputs(
        config={EVIL: EVIL, "base": EVIL, "reference": EVIL, "rank": {"order": EVIL}, "sources": [{"name": EVIL}]},
        manifests=report_inputs().manifests | {EVIL: details},
        scores=scores_table([EVIL]),
        top=[example(**texts)],
        bottom=[example(**(texts | {"tokens": None}))],
        rejects=pa.Table.from_pylist([reject], schema=schema.REJECTS),
        planted={"classes": [planted_class], "note": EVIL},
    )


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
        "the first 10 %",
        "empty_response",
        "zero_base_nll",
        "a.jsonl",
    ):
        assert shown in text
    assert "select.top_fraction" in text
    assert "sha256:abc" in text
    assert "does not balance" in text


def test_charts_take_the_pages_colours_and_have_a_label(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        assert re.search(r'role="img" aria-label="[^"]+"', chart)
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id="|url\(#|href="#)[^")]+', "", chart))
        assert "var(--" in chart


def test_a_token_is_shaded_by_how_far_its_loss_moved(page: str) -> None:
    assert [shade({"base": 3.0, "reference": r}) for r in (3.05, 2.85, 2.5, -1.0)] == ["", "g1", "g2", "g5"]
    assert [shade({"base": 1.0, "reference": r}) for r in (1.2, 2.0, 9.0)] == ["w1", "w3", "w5"]
    assert shade({"base": None, "reference": 1.0}) == ""
    assert '<span class="g4" title="base 3.00, reference 0.50 nats">Yes</span>' in page


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
