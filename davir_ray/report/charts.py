"""The charts of the pages as inline SVG, drawn from the facts: the same facts give the same bytes.

No text from the data enters a chart. Colours are placeholders that become CSS variables of the page, so that one SVG
serves both light and dark mode. A chart is drawn about as wide as the page shows it, so that its text keeps its size.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

INK, MUTED, LINE, POOL, CHOSEN = "#010101", "#020202", "#030303", "#040404", "#050505"
BASE, REFERENCE = "#060606", "#070707"
_CSS_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    POOL: "var(--pool)",
    CHOSEN: "var(--chosen)",
    BASE: "var(--base)",
    REFERENCE: "var(--reference)",
}
_STYLE: Any = {  # matplotlib's stubs require literal types for the keys
    "svg.fonttype": "none",  # keep text as text: it uses the page's font and can be searched and read aloud
    "svg.hashsalt": "davir_ray",
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.linewidth": 1,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 1,
}
WIDE, TALL, NARROW = (380, 250), (380, 295), (315, 265)
"""Sizes in pixels: a desktop page shows two WIDE or TALL charts in a row, or three NARROW ones."""
_TIME_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_HUGE = 1e7
"""Ticks from this value on are written as powers of ten: their digits would not fit."""


def training_curve(training: dict[str, Any]) -> Markup:
    """Training loss by step."""
    label = f"Training loss goes from {training['first']:.2f} to {training['last']:.2f} nats per token."
    return step_curve(training["loss_by_step"], "loss, nats per token", "training", label)


def step_curve(curve: list[list[float]], unit: str, name: str, label: str) -> Markup:
    """A value measured at every step, with a moving mean if there are many steps."""
    with _figure(WIDE) as (figure, axes):
        steps, values = np.array(curve, dtype=float).T
        many = steps.size > 40
        mark = "o" if steps.size == 1 else None  # a line through a single point would be invisible
        axes.plot(steps, values, color=POOL if many else CHOSEN, linewidth=1 if many else 1.8, marker=mark)
        if many:
            half = steps.size // 40  # the window of the mean is a twentieth of the curve, and shorter at its ends
            mean = [values[max(0, at - half) : at + half + 1].mean() for at in range(steps.size)]
            axes.plot(steps, mean, color=CHOSEN, linewidth=1.8)
        axes.set(xlabel="optimiser step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _svg(figure, name, label)


def margin_band(band: list[dict[str, float]]) -> Markup:
    """Median and 10th to 90th percentile of the margin against the difference in length."""
    with _figure(WIDE) as (figure, axes):
        at = [point["difference"] for point in band]
        axes.fill_between(at, [p["p10"] for p in band], [p["p90"] for p in band], color=POOL, alpha=0.35, linewidth=0)
        axes.plot(at, [point["p50"] for point in band], color=CHOSEN, linewidth=2.2)
        axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlabel="chosen minus rejected, response tokens", ylabel="margin")
        label = "Margin against the difference in length: median, 10th to 90th percentile."
        return _svg(figure, "margin-length", label)


def score_histogram(davir: dict[str, Any]) -> Markup:
    """Histogram of DavIR over the pool, the selected part in front, with the cut; above it the percentiles of both."""
    with _figure_with_strip() as (figure, strip, axes):
        histogram = davir["histogram"]
        edges = np.array(histogram["edges"])
        for name, colour in (("all", POOL), ("selected", CHOSEN)):
            axes.bar(edges[:-1], histogram[name], np.diff(edges) * 0.86, align="edge", color=colour)
        axes.set_xlabel("DavIR, share of the base loss removed")
        _finish_histogram(axes, edges, max(histogram["all"]))
        _draw_percentiles(strip, [(davir["all"], POOL), (davir["selected"], CHOSEN)])
        if davir["cut"] is not None and edges[0] <= davir["cut"] <= edges[-1]:
            _draw_cut(axes, davir["cut"], to_the_left=davir["cut"] > (edges[0] + edges[-1]) / 2)
        label = "Histogram of DavIR over all scored examples, the selected part highlighted, percentiles of both above."
        return _svg(figure, "histogram", label)


def loss_histogram(losses: dict[str, Any]) -> Markup:
    """Histograms of the mean loss of a response under both models, and above them the percentiles of both."""
    with _figure_with_strip() as (figure, strip, axes):
        histogram = losses["histogram"]
        edges = np.array(histogram["edges"])
        for name, colour in (("base", BASE), ("reference", REFERENCE)):
            axes.stairs(histogram[name], edges, fill=True, color=colour, alpha=0.18)
            axes.stairs(histogram[name], edges, color=colour, linewidth=1.8)
        axes.set_xlabel("mean loss of a response, nats per token")
        _finish_histogram(axes, edges, max(*histogram["base"], *histogram["reference"]))
        _draw_percentiles(strip, [(losses["base"]["all"], BASE), (losses["reference"]["all"], REFERENCE)])
        label = "Histograms of the loss per token under the base and under the reference, percentiles of both above."
        return _svg(figure, "losses", label)


@contextmanager
def _figure_with_strip() -> Iterator[tuple[Figure, Axes, Axes]]:
    """A chart, and above it a strip with the same x axis, drawn in the style of the pages."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(TALL[0] / 72, TALL[1] / 72), layout="constrained")
        strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 4.6))
        figure.get_layout_engine().set(hspace=0, h_pad=0.02)  # type: ignore[union-attr, call-arg]
        _grid(axes)
        strip.tick_params(bottom=False, labelbottom=False, labelleft=False)
        strip.spines["bottom"].set_visible(False)
        yield figure, strip, axes


