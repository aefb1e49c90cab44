"""Small line charts as inline SVG, coloured by the style sheet of the page they stand in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 40


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: shown at its end and in the legend.
        points: (x, y) with x ascending.
        steps: draw horizontal steps instead of straight lines: the value holds until the next point.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    steps: bool = False


def line_chart(series: Sequence[Series], x_label: str, y_label: str, *, marks: bool = False) -> str:
    """An SVG element; both axes start at 0.

    Args:
        series: at least one, each with at least one point.
        x_label, y_label: with units.
        marks: a dot at each point, for few points.
    """
    xs = ticks(max(x for s in series for x, _ in s.points))
    ys = ticks(max(y for s in series for _, y in s.points))
    parts = [
        f'<svg class="dp-chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">'
    ]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + (WIDTH - LEFT - RIGHT) * x / xs[-1], 1),
            round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / ys[-1], 1),
        )

    for y in ys:
        (x0, py), (x1, _) = at(0, y), at(xs[-1], y)
        parts.append(f'<line class="dp-grid" x1="{x0}" y1="{py}" x2="{x1}" y2="{py}"/>')
        parts.append(f'<text class="dp-tick" x="{x0 - 6}" y="{py + 4}" text-anchor="end">{short(y)}</text>')
    for x in xs:
        px, py = at(x, 0)
        parts.append(f'<text class="dp-tick" x="{px}" y="{py + 16}" text-anchor="middle">{short(x)}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text class="dp-axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                 f"{escape(x_label)}</text>")
    parts.append(f'<text class="dp-axis" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
                 f"{escape(y_label)}</text>")
    for i, s in enumerate(series):
        points = [at(x, y) for x, y in s.points]
        parts.append(f'<path class="dp-line dp-series{i}" d="{_path(points, s.steps)}"/>')
        if marks:
            parts += [f'<circle class="dp-mark dp-series{i}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in points]
    parts.append("</svg>")
    return "".join(parts) + legend(series)


def legend(series: Sequence[Series]) -> str:
    """Names of the lines, in their colours; nothing for a single line."""
    if len(series) < 2:
        return ""
    items = "".join(f'<span><i class="dp-key dp-series{i}"></i>{escape(s.label)}</span>' for i, s in enumerate(series))
    return f'<div class="dp-legend">{items}</div>'


def _path(points: Sequence[tuple[float, float]], steps: bool) -> str:
    (x, y), rest = points[0], points[1:]
    commands = [f"M{x} {y}"]
    for px, py in rest:
        commands.append(f"H{px}V{py}" if steps else f"L{px} {py}")
    return "".join(commands)


def ticks(top: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``top``.

    >>> ticks(548)
    [0, 200, 400, 600]
    """
    if top <= 0:
        return [0, 1]
    raw = top / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 1500 -> ``1.5k``."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"
