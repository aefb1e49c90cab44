"""The program over tokens as a picture: visits are columns, tokens are rows, delays lead down and back.

On a phone the same picture lies on its side, where as many visits as there are fit below one another.
"""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

from depthpass.analysis.cost.visits import route_share
from depthpass.ir.program import Op
from depthpass.ir.shares import by_route
from depthpass.report.brackets import brackets
from depthpass.report.columns import Edge, columns_of, delay_edges, folded
from depthpass.report.critical import Segment, segments

if TYPE_CHECKING:
    from depthpass.report.report import Report

MAX_ROWS, PHONE_ROWS = 20, 9
"""Tokens drawn one by one at most; wider chunks get one row each."""

CHUNKS = 3
PLAIN_ROWS = 4
FOLD = 64
"""Room for a column that several visits share, and its numbers."""
WIDEST = 1180
LEFT, BOTTOM = 92, 26
HEAD, LEVEL = 50, 22
"""Room above the rows: block numbers and shares of routes, and one level for each nesting of brackets."""

SHOWN_EDGES = 60
"""Most lines of delays; where one from every token would be more, they are drawn from the first token only."""
ROW, CHUNK_ROW = 26, 52


class _Grid:
    """Places of columns and rows.

    Attributes:
        real: real tokens of the row that is drawn; its pads or latents follow.
        after: which of the two.
        tokens: tokens drawn, ``hidden`` more pads are left out.
        step: tokens per line of the picture.
        blocks, shares: where the numbers of blocks and the shares of routes stand.
    """

    def __init__(self, report: Report, narrow: bool = False) -> None:
        self.columns, self.narrow = report.visits, narrow
        self.after = "latent" if report.program.latents else "pad"
        chunk, most = report.chunk or 1, PHONE_ROWS if narrow else MAX_ROWS
        self.by_chunk = 2 * chunk > most
        pads = max(t.pads for t in report.types.values())
        if report.chunk is None:
            self.step, self.rows = 1, min(report.seq_len + pads, max(PLAIN_ROWS, _longest(report) + 1) + pads, most)
        else:
            self.step = chunk if self.by_chunk else 1
            wanted = CHUNKS if self.by_chunk else min(CHUNKS * chunk, most)
            self.rows = min(wanted, -(-report.seq_len // self.step))
        self.real = max(1, min(self.rows * self.step - pads, report.seq_len))
        self.rows = min(self.rows, -(-(self.real + pads) // self.step))
        self.tokens = min(self.rows * self.step, self.real + pads)
        self.hidden = self.real + pads - self.tokens
        # A delay from one column to the next (parallel loops) is a diagonal in a gap of its own.
        self.gaps = {e.target for e in delay_edges(report.program) if e.target == e.source + 1}
        self.runs = folded(report, self.gaps)
        folds = sum(len(r) > 1 for r in self.runs)
        room = WIDEST - LEFT - 60 - (0 if narrow else FOLD * folds)
        self.pitch = 18.0 if narrow else max(14.0, min(40.0, room / max(len(self.runs) - folds, 1)))
        self.pad = 4 if self.pitch > 24 else 2
        self.cell, self.gap = self.pitch - 2 * self.pad, 1.5 * self.pitch
        self.sides: list[tuple[float, float]] = []
        at: float = LEFT
        for run in self.runs:
            at += self.gap * (run[0] in self.gaps)
            wide = self.pitch if len(run) == 1 else 1.5 * self.pitch if narrow else FOLD
            self.sides += [(at, at + wide)] * len(run)
            at += wide
        # What leads to the output ends behind the last visit.
        at += self.gap * (self.columns in self.gaps)
        self.sides.append((at, at + self.pitch))
        self.width = round(at + 70)
        self.row = CHUNK_ROW if self.by_chunk else ROW
        self.brackets = brackets([o["index"] for o in report.program.visits])
        shares = _shares(report).values()
        # Where a share stands beside a number, not below it.
        aside = 8 + 8 * max(len(_percent(s)) for s in shares) if narrow and shares else 0
        self.head = HEAD + aside
        self.top = self.head + LEVEL * max((b.level + 1 for b in self.brackets), default=0)
        self.shares, self.blocks = self.top - 12, self.top - (12 + (aside or 14) if shares else 14)
        self.height = self.top + self.row * self.rows + BOTTOM

    def x(self, column: int) -> float:
        """Centre of a column."""
        return round(sum(self.sides[column]) / 2, 1)

    def y(self, token: int) -> float:
        """Centre of the row that holds a token."""
        return self.top + self.row * (token // self.step) + self.row / 2

    def label(self, row: int) -> str:
        if not self.by_chunk and self.narrow:
            return f"{row}" if row < self.real else f"{self.after[0]}{row - self.real + 1}"
        if not self.by_chunk:
            return f"token {row}" if row < self.real else f"{self.after} {row - self.real + 1}"
        return f"{row * self.step}..{min((row + 1) * self.step, self.tokens) - 1}"


def _longest(report: Report) -> int:
    return sum(o["tokens"] for o in report.program.ops if o.kind == "delay")


def picture(report: Report, narrow: bool = False) -> str:
    """An SVG element and its caption.

    Args:
        narrow: for a page as narrow as a phone's: visits are rows, few tokens are columns.
    """
    grid = _Grid(report, narrow)
    text = "".join(_drawn(report, grid)) + f'<p class="dp-caption">{escape(_caption(report, grid))}</p>'
    return _turned(text, grid) if narrow else text


def _turned(text: str, grid: _Grid) -> str:
    """The picture mirrored at its diagonal, with words that stay upright and an arrow of its own."""
    def word(match: re.Match[str]) -> str:
        kind, x, y, anchor = match[1], float(match[2]), float(match[3]), match[4]
        x, y = (x, y - 4) if anchor == "end" else (x + 4, y)
        anchor = "end" if anchor == "middle" and kind != "dp-word" else "middle"
        return f'<text class="{kind}" transform="matrix(0 1 1 0 0 0)" x="{y:.1f}" y="{x:.1f}" text-anchor="{anchor}">'

    text = re.sub(r'<text class="([^"]+)" x="([^"]+)" y="([^"]+)" text-anchor="(\w+)">', word, text)
    text = text.replace("dp-arrow", "dp-arrow-narrow").replace("dp-arrow-narrowhead", "dp-arrowhead")
    # Above the tokens' numbers and below the last visit nothing is drawn.
    text = text.replace(f"0 0 {grid.width} {grid.height}", f"0 {LEFT - 50} {grid.height} {grid.width - LEFT}", 1)
    text = text.replace(f"max-width:{grid.width}px", f"max-width:{grid.height}px", 1)
    return text.replace("</defs>", '</defs><g transform="matrix(0 1 1 0 0 0)">', 1).replace("</svg>", "</g></svg>", 1)


def _drawn(report: Report, grid: _Grid) -> list[str]:
    """The SVG element."""
    column = columns_of(report.program)
    serial = {report.program.visits[column[o.name]].name for r in report.schedule.serial_regions for o in r.counted}
    path = _path(report, grid)
    shares = _shares(report)
    on_path = {(column[v], s.token // grid.step) for s in path for v in s.visits}
    parts = [
        f'<svg class="dp-picture" viewBox="0 0 {grid.width} {grid.height}" '
        f'style="max-width:{grid.width}px" role="img" '
        f'aria-label="{report.visits} block visits by {grid.tokens} tokens">',
        '<defs><marker id="dp-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" class="dp-arrowhead"/></marker></defs>',
        *_shade(report, grid, serial),
        *_headers(report, grid, shares),
        *_bracket_lines(grid),
    ]
    for row in range(grid.rows):
        y = grid.y(row * grid.step)
        parts.append(f'<text class="dp-tick" x="{LEFT - 34}" y="{y + 4}" text-anchor="end">{grid.label(row)}</text>')
        parts.append(f'<circle class="dp-embed" cx="{LEFT - 18}" cy="{y}" r="4"/>')
        for run in grid.runs:
            o = report.program.visits[run[0]]
            kind = "dp-hot" if (run[0], row) in on_path else "dp-serial" if o.name in serial else "dp-parallel"
            parts += _cell(grid, o, run, _blocks(report, run), row, kind, shares.get(o.name))
    parts += _faint(report, grid)
    parts += _critical(column, grid, path)
    parts += _delay_words(report, grid)
    return [*parts, "</svg>"]


def _path(report: Report, grid: _Grid) -> tuple[Segment, ...]:
    """What is drawn of a longest path. One that stays at its token is as long at any other, if that one is not drawn."""
    steps = segments(report.depths[None].critical_path(grid.real))
    if len({s.token for s in steps}) == 1:
        return tuple(replace(s, token=min(s.token, grid.tokens - 1)) for s in steps)
    return tuple(s for s in steps if s.token < grid.tokens)


def _shade(report: Report, grid: _Grid, serial: set[str]) -> list[str]:
    columns = [j for j, o in enumerate(report.program.visits) if o.name in serial]
    parts = []
    for run in _runs(columns):
        x0, x1 = grid.sides[run[0]][0], grid.sides[run[-1]][1]
        parts.append(f'<rect class="dp-region" x="{x0:.1f}" y="{grid.top - 6}" width="{x1 - x0:.1f}" '
                     f'height="{grid.row * grid.rows + 12}" rx="6"/>')
        per_chunk = 1 if grid.by_chunk else report.chunk or 1
        for row in range(per_chunk, grid.rows, per_chunk):
            y = grid.top + grid.row * row
            parts.append(f'<line class="dp-chunk" x1="{x0:.1f}" y1="{y}" x2="{x1:.1f}" y2="{y}"/>')
    return parts


def _runs(columns: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for c in columns:
        if runs and c == runs[-1][-1] + 1:
            runs[-1].append(c)
        else:
            runs.append([c])
    return runs


def _shares(report: Report) -> dict[str, float]:
    """Visits that a route thins out: the share of the tokens that take them."""
    given = by_route(report.program, report.ratios)
    routes = {o.name: report.types[o.name].tokens for o in report.program.visits}
    return {visit: float(route_share(report.program.defs[r], given)) for visit, r in routes.items() if r is not None}


def _cell(grid: _Grid, o: Op, run: range, blocks: str, row: int, kind: str, share: float | None) -> list[str]:
    """A visit of a token, or a run of them; of what a route thins out the part that is computed is filled."""
    left, right = grid.sides[run[0]]
    x, y, width = left + grid.pad, grid.y(row * grid.step) - 7, right - left - 2 * grid.pad
    parts, words = [], f"%{o.name}: block {blocks}, {grid.label(row)}"
    if len(run) > 1:
        words = f"{len(run)} visits: blocks {blocks}, {grid.label(row)}"
    if share is not None:
        parts.append(f'<rect class="dp-part" x="{x:.1f}" y="{y}" width="{width:.1f}" height="14" rx="3"/>')
        words += f", {_percent(share)} of the tokens"
        width = max(1.5, width * share)
    return [*parts, f'<rect class="dp-cell {kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="14" rx="3"><title>'
                    f"{escape(words)}</title></rect>"]


def _headers(report: Report, grid: _Grid, shares: dict[str, float]) -> list[str]:
    """Block numbers, with the share of tokens below those that routes thin out."""
    every = 1 if grid.narrow or grid.pitch >= 20 else 4
    y, parts = grid.blocks, []
    if not grid.narrow:
        parts.append(f'<text class="dp-tick" x="{LEFT - 18}" y="{y}" text-anchor="end">block</text>')
    if shares and not grid.narrow:
        parts.append(f'<text class="dp-tick" x="{LEFT - 18}" y="{grid.shares}" text-anchor="end">tokens</text>')
    said, folds = None, any(len(run) > 1 for run in grid.runs)
    for j, run in ((run[0], run) for run in grid.runs):
        o = report.program.visits[j]
        if folds or j % every == 0:
            parts.append(f'<text class="dp-tick" x="{grid.x(j)}" y="{y}" text-anchor="middle">{_blocks(report, run)}</text>')
        share = shares.get(o.name)
        if share is not None and share != said:
            parts.append(f'<text class="dp-tick" x="{grid.x(j)}" y="{grid.shares}" text-anchor="middle">{_percent(share)}</text>')
        said = share
    return parts


def _blocks(report: Report, run: range) -> str:
    first, last = (report.program.visits[j]["index"] for j in (run[0], run[-1]))
    return f"{first}" if first == last else f"{first}..{last}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _bracket_lines(grid: _Grid) -> list[str]:
    """A bracket over every repeat, with a tick between iterations and how many there are."""
    parts = []
    for b in grid.brackets:
        x0, x1 = grid.sides[b.first][0] + grid.pad, grid.sides[b.last][1] - grid.pad
        y = grid.top - grid.head + 6 - LEVEL * b.level
        period = (b.last - b.first + 1) // b.times
        ticks = "".join(f"M{grid.sides[b.first + i * period][0]:.1f} {y}v5" for i in range(1, b.times))
        parts.append(f'<path class="dp-bracket" d="M{x0:.1f} {y + 6}v-6H{x1:.1f}v6{ticks}"/>')
        parts.append(f'<text class="dp-word dp-times" x="{(x0 + x1) / 2:.1f}" y="{y - 4}" text-anchor="middle">'
                     f"x{b.times}</text>")
    return parts


def _faint(report: Report, grid: _Grid) -> list[str]:
    """Delays from every token, or from the first alone where that would be too many lines."""
    edges = {(grid.sides[e.source], grid.sides[e.target], e.tokens): e for e in _shown_edges(report, grid)}.values()
    starts = range(grid.tokens) if sum(grid.tokens - e.tokens for e in edges) <= SHOWN_EDGES else range(1)
    return [
        f'<path class="dp-delay" d="{_curve(grid, e.source, t, e.target, t + e.tokens)}"/>'
        for e in edges for t in starts if t + e.tokens < grid.tokens
    ]


def _delay_words(report: Report, grid: _Grid) -> list[str]:
    """How many tokens few delays lead on; delays of equally many share a number, which stands at the first of them."""
    edges = [e for e in _shown_edges(report, grid) if e.tokens >= grid.step]  # shorter ones stay inside their row
    parts = []
    for e in {e.tokens: e for e in reversed(edges)}.values() if len(edges) <= 4 else ():
        x = (grid.x(e.source) + grid.x(e.target)) / 2
        parts.append(f'<text class="dp-word" x="{x:.1f}" y="{(grid.y(0) + grid.y(e.tokens)) / 2 + 4:.1f}" '
                     f'text-anchor="middle">{e.tokens}</text>')
    return parts


def _shown_edges(report: Report, grid: _Grid) -> list[Edge]:
    return [e for e in delay_edges(report.program) if e.tokens < grid.tokens]


def _critical(column: dict[str, int], grid: _Grid, path: tuple[Segment, ...]) -> list[str]:
    parts, before = [], None
    for s in path:
        first, last = column[s.visits[0]], column[s.visits[-1]]
        if before is not None:
            parts.append(f'<path class="dp-critical" marker-end="url(#dp-arrow)" '
                         f'd="{_curve(grid, before[0], before[1], first, s.token)}"/>')
        if last != first:
            y = grid.y(s.token)
            parts.append(f'<path class="dp-critical" d="M{grid.x(first)} {y}H{grid.x(last)}"/>')
        before = last, s.token
    return parts


def _curve(grid: _Grid, source: int, token: int, target: int, later: int) -> str:
    """From the right of one cell down to the left of another."""
    x0, y0 = (LEFT - 14, grid.y(token)) if source < 0 else (grid.sides[source][1] - grid.pad, grid.y(token))
    x1, y1 = grid.sides[target][0] + grid.pad, grid.y(later)
    bend = 0.5 * grid.pitch + 10
    return f"M{x0:.1f} {y0}C{x0 + bend:.1f} {y0} {x1 - bend:.1f} {y1} {x1:.1f} {y1}"


def _caption(report: Report, grid: _Grid) -> str:
    rows = f"{grid.rows} chunks of {grid.step} tokens" if grid.by_chunk else _tokens(grid, grid.tokens)
    text = f"Rows are block visits, columns are {rows}. " if grid.narrow else f"Columns are block visits, rows are {rows}. "
    if any(len(run) > 1 for run in grid.runs):
        text += "Numbers such as 2..9: the visits of these blocks as one. "
    if grid.brackets:
        text += "Brackets: the same blocks so many times in a row. "
    if any(report.types[o.name].tokens is not None for o in report.program.visits):
        text += "Partly filled: only that share of the tokens takes the visit. "
    if report.serial_blocks:
        alone = any(o.kind == "ffn" for r in report.schedule.serial_regions for o in r.ops)
        text += (f"Shaded: the serial region, {'feed-forward networks of ' * alone}{report.serial_blocks} of {report.visits} "
                 f"visits, run in chunks of {report.chunk} token{'s' * (report.chunk != 1)}. ")
    edges = delay_edges(report.program)
    if edges:
        spans = sorted({e.tokens for e in edges})
        far = f"{spans[0]}" if len(spans) == 1 else f"{spans[0]} to {spans[-1]}"
        drawn = sum(grid.tokens - e.tokens for e in edges if e.tokens < grid.tokens)
        text += (f"Thin lines: {f'the {len(edges)} delays' if len(edges) > 1 else 'the delay'} of {far} token{'s' * (far != '1')}"
                 f"{', drawn from the first token only' if drawn > SHOWN_EDGES else ''}. ")
    row = f"a row of {_tokens(grid, grid.tokens + grid.hidden)}"
    if grid.hidden:
        row += f" ({grid.hidden} of them not drawn)"
    steps = " in all steps" if report.program.denoise is not None else ""
    text += "One denoising step is drawn. " if steps else ""
    return text + f"Thick: a longest path of {row}, {report.depth_at(grid.real)} block visits{steps}."


def _tokens(grid: _Grid, count: int) -> str:
    """The first tokens of the row that is drawn, its pads or latents named."""
    real, more = min(count, grid.real), max(count - grid.real, 0)
    text = f"{real} token{'s' * (real != 1)}"
    return text + (f" and {more} {grid.after}{'s' * (more != 1)}" if more else "")