def _finish_histogram(axes: Axes, edges: Any, highest: int) -> None:
    top = 1.15 * max(1, highest)  # leaves room for the label of the cut
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, top), ylabel="examples per bin")
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _draw_percentiles(strip: Axes, rows: list[tuple[dict[str, Any], str]]) -> None:
    """For each distribution a line from the 5th to the 95th percentile, a bar from the 25th to the 75th, the median.

    The marks of the first are labelled.
    """
    low, high = strip.get_xlim()
    strip.set_ylim(len(rows) - 0.4, -1.5)
    for place, (distribution, colour) in enumerate(rows):
        at = {row["p"]: row["value"] for row in distribution["percentiles"]}
        if at[50] is None:
            continue
        strip.plot([at[5], at[95]], [place, place], color=colour, linewidth=1.6)
        strip.plot([at[25], at[75]], [place, place], color=colour, linewidth=7, solid_capstyle="butt")
        strip.plot([at[50]], [place], color=INK, marker="|", markersize=12, markeredgewidth=2)
        if place == 0:
            named: list[float] = []
            for p in (50, 5, 95, 25, 75):  # the median first, then the others where there is room
                if low <= at[p] <= high and all(abs(at[p] - other) > (high - low) / 12 for other in named):
                    named.append(at[p])
                    strip.annotate(f"{p} %", (at[p], -0.6), ha="center", va="bottom", color=MUTED, fontsize=11)


