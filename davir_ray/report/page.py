"""From the facts of a run (see summary.py) to one self-contained HTML page: no script, no font, nothing to load.

Everything from the data goes through Jinja's autoescaping; only charts.py, which draws numbers alone, is trusted as
markup.
"""

import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from davir_ray.report import charts

NOT_RECORDED = "not recorded"
NOT_DEFINED = "not defined"
LONG_TEXT_CHARS = 600
MAX_SOURCES_SHOWN = 12
SHADE_STEPS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats; a token's shade counts the steps that its loss moved

# The page of the largest run stays small enough to be mailed: what is left out is in report.json.
MAX_TOKENS_SHOWN = 512
MAX_TEXT_CHARS = 3000
MAX_CARDS = 4
MAX_ROWS = 200


def render_page(summary: dict[str, Any]) -> str:
    """Return the report as HTML; the same summary gives the same bytes."""
    drawn = _charts(summary)
    template = environment().get_template("page.html.j2")
    return template.render(
        summary=summary, charts=drawn, sections=_sections(summary, drawn), tiles=_tiles(summary), bands=_bands(summary)
    )


@cache
def environment() -> Environment:
    """Of all pages: everything from the data is escaped, a name that is missing is an error."""
    loader = PackageLoader("davir_ray.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "decimal": decimal,
        "share": share,
        "duration": duration,
        "plain": plain,
        "shade": shade,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "short": lambda step: f"{step:g}".removeprefix("0"),
        "rank_name": rank_name,
        "cut": cut,
        "shown_tokens": lambda tokens: tokens[:MAX_TOKENS_SHOWN],
        "shown_sources": fold_sources,
        "is_long": lambda text: len(text or "") > LONG_TEXT_CHARS,
    }
    environment.globals |= {"shade_steps": SHADE_STEPS, "most_rows": MAX_ROWS}
    return environment


def _charts(summary: dict[str, Any]) -> dict[str, Any]:
    deciles = summary["composition"]["length_deciles"]
    has_scores = summary["davir"]["all"]["n"] > 0
    throughput = summary["throughput"]
    return {
        "training": charts.training_curve(summary["training"]) if summary["training"] else None,
        "throughput": charts.throughput(throughput) if throughput and throughput["rates"] else None,
        "histogram": charts.score_histogram(summary["davir"]) if has_scores else None,
        "losses": charts.loss_histogram(summary["losses"]) if has_scores else None,
        "length": {p["measure"]: charts.length_panel(p) if p["n"] else None for p in summary["length"]},
        "deciles": charts.length_deciles(deciles) if deciles else None,
    }


def _sections(summary: dict[str, Any], drawn: dict[str, Any]) -> list[tuple[str, str]]:
    """Ids and names of the sections that this run has, in the order of the page."""
    sections = [
        ("glance", "At a glance", True),
        ("scores", "Scores", True),
        ("losses", "Losses", drawn["losses"]),
        ("length", "Length", True),
        ("selection", "Selection", True),
        ("planted", "Planted truth", summary["planted"]),
        ("examples", "Examples", True),
        ("training", "Training", drawn["training"]),
        ("throughput", "Throughput", summary["throughput"]),
        ("rows", "Rows and rejects", True),
        ("limits", "Known limits", True),
        ("run", "Settings", True),
    ]
    return [(id, name) for id, name, there in sections if there]


def _tiles(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The four figures to look at first, each beside what it is to be compared with."""
    davir, per_token = summary["davir"], summary["losses"]["per_token"]
    medians = {part: {row["p"]: row["value"] for row in davir[part]["percentiles"]}[50] for part in ("all", "selected")}
    spearman = {panel["measure"]: panel["spearman"] for panel in summary["length"]}
    length = summary["composition"]["median_length"]
    return [
        _tile("Median DavIR selected", decimal(medians["selected"]), f"{decimal(medians['all'])} in the pool"),
        _tile(
            "Loss, nats per token",
            f"{decimal(per_token['base'], 2)} → {decimal(per_token['reference'], 2)}",
            "base → reference, all responses",
        ),
        _tile(
            "DavIR against length",
            decimal(spearman["davir"], 2),
            f"Spearman; RHO {decimal(spearman['rho_sum'], 2)}",
        ),
        _tile(
            "Median response selected",
            decimal(length["selected"], 0),
            f"tokens; {decimal(length['all'], 0)} in the pool",
        ),
    ]


def _tile(name: str, value: str, beside: str) -> dict[str, str]:
    return {"name": name, "value": value, "beside": beside}


def _bands(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Examples of the best, middle and worst ranks, each once: cards where tokens were kept, else a list."""
    shown: set[str] = set()
    bands = []
    for title, place, rows in (
        ("Best ranked", "best", summary["top"]),
        ("In the middle", "middle", summary["middle"]),
        ("Worst ranked", "worst", summary["bottom"]),
    ):
        new = [row for row in rows if row["example_id"] not in shown]
        kept = [row for row in summary["with_tokens"].get(place, []) if row["example_id"] not in shown]
        cards = (kept or [row for row in new if row["tokens"]] or new)[:MAX_CARDS]
        shown |= {row["example_id"] for row in cards}
        others = [row for row in new if row["example_id"] not in shown]
        shown |= {row["example_id"] for row in others}
        bands.append({"title": title, "cards": cards, "others": others})
    return bands


def number(value: int | float | None) -> str:
    """A count with thousands separators."""
    return NOT_RECORDED if value is None else f"{value:,.0f}".replace("-", "−")


def decimal(value: float | None, places: int = 3) -> str:
    """A measured value; far from 0 the decimals would be noise."""
    if value is None:
        return NOT_DEFINED
    size = abs(value)
    written = f"{value:.3g}" if size >= 1e9 else f"{value:,.{places if size < 1000 else 0}f}"
    return written.replace("-", "−")


def share(value: float | None, places: int = 1) -> str:
    """A share of 1 in per cent."""
    return NOT_DEFINED if value is None else f"{100 * value:.{places}f} %"


def rank_name(row: dict[str, Any]) -> str:
    """What an example is called by its rank."""
    return "Not ranked" if row["rank"] is None else f"Rank {row['rank']:,}"


def cut(text: str) -> str:
    """A text, or its start where it is too long for a page."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]}… ({len(text) - MAX_TEXT_CHARS:,} more characters)"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def plain(value: Any) -> str:
    """A setting, version or fingerprint as text."""
    if isinstance(value, str):
        return cut(value)
    return "none" if value is None else cut(json.dumps(value, ensure_ascii=False))


def shade(token: dict[str, Any]) -> str:
    """CSS class of a token: g1 to g5 where the reference lowered its loss, w1 to w5 where it raised it."""
    if token["base"] is None or token["reference"] is None:
        return ""
    gain = token["base"] - token["reference"]
    level = sum(abs(gain) >= step for step in SHADE_STEPS)
    return f"{'g' if gain > 0 else 'w'}{level}" if level else ""


def fold_sources(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest sources, the rest added up in one row."""
    if len(sources) <= MAX_SOURCES_SHOWN + 1:
        return sources
    shown, rest = sources[:MAX_SOURCES_SHOWN], sources[MAX_SOURCES_SHOWN:]
    folded: dict[str, Any] = {"name": f"{len(rest):,} other sources", "rows": sum(row["rows"] for row in rest)}
    for name in ("share_of_all", "share_of_selected"):
        known = [row[name] for row in rest if row[name] is not None]
        folded[name] = sum(known) if known else None
    return [*shown, folded]
