"""From the facts of a run (see summary.py) to one self-contained HTML page: no script, no font, nothing to load.

Everything from the data goes through Jinja's autoescaping; only charts.py, which draws numbers alone, is trusted as
markup.
"""

import json
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from davir_ray.report import charts

NOT_RECORDED = "not recorded"
NOT_DEFINED = "not defined"
MAX_TOKENS_SHOWN = 800
LONG_TEXT_CHARS = 600
MAX_SOURCES_SHOWN = 12
SHADE_STEPS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats; a token's shade counts the steps that its loss moved


def render_page(summary: dict[str, Any]) -> str:
    """Return the report as HTML; the same summary gives the same bytes."""
    return _environment().from_string(_template()).render(summary=summary, charts=_charts(summary))


def _template() -> str:
    return resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number,
        "decimal": decimal,
        "share": share,
        "duration": duration,
        "plain": plain,
        "shade": shade,
        "shown_tokens": lambda tokens: tokens[:MAX_TOKENS_SHOWN],
        "shown_sources": fold_sources,
        "is_long": lambda text: len(text or "") > LONG_TEXT_CHARS,
    }
    environment.globals["shade_steps"] = SHADE_STEPS
    return environment


def _charts(summary: dict[str, Any]) -> dict[str, Any]:
    deciles = summary["composition"]["length_deciles"]
    return {
        "training": charts.training_curve(summary["training"]) if summary["training"] else None,
        "histogram": charts.score_histogram(summary["davir"]) if summary["davir"]["all"]["n"] else None,
        "length": {p["measure"]: charts.length_panel(p) if p["n"] else None for p in summary["length"]},
        "deciles": charts.length_deciles(deciles) if deciles else None,
    }


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


def share(value: float | None) -> str:
    """A share of 1 in per cent."""
    return NOT_DEFINED if value is None else f"{100 * value:.1f} %"


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
        return value
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


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
