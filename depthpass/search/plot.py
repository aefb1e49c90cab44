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

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, EDGE = 520, 340, 62, 40, 48, 16
COLOURS = ("#333333", "#0b6bb8", "#d9480f", "#2b8a3e", "#7048e8")


def front_svg(result: SearchResult) -> str:
    """All trials as grey dots, the front as a line, stock, best and controls as larger dots that a legend names."""
    named = [("stock", result.stock), ("best", result.best), *((c.name, c.best) for c in result.controls.values())]
    dots = [(t.visits, t.score) for t in result.trials if t.sample is None]
    front = [(f.visits, f.score) for f in result.front]
    marks = [(f.visits, f.score) for _, f in named]
    points = [p for p in (*dots, *front, *marks) if math.isfinite(p[1])]
    (x0, x1), (y0, y1) = (_range([p[i] for p in points]) for i in (0, 1))

    def at(p: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - EDGE) * (p[0] - x0) / (x1 - x0)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (p[1] - y0) / (y1 - y0), 1)

    parts = [_axis(v, at((v, y0)), below=True) for v in _marks(x0, x1, whole=True)]
    parts += [_axis(v, at((x0, v)), below=False) for v in _marks(y0, y1)]
    seen = dict.fromkeys(p for p in dots if p in points)
    parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="#999"/>' for x, y in map(at, seen)]
    line = [at(p) for p in front if p in points]
    parts.append(f'<polyline fill="none" stroke="#0b6bb8" stroke-width="2" points="{" ".join(f"{x},{y}" for x, y in line)}"/>')
    # Those that stand on the same point are rings around one another.
    met: dict[tuple[float, float], int] = {}
    legend = LEFT
    for i, ((name, _), p) in enumerate(zip(named, marks)):
        colour = COLOURS[i % len(COLOURS)]
        if p in points:
            x, y = at(p)
            around = met[x, y] = met.get((x, y), -1) + 1
            look = f'fill="none" stroke="{colour}" stroke-width="2"' if around else f'fill="{colour}"'
            parts.append(f'<circle cx="{x}" cy="{y}" r="{4 + 4 * around}" {look}/>')
        parts.append(f'<circle cx="{legend + 5}" cy="16" r="4" fill="{colour}"/>'
                     f'<text x="{legend + 13}" y="20">{escape(name)}</text>')
        legend += 30 + _width(name)
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">block visits</text>')
    parts.append(f'<text transform="translate(14 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)" text-anchor="middle">'
                 f'{escape(str(result.settings["score"]))} on the searched samples</text>')
    return _file(max(WIDTH, legend), HEIGHT, parts)


def heat_svg(heat: HeatMap) -> str:
    """One cell per range: blue above stock, orange below (numbers on hover)."""
    cell, blocks, left, top = 22, len(heat.scores), 60, 44
    scores = [(s, e, v) for s, row in enumerate(heat.scores) for e, v in enumerate(row) if v is not None and math.isfinite(v)]
    most = max((abs(v - heat.stock) for _, _, v in scores), default=0.0) or 1.0
    parts = []
    for start, end, value in scores:
        share = (value - heat.stock) / most
        colour = "11,107,184" if share >= 0 else "217,72,15"
        parts.append(f'<rect x="{left + cell * end}" y="{top + cell * start}" width="{cell - 1}" height="{cell - 1}" '
                     f'fill="rgb({colour})" fill-opacity="{max(0.05, abs(share)):.2f}"><title>{start}:{end + 1} '
                     f"{value:.4g}</title></rect>")
    for i in range(blocks):
        parts.append(f'<text x="{left - 6}" y="{top + 15 + cell * i}" text-anchor="end">{i}</text>')
        parts.append(f'<text x="{left + 11 + cell * i}" y="{top - 6}" text-anchor="middle">{i + 1}</text>')
    side = cell * blocks
    parts.append(f'<text x="{left + side / 2}" y="{top - 24}" text-anchor="middle">end</text>')
    parts.append(f'<text transform="translate(24 {top + side / 2}) rotate(-90)" text-anchor="middle">start</text>')
    said = (f"Blocks start .. end - 1 run {heat.times} times in a row.",
            f"Blue: better than stock ({heat.stock:.3g}), orange: worse; full colour: by {most:.2g}.")
    parts += [f'<text x="{left}" y="{top + side + 20 + 16 * i}">{escape(text)}</text>' for i, text in enumerate(said)]
    return _file(left + max(side, *map(_width, said)) + EDGE, top + side + 20 + 16 * len(said), parts)


def _width(text: str) -> int:
    """Pixels of a text of 11 pixels, rather too many."""
    return 6 * len(text)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def _marks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers inside a range, about five of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= (high - low) / 6)
    step = max(1.0, step) if whole else step
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axis(value: float, at: tuple[float, float], below: bool) -> str:
    """A line through the picture with its number."""
    x, y = at
    line = f"M{x} {y}V{TOP}" if below else f"M{x} {y}H{WIDTH - EDGE}"
    place = (x, y + 16, "middle") if below else (x - 6, y + 4, "end")
    return (f'<path d="{line}" stroke="#d8dee4" fill="none"/>'
            f'<text x="{place[0]}" y="{place[1]}" text-anchor="{place[2]}">{value:.4g}</text>')


def _file(width: float, height: float, parts: list[str]) -> str:
    """A file on a white ground, whatever page it is put into."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'style="max-width:100%;height:auto">'
            '<rect width="100%" height="100%" fill="#fff"/><style>text{font:11px sans-serif;fill:#333}</style>'
            + "".join(parts) + "</svg>\n")
