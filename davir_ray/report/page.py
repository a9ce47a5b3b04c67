"""The HTML page of a run, rendered from its facts: self-contained, without scripts, fonts or anything else to load.

All text from the data goes through Jinja's autoescaping. Only charts.py, which draws numbers alone, returns markup.
"""

import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from davir_ray.config.selection import NOT_MEASURED
from davir_ray.report import charts

NOT_RECORDED = "not recorded"
NOT_DEFINED = "not defined"
LONG_TEXT_CHARS = 600
MAX_SOURCES_SHOWN = 12
SHADE_STEPS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Nats: the shade of a token is the number of these that the change of its loss reaches."""

# These limits keep the page of the largest run small enough to e-mail; report.json has everything.
MAX_TOKENS_SHOWN = 512
MAX_TEXT_CHARS = 3000
MAX_CARDS = 4
MAX_ROWS = 200


def render_page(facts: dict[str, Any]) -> str:
    """Return the page as HTML; the same facts give the same bytes."""
    drawn = _charts(facts)
    template = environment().get_template("run.html.j2")
    return template.render(
        facts=facts, charts=drawn, sections=_sections(facts, drawn), tiles=_tiles(facts), bands=_bands(facts)
    )


@cache
def environment() -> Environment:
    """The Jinja environment of all pages: it escapes text from the data, and an undefined name is an error."""
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
        "shortened": shortened,
        "shown_tokens": lambda tokens: tokens[:MAX_TOKENS_SHOWN],
        "shown_sources": fold_sources,
        "is_long": lambda text: len(text or "") > LONG_TEXT_CHARS,
    }
    environment.globals |= {"shade_steps": SHADE_STEPS, "max_rows": MAX_ROWS, "stability_not_measured": NOT_MEASURED}
    return environment


def _charts(facts: dict[str, Any]) -> dict[str, Any]:
    deciles = facts["composition"]["length_deciles"]
    has_scores = facts["davir"]["all"]["n"] > 0
    throughput = facts["throughput"]
    return {
        "training": charts.training_curve(facts["training"]) if facts["training"] else None,
        "throughput": charts.throughput(throughput) if throughput and throughput["rates"] else None,
        "histogram": charts.score_histogram(facts["davir"]) if has_scores else None,
        "losses": charts.loss_histogram(facts["losses"]) if has_scores else None,
        "length": {p["measure"]: charts.length_panel(p) if p["n"] else None for p in facts["length"]},
        "deciles": charts.length_deciles(deciles) if deciles else None,
    }


def _sections(facts: dict[str, Any], drawn: dict[str, Any]) -> list[tuple[str, str]]:
    """Ids and names of the sections of this run's page, in order."""
    sections = {
        "glance": "At a glance",
        "scores": "Scores",
        "losses": "Losses" if drawn["losses"] else None,
        "length": "Length",
        "selection": "Selection",
        "stability": "Stability",
        "planted": "Planted truth" if facts["planted"] else None,
        "examples": "Examples",
        "sources": "Data" if facts["sources"] else None,
        "training": "Training" if drawn["training"] else None,
        "throughput": "Throughput" if facts["throughput"] else None,
        "rows": "Rows and rejects",
        "limits": "Known limits",
        "run": "Settings",
    }
    return [(id, name) for id, name in sections.items() if name]


def _tiles(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The four numbers to look at first, each with something to compare it with."""
    davir, per_token = facts["davir"], facts["losses"]["per_token"]
    medians = {part: {row["p"]: row["value"] for row in davir[part]["percentiles"]}[50] for part in ("all", "selected")}
    spearman = {panel["measure"]: panel["spearman"] for panel in facts["length"]}
    chosen, pool = (facts["composition"]["median_length"][part] for part in ("selected", "all"))
    base, reference = decimal(per_token["base"], 2), decimal(per_token["reference"], 2)
    values = [
        ("Median DavIR selected", decimal(medians["selected"]), f"{decimal(medians['all'])} in the pool"),
        ("Loss, nats per token", f"{base} → {reference}", "base → reference, all responses"),
        ("DavIR and length", decimal(spearman["davir"], 2), f"Spearman; RHO {decimal(spearman['rho_sum'], 2)}"),
        ("Median response selected", decimal(chosen, 0), f"tokens; {decimal(pool, 0)} in the pool"),
    ]
    return [{"name": name, "value": value, "context": context} for name, value, context in values]


def _bands(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Examples of the best, middle and worst ranks, each once: as cards if token losses were kept, else in a list."""
    shown: set[str] = set()
    bands = []
    for title, place, rows in (
        ("Best ranked", "best", facts["top"]),
        ("In the middle", "middle", facts["middle"]),
        ("Worst ranked", "worst", facts["bottom"]),
    ):
        new = [row for row in rows if row["example_id"] not in shown]
        kept = [row for row in facts["with_tokens"].get(place, []) if row["example_id"] not in shown]
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
    """A measured value; large ones are written without decimals, which would be noise."""
    if value is None:
        return NOT_DEFINED
    size = abs(value)
    written = f"{value:.3g}" if size >= 1e9 else f"{value:,.{places if size < 1000 else 0}f}"
    return written.replace("-", "−")


def p_value(p: float | None) -> str:
    """A p-value as text; the exact value is not meaningful below 0.001."""
    if p is None:
        return NOT_DEFINED
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def share(value: float | None, places: int = 1) -> str:
    """A fraction of 1 as a percentage."""
    return NOT_DEFINED if value is None else f"{100 * value:.{places}f} %"


def rank_name(row: dict[str, Any]) -> str:
    """The title of an example: its rank."""
    return "Not ranked" if row["rank"] is None else f"Rank {row['rank']:,}"


def shortened(text: str) -> str:
    """A text, cut after its beginning if it is too long for a page."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]}… ({len(text) - MAX_TEXT_CHARS:,} more characters)"


def duration(seconds: float | None) -> str:
    """A time in seconds, in the one or two units that suit its size."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def plain(value: Any) -> str:
    """A setting, version or fingerprint as text."""
    if isinstance(value, str):
        return shortened(value)
    return "none" if value is None else shortened(json.dumps(value, ensure_ascii=False))


def shade(token: dict[str, Any]) -> str:
    """CSS class of a token: g1 to g5 where the reference lowered its loss, w1 to w5 where it raised it."""
    if token["base"] is None or token["reference"] is None:
        return ""
    gain = token["base"] - token["reference"]
    level = sum(abs(gain) >= step for step in SHADE_STEPS)
    return f"{'g' if gain > 0 else 'w'}{level}" if level else ""


def fold_sources(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest sources, and one row with the sums of the others."""
    if len(sources) <= MAX_SOURCES_SHOWN + 1:
        return sources
    shown, rest = sources[:MAX_SOURCES_SHOWN], sources[MAX_SOURCES_SHOWN:]
    folded: dict[str, Any] = {"name": f"{len(rest):,} other sources", "rows": sum(row["rows"] for row in rest)}
    for name in ("share_of_all", "share_of_selected"):
        known = [row[name] for row in rest if row[name] is not None]
        folded[name] = sum(known) if known else None
    return [*shown, folded]
