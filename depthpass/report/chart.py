"""Line charts as SVG, drawn by matplotlib, in the colours of the page they stand in."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from depthpass.errors import InputError

WIDTH, HEIGHT = 4.6, 2.7
"""Inches; a page scales them to its own width."""

INK, SOFT, GRID = "#101112", "#131415", "#161718"
LINES = ("#0b6bb8", "#d9480f", "#2b8a3e", "#7048e8")
"""Colours that no two parts share, so that a page can replace each by one of its own."""

ON_PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--line)",
           **{c: f"var(--s{i})" for i, c in enumerate(LINES)}}
ALONE = {INK: "#1c2733", SOFT: "#5b6875", GRID: "#d8dee4"}


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: in the legend.
        points: (x, y) with x ascending.
        steps: draw horizontal steps instead of straight lines: the value holds until the next point.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    steps: bool = False


def line_chart(series: Sequence[Series], x_label: str, y_label: str, *, doubling: bool = False) -> str:
    """An SVG element for a page that sets ``--ink``, ``--soft``, ``--line`` and ``--s0`` to ``--s3``.

    Args:
        series: at least one, each with at least one point.
        x_label, y_label: with units.
        doubling: x in powers of two, with a mark at each point.

    Raises:
        InputError: matplotlib is not installed.
    """
    text = _svg(series, x_label, y_label, doubling, ON_PAGE)
    # Inline SVG needs no prologue, namespaces or metadata, and a page that needs no network should name no address.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| width="[\d.]+pt" height="[\d.]+pt"', "", text)
    label = f'class="dp-chart" role="img" aria-label="{_words(f"{y_label} against {x_label}")}"'
    return text.replace("<svg", f"<svg {label}", 1).strip()


def chart_file(series: Sequence[Series], x_label: str, y_label: str, *, doubling: bool = False) -> str:
    """The same as an SVG file of its own, on white.

    Raises:
        InputError: matplotlib is not installed.
    """
    return _svg(series, x_label, y_label, doubling, ALONE, ground="#ffffff")


def _svg(series: Sequence[Series], x_label: str, y_label: str, doubling: bool, colours: dict[str, str],
         ground: str = "none") -> str:
    figure = _figure(series, x_label, y_label, doubling)
    from matplotlib import rc_context

    # Text stays text, so that it takes the page's font; ids depend on what is drawn, not on the clock.
    with io.StringIO() as out, rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{x_label}{y_label}{series}"}):
        figure.savefig(out, format="svg", facecolor=ground, metadata={"Date": None})
        text = out.getvalue()
    for colour, name in colours.items():
        text = text.replace(colour, name)
    return text


def _figure(series: Sequence[Series], x_label: str, y_label: str, doubling: bool) -> Any:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, ScalarFormatter
    except ImportError:
        raise InputError("charts: expected matplotlib, which draws them, to be installed. Run pip install "
                         "'depthpass[plot]'.") from None
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for i, s in enumerate(series):
        xs, ys = zip(*s.points)
        axes.plot(xs, ys, color=LINES[i], label=s.label, drawstyle="steps-post" if s.steps else "default", linewidth=1.8,
                  linestyle=("-", (0, (5, 3)), (0, (1, 1.5)), "-.")[i], marker="o" if doubling else None, markersize=4.5)
    if doubling and min(x for s in series for x, _ in s.points) > 0:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for s in series for x, _ in s.points}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    # Visits, calls and bytes are whole numbers; one that does not change is seen against nothing.
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if len({y for s in series for _, y in s.points}) == 1:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=SOFT, labelcolor=SOFT, length=0)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    # One rule for every chart: a legend above as soon as there are two lines, never on top of them.
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK)
    return figure


def _words(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
