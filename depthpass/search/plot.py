"""Pictures of a search as SVG files of their own: the Pareto front, the heat map.

Written without matplotlib: ``SearchResult.save`` puts one into every folder, and must not need an extra.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depthpass.search.heat_map import HeatMap
    from depthpass.search.result import SearchResult

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 520, 320, 70, 44, 16


def front_svg(result: SearchResult) -> str:
    """All trials as grey dots, the front as a line, stock, best and controls named."""
    named = [("stock", result.stock), ("best", result.best), *((c.name, c.best) for c in result.controls.values())]
    dots = [(t.visits, t.score) for t in result.trials if t.sample is None]
    front = [(f.visits, f.score) for f in result.front]
    marks = [(f.visits, f.score) for _, f in named]
    points = [p for p in (*dots, *front, *marks) if math.isfinite(p[1])]
    (x0, x1), (y0, y1) = (_range([p[i] for p in points]) for i in (0, 1))

    def at(p: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - EDGE) * (p[0] - x0) / (x1 - x0)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - EDGE) * (p[1] - y0) / (y1 - y0), 1)

    parts = [_axis(v, at((v, y0)), below=True) for v in _marks(x0, x1)] + [_axis(v, at((x0, v)), below=False)
                                                                           for v in _marks(y0, y1)]
    parts += [f'<circle cx="{x}" cy="{y}" r="2" fill="#bbb"/>' for x, y in map(at, dict.fromkeys(p for p in dots if p in points))]
    line = [at(p) for p in front if p in points]
    parts.append(f'<polyline fill="none" stroke="#0b6bb8" stroke-width="2" points="{" ".join(f"{x},{y}" for x, y in line)}"/>')
    for i, ((name, _), p) in enumerate(zip(named, marks)):
        if p in points:
            x, y = at(p)
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{("#333", "#0b6bb8", "#d9480f", "#2b8a3e")[i % 4]}"/>'
                         f'<text x="{x + 6}" y="{y - 6 - 4 * (i % 3)}">{escape(name)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">block visits</text>')
    parts.append(f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
                 f'{escape(str(result.settings["score"]))} on the searched samples</text>')
    return _file(WIDTH, HEIGHT, parts)


def heat_svg(found: HeatMap) -> str:
    """One cell per range: blue above stock, orange below (numbers on hover)."""
    cell, blocks = 22, len(found.scores)
    scores = [(s, e, v) for s, row in enumerate(found.scores) for e, v in enumerate(row) if v is not None and math.isfinite(v)]
    most = max((abs(v - found.stock) for _, _, v in scores), default=0.0) or 1.0
    parts = []
    for start, end, value in scores:
        share = (value - found.stock) / most
        colour = "11,107,184" if share >= 0 else "217,72,15"
        parts.append(f'<rect x="{60 + cell * end}" y="{20 + cell * start}" width="{cell - 1}" height="{cell - 1}" '
                     f'fill="rgb({colour})" fill-opacity="{max(0.05, abs(share)):.2f}"><title>{start}:{end + 1} '
                     f"{value:.4g}</title></rect>")
    for i in range(blocks):
        parts.append(f'<text x="{54}" y="{35 + cell * i}" text-anchor="end">{i}</text>')
        parts.append(f'<text x="{71 + cell * i}" y="14" text-anchor="middle">{i + 1}</text>')
    side = 70 + cell * blocks
    parts.append(f'<text x="60" y="{side - 24}">range [start, end) run {found.times} times, against stock '
                 f"{found.stock:.3g}</text>")
    return _file(max(side, 320), side, parts)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def _marks(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 4 for i in range(5)]


def _axis(value: float, at: tuple[float, float], below: bool) -> str:
    x, y = (at[0], at[1] + 16) if below else (at[0] - 6, at[1] + 4)
    return f'<text x="{x}" y="{y}" text-anchor="{"middle" if below else "end"}">{value:.3g}</text>'


def _file(width: float, height: float, parts: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
            "<style>text{font:11px sans-serif;fill:#333}</style>" + "".join(parts) + "</svg>\n")