def _draw_cut(axes: Axes, cut: float, to_the_left: bool) -> None:
    axes.axvline(cut, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    text = f"cut at {cut:.3f}" if abs(cut) < 1000 else f"cut at {cut:.3g}"
    axes.annotate(
        text.replace("-", "−"),
        (cut, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if to_the_left else 6, -4),
        textcoords="offset pixels",
        ha="right" if to_the_left else "left",
        va="top",
    )


def length_panel(panel: dict[str, Any]) -> Markup:
    """One measure against response length: density as opacity, the median, and the 10th and 90th percentiles."""
    with _figure(NARROW) as (figure, axes):
        axes.set_xscale("log")
        _draw_density(axes, panel)
        band = panel["band"]
        if band:
            lengths = [point["length"] for point in band]
            for name in ("p10", "p90"):
                axes.plot(lengths, [point[name] for point in band], color=CHOSEN, linewidth=1, linestyle=(0, (4, 2)))
            axes.plot(lengths, [point["p50"] for point in band], color=CHOSEN, linewidth=2.2)
        (shortest, *_, longest), (low, *_, high) = panel["x_edges"], panel["y_edges"]
        axes.set(xlim=(shortest, longest), ylim=(low, high), xlabel="response tokens (log scale)", ylabel=panel["unit"])
        if max(abs(low), abs(high)) >= 1000:
            axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        _label_lengths(axes, shortest, longest)
        label = f"{panel['title']} against response length: density, median and 10th to 90th percentile."
        return _svg(figure, f"length-{panel['measure'].replace('_', '-')}", label)


def _draw_density(axes: Axes, panel: dict[str, Any]) -> None:
    x_edges, y_edges, cells = panel["x_edges"], panel["y_edges"], panel["cells"]
    if not cells:
        return
    corners = [[(x_edges[x + dx], y_edges[y + dy]) for dx, dy in ((0, 0), (1, 0), (1, 1), (0, 1))] for x, y, _ in cells]
    # The square root keeps the thin tails visible next to a dense middle.
    weight = np.sqrt([count for _, _, count in cells])
    red, green, blue = matplotlib.colors.to_rgb(POOL)
    colours = [(red, green, blue, round(0.12 + 0.88 * w, 2)) for w in weight / weight.max()]
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="none", antialiaseds=False))


def _label_lengths(axes: Axes, low: float, high: float) -> None:
    """Plain numbers at 1, 2 and 5 × 10ⁿ, at more places on a short axis, and at powers of ten alone on a long one."""
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if high / low < 12 else (1.0, 2.0, 5.0) if high / low < 500 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def length_deciles(deciles: list[dict[str, Any]]) -> Markup:
    """Shares of the pool and of the selection in each tenth of response length."""
    with _figure(WIDE) as (figure, axes):
        place = np.arange(len(deciles))
        for offset, name, colour in ((-0.2, "share_of_all", POOL), (0.2, "share_of_selected", CHOSEN)):
            axes.bar(place + offset, [100 * (row[name] or 0) for row in deciles], 0.36, color=colour)
        labels = [f"{d['from']}–{d['to']}" if d["from"] < d["to"] else str(d["to"]) for d in deciles]
        axes.set_xticks(place, labels, rotation=40, ha="right", rotation_mode="anchor")
        axes.set(xlabel="response tokens, tenths of the pool", ylabel="share, %")
        return _svg(figure, "deciles", "Share of the pool and of the selection by response length.")


_ARM_STYLES: dict[str, dict[str, Any]] = {
    "selection": {"color": CHOSEN, "marker": "o"},
    "random": {"color": POOL, "marker": "s"},
    "random_matched": {"color": MUTED, "marker": "D", "linestyle": (0, (4, 2))},
    "lowest": {"color": BASE, "marker": "^"},
    "rho": {"color": REFERENCE, "marker": "v"},
    "full": {"color": INK, "marker": "*", "linestyle": (0, (4, 3))},
}
_ORDER_MARKERS = "PXdphH"
"""Markers of the arms order:ORDER, in turn."""


def comparison(results: list[dict[str, Any]], unit: str, name: str) -> Markup:
    """Means of the arms with 95 % intervals: a curve over the sizes, or a line for each arm if there is one size."""
    sizes = sorted({row["rows"] for row in results})
    with _figure(TALL) as (figure, axes):
        label = f"Means and 95 % intervals of the arms, {unit}"
        if len(sizes) == 1:
            _draw_arms(axes, results, unit)
            return _svg(figure, name, f"{label}.")
        _draw_curves(axes, results, sizes)
        axes.set_ylabel(unit)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=11)
        return _svg(figure, name, f"{label}, over the size of the selection.")


