"""The report in a real browser: it loads nothing, complains of nothing, fits its window, can be read in both schemes.

Markup in the data stays text: nothing of it runs.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from comparison_facts import comparison_inputs, trial_names
from devtools import Tab, browse
from margin_facts import facts_of, margin_table
from run_facts import evil_inputs, example, manifest, report_inputs

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import SelectConfig
from davir_ray.pipeline import run_all
from davir_ray.report import ReportInputs, render_page, summarise
from davir_ray.report.alignment import render_alignment
from davir_ray.report.comparison import summarise_comparison
from davir_ray.report.comparison_page import render_comparison

PLANTED = "<script>document.title='run by a script'</script><img src=x onerror=\"document.title='run by an image'\">"

SIZES = [1280, 390]
SCHEMES = ["light", "dark"]

LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text of any size
LEAST_CHART_TEXT = 10  # CSS pixels, on a phone

UNFOLD = "document.querySelectorAll('details').forEach(one => { one.open = true })"

TOO_WIDE = """
[...document.querySelectorAll('main *, nav')]
  .filter(one => !one.closest('.scroll, svg') && one.getBoundingClientRect().right > innerWidth + 1)
  .map(one => one.outerHTML.slice(0, 120))
"""

# Each run of text in sight with the contrast of its computed colour to the backgrounds behind it, laid over each other.
CONTRASTS = """
(() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a] };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
  const ground = one => {
    const under = one.parentElement ? ground(one.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(one).backgroundColor), under);
  };
  const luminance = colour => {
    const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const one = node.parentElement, style = getComputedStyle(one);
    if (!node.data.trim() || !one.getClientRects().length) continue;
    const under = ground(one), colour = one.closest('svg') ? style.fill : style.color;
    const [low, high] = [luminance(over(parse(colour), under)), luminance(under)].sort((a, b) => a - b);
    found.push({ text: node.data.trim().slice(0, 60), contrast: (high + 0.05) / (low + 0.05) });
  }
  return found;
})()
"""

CHART_TEXT = """
[...document.querySelectorAll('svg.chart')].flatMap(chart => {
  const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
  return [...chart.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize) * scale);
})
"""

NAVIGATION = """
[...document.querySelectorAll('nav li a')].map(link => {
  link.click();
  const target = document.getElementById(link.hash.slice(1));
  const nav = document.querySelector('nav').getBoundingClientRect();
  return {
    to: link.hash, there: target !== null && target.querySelector('h2') !== null,
    top: target && target.getBoundingClientRect().top, at_end: innerHeight + scrollY >= document.body.scrollHeight - 2,
    nav_in_sight: nav.top >= -1 && nav.bottom > 20 && nav.left >= -1,
    hidden: nav.width > innerWidth / 2 && target.querySelector('h2').getBoundingClientRect().top < nav.bottom,
  };
})
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browse(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def full_inputs() -> ReportInputs:
    """A run with every section, with names and texts that no line can hold, and every shade of a token."""
    inputs = report_inputs()
    steps = [-5.0, -3.0, -1.5, -0.7, -0.2, 0.0, 0.2, 0.7, 1.5, 3.0, 5.0]
    losses = {
        "base_token_nll": [10.0] * len(steps),
        "reference_token_nll": [10.0 - step for step in steps],
        "tokens": [f" token{i}" for i in range(len(steps))],
    }
    long = {"source": "source_" + 90 * "x", "prompt": "p" * 300, "response": "r" * 900}
    kept = [example(example_id=i, rank=i, **losses, **long) for i in range(12)]
    inputs.manifests["select"]["details"]["groups"] = [
        {"group": "g" * 120, "eligible": 10**9, "selected": 10**9, "tokens": 10**12}
    ]
    inputs.manifests["prepare"] |= manifest({"read": 10**9, "prepared": 10**9 - 2, "rejected": 2, "empty_response": 2})
    classes = [{"name": "class_" + 60 * "y", "share_of_all": 1, "share_of_selected": 1, "share_of_random": 1}]
    full = {
        "middle": [example(example_id=100, rank=20, **long)],
        "with_tokens": {"best": kept[:4], "middle": kept[4:8], "worst": kept[8:]},
        "planted": {"classes": [row | {"mean_davir": 0.5} for row in classes], "note": "A note."},
        "config": inputs.config | {"base": "s3://bucket/" + 150 * "z", "output": "o" * 200},
    }
    return ReportInputs(**{**inputs.__dict__, **full})


PAGES: dict[str, ReportInputs] = {
    "full": full_inputs(),
    "markup everywhere": evil_inputs(),
    "nothing": report_inputs(manifests={}, config={}, scores=report_inputs().scores.slice(0, 0), top=[], bottom=[]),
}


def render(inputs: ReportInputs) -> str:
    return render_page(summarise(inputs))


RENDERED: dict[str, Callable[[], str]] = {
    **{name: partial(render, inputs) for name, inputs in PAGES.items()},
    "alignment": lambda: render_alignment(facts_of(margin_table(), "davir_dpo", base="s3://bucket/" + 150 * "z")),
    "comparison": lambda: render_comparison(summarise_comparison(comparison_inputs(run="s3://bucket/" + 150 * "z"))[0]),
    "curve": lambda: render_comparison(summarise_comparison(comparison_inputs(trial_names((1000, 3000, 10_000))))[0]),
}
"""The pages of every job."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages as files."""
    folder = tmp_path_factory.mktemp("pages")
    for name, make in RENDERED.items():
        (folder / f"{name}.html").write_text(make())
    return {name: folder / f"{name}.html" for name in RENDERED}


def flaws(tab: Tab, page: Path, width: int, scheme: str) -> dict[str, Any]:
    """What is wrong with the page with everything unfolded: by kind, empty where nothing is."""
    tab.open(page, width, scheme)
    tab.run(UNFOLD)
    contrasts = tab.run(CONTRASTS)
    found = {
        "complaints": tab.complaints(),
        "requests": [url for url in tab.requests() if url != page.as_uri()],
        "too wide": tab.run(TOO_WIDE),
        "sideways": max(0, tab.run("document.documentElement.scrollWidth") - width),
        "too faint": [one for one in contrasts if one["contrast"] < LEAST_CONTRAST],
        "small text in charts": [size for size in tab.run(CHART_TEXT) if size < LEAST_CHART_TEXT],
        "no text": not contrasts,
    }
    return {kind: flaw for kind, flaw in found.items() if flaw}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name", RENDERED)
def test_the_page_is_quiet_fits_and_can_be_read(
    tab: Tab, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    assert flaws(tab, pages[name], width, scheme) == {}


def test_each_flaw_would_be_found(tab: Tab, tmp_path: Path) -> None:
    """What the test above relies on."""
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><main>"
        "<p style='width: 3000px; color: #999; background: #fff'>Faint and wide.</p>"
        "<svg class=chart viewBox='0 0 100 10' width=50><text y=9 font-size=12 fill=black>1</text></svg>"
        "<img src='http://127.0.0.1:9/nothing.png'></main><script>console.error('a complaint')</script>"
    )
    for width in SIZES:
        found = flaws(tab, page, width, "light")
        assert found.keys() == {
            "complaints", "requests", "too wide", "sideways", "too faint", "small text in charts"
        }  # fmt: skip
        assert [one["text"] for one in found["too faint"]] == ["Faint and wide."]


@pytest.mark.parametrize("width", SIZES)
def test_every_link_of_the_navigation_leads_to_its_section_and_the_navigation_stays_in_sight(
    tab: Tab, pages: dict[str, Path], width: int
) -> None:
    tab.open(pages["full"], width, "light")
    links = tab.run(NAVIGATION)
    assert len(links) == 13
    for link in links:
        assert link["there"], link
        assert link["nav_in_sight"], link
        assert not link["hidden"], link
        assert -2 <= link["top"] < 100 or link["at_end"], link


def test_the_schemes_differ(tab: Tab, pages: dict[str, Path]) -> None:
    grounds = []
    for scheme in SCHEMES:
        tab.open(pages["full"], 1280, scheme)
        colour = tab.run("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) / 3)
    light, dark = grounds
    assert light > 230
    assert dark < 40


def title_and_page(tab: Tab, page: Path) -> tuple[str, str]:
    """The title and the whole document after scripts had time to run."""
    tab.open(page, 1280, "light")
    title = tab.run("new Promise(done => setTimeout(() => done(document.title), 500))")
    return title, tab.run("document.documentElement.outerHTML")


def test_a_script_in_a_page_would_run(tab: Tab, tmp_path: Path) -> None:
    """What the next test relies on."""
    (tmp_path / "page.html").write_text(f"<!doctype html><title>Page</title><body>{PLANTED}</body>")
    title, _ = title_and_page(tab, tmp_path / "page.html")
    assert title.startswith("run by")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_script_in_the_data_does_not(tab: Tab, base_folder: Path, reference_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{row} {PLANTED}", "response": f"{PLANTED} {row}"} for row in range(20)]
    name = "rows<img src=x onerror=alert(1)>.jsonl"
    (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows) + f"\n{PLANTED}")
    config = RunConfig(
        output=str(tmp_path / "run"),
        base=str(base_folder),
        reference=str(reference_folder),
        data=str(tmp_path / name),
        format="prompt_response",
        max_bad_fraction=0.5,
        prepare=PrepareConfig(max_tokens=256),
        score=ScoreConfig(num_actors=1),
        select=SelectConfig(top_k=5),
    )
    run_all(config)
    report = tmp_path / "run" / "report.html"
    title, page = title_and_page(tab, report)
    assert not title.startswith("run by")
    assert "davir" in title.lower()
    assert page.count("&lt;script&gt;document.title") >= 5
    assert "<script" not in page
    assert "<img" not in page
    for width in SIZES:
        assert flaws(tab, report, width, "dark") == {}
    facts = json.loads((tmp_path / "run" / "report.json").read_text())
    shown = facts["with_tokens"]
    assert [row["rank"] for row in shown["best"] + shown["worst"]] == [1, 2, 3, 4, 17, 18, 19, 20]
    for row in shown["best"] + shown["middle"] + shown["worst"]:
        assert "".join(token["text"] for token in row["tokens"]) == f"{row['response']}</s>"
        assert sum(token["base"] for token in row["tokens"]) == pytest.approx(row["base_nll"], rel=1e-6)
    assert [row["detail"] != "" for reason in facts["rejects"] for row in reason["rows"]] == [True]