def _arm_styles(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The style of each arm there is: those of _ARM_STYLES, in its order, then the arms order:ORDER."""
    names = {row["arm"] for row in results}
    styles = {arm: style for arm, style in _ARM_STYLES.items() if arm in names}
    others = zip(sorted(names - styles.keys()), cycle(_ORDER_MARKERS), strict=False)
    return styles | {arm: {"color": INK, "marker": marker, "linestyle": (0, (1, 2))} for arm, marker in others}


def _draw_arms(axes: Axes, results: list[dict[str, Any]], unit: str) -> None:
    """A line for each arm."""
    rows, arms = {row["arm"]: row for row in results}, _arm_styles(results)
    for place, (arm, style) in enumerate(arms.items()):
        row = rows[arm]
        axes.plot([row["low"], row["high"]], [place, place], color=style["color"], linewidth=2)
        axes.plot([row["mean"]], [place], color=style["color"], marker=style["marker"], markersize=8)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set(ylim=(len(arms) - 0.5, -0.5), xlabel=unit)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _draw_curves(axes: Axes, results: list[dict[str, Any]], sizes: list[int]) -> None:
    """A curve for each arm, shifted a little so that the intervals of the arms do not overlap."""
    axes.set_xscale("log")
    arms = _arm_styles(results)
    for place, (arm, style) in enumerate(arms.items()):
        rows = sorted((row for row in results if row["arm"] == arm), key=lambda row: row["rows"])
        shift = 1.0 if arm == "full" else (sizes[-1] / sizes[0]) ** (0.012 * (place - len(arms) / 2))
        at = [row["rows"] * shift for row in rows]
        axes.plot(at, [row["mean"] for row in rows], linewidth=1.8, markersize=6, label=arm, **style)
        for x, row in zip(at, rows, strict=True):
            axes.plot([x, x], [row["low"], row["high"]], color=style["color"], linewidth=1.2)
    axes.set_xticks(sizes, [_thousands(size, 0) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rows of the selection (log scale)")


def throughput(scoring: dict[str, Any]) -> Markup:
    """Tokens scored per second over time, and the mean of the whole stage."""
    with _figure(WIDE) as (figure, axes):
        rates = scoring["rates"]
        unit, seconds = next((name, s) for name, s in _TIME_UNITS if rates[-1]["to"] >= 2 * s or s == 1)
        edges = np.array([rates[0]["from"], *(rate["to"] for rate in rates)]) / seconds
        heights = [rate["tokens_per_second"] for rate in rates]
        axes.stairs(heights, edges, fill=True, color=CHOSEN, alpha=0.18)
        axes.stairs(heights, edges, color=CHOSEN, linewidth=1.8)
        mean = scoring["tokens_per_second"]
        axes.axhline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, edges[-1]), ylim=(0, 1.15 * max(*heights, mean)))
        axes.set(xlabel=f"{unit} since the stage began", ylabel="tokens per second")
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        return _svg(figure, "throughput", f"Tokens scored per second over time, {mean:,.0f} on average.")


def _thousands(value: float, _: int) -> str:
    text = f"{value:,.0f}" if abs(value) < _HUGE else f"{value:.2g}"
    return text.replace("-", "−")


@contextmanager
def _figure(size: tuple[int, int]) -> Iterator[tuple[Figure, Axes]]:
    """A chart, drawn in the style of the pages."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        axes = figure.add_subplot()
        _grid(axes)
        yield figure, axes


def _grid(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(useOffset=False)


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an SVG element for HTML: no prolog, size left to CSS, ids prefixed by the name, themed colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="([\d. ]+)"', text)
    assert view_box, "matplotlib wrote an SVG without a viewBox"
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # The metadata contains the date.
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for placeholder, colour in _CSS_COLOURS.items():
        body = body.replace(placeholder, colour)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return Markup(f'<svg class="chart" viewBox="{view_box[1]}" role="img" aria-label="{label}">{body}')
