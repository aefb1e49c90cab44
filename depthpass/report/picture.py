"""The program over tokens as a picture: visits are columns, tokens are rows, delays lead down and back."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from depthpass.ir.program import Op, Program
from depthpass.report.critical import segments

if TYPE_CHECKING:
    from depthpass.report.model import Report

MAX_ROWS = 20
"""Tokens drawn one by one at most; wider chunks get one row each."""

CHUNKS = 3
PLAIN_ROWS = 4
WIDEST = 1180
LEFT, TOP, BOTTOM = 92, 50, 26
ROW, CHUNK_ROW = 26, 52


@dataclass(frozen=True)
class Edge:
    """A delay as it is drawn: from a column to an earlier or later one, some tokens further down.

    Column -1 is the embedding, the column after the last visit is the output.
    """

    source: int
    target: int
    tokens: int


def delay_edges(program: Program) -> tuple[Edge, ...]:
    """Where each delay reads and where its value first arrives, in columns of visits."""
    column = {o.name: i for i, o in enumerate(program.visits)}
    found = []
    for o in program.ops:
        if o.kind == "delay":
            found.append(Edge(_source(program, o.args[0], column), _target(program, o, column), o["tokens"]))
    return tuple(dict.fromkeys(found))


def _source(program: Program, value: str, column: dict[str, int]) -> int:
    """Last visit that a value comes from within its own token."""
    todo, seen, last = [value], set(), -1
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in column:
            last = max(last, column[name])
        elif program.defs[name].kind != "delay":
            todo += program.defs[name].args
    return last


def _target(program: Program, delay: Op, column: dict[str, int]) -> int:
    """First visit that a delayed value reaches within its own token."""
    todo, seen, first = [delay.name], set(), len(column)
    while todo:
        for user in program.users(todo.pop()):
            if not user.name or user.name in seen:
                continue
            seen.add(user.name)
            if user.name in column:
                first = min(first, column[user.name])
            elif user.kind != "delay":
                todo.append(user.name)
    return first


class _Grid:
    """Places of columns and rows.

    Attributes:
        real: real tokens of the row that is drawn; its pads follow.
        tokens: tokens drawn, ``hidden`` more pads are left out.
        step: tokens per line of the picture.
    """

    def __init__(self, report: Report) -> None:
        self.columns = report.visits
        chunk = report.chunk or 1
        self.by_chunk = 2 * chunk > MAX_ROWS
        if report.chunk is None:
            self.step, self.rows = 1, min(report.seq_len, max(PLAIN_ROWS, _longest(report) + 1, 1), MAX_ROWS)
        else:
            self.step = chunk if self.by_chunk else 1
            wanted = CHUNKS if self.by_chunk else min(CHUNKS * chunk, MAX_ROWS)
            self.rows = min(wanted, -(-report.seq_len // self.step))
        pads = report.types[report.program.output].pads
        self.real = max(1, min(self.rows * self.step - pads, report.seq_len))
        self.rows = min(self.rows, -(-(self.real + pads) // self.step))
        self.tokens = min(self.rows * self.step, self.real + pads)
        self.hidden = self.real + pads - self.tokens
        self.pitch = max(14.0, min(40.0, (WIDEST - LEFT - 60) / max(self.columns, 1)))
        self.cell = self.pitch - (8 if self.pitch > 24 else 4)
        self.width = round(LEFT + self.pitch * self.columns + 70)
        self.row = CHUNK_ROW if self.by_chunk else ROW
        self.height = TOP + self.row * self.rows + BOTTOM

    def x(self, column: int) -> float:
        """Centre of a column."""
        return round(LEFT + self.pitch * (column + 0.5), 1)

    def y(self, token: int) -> float:
        """Centre of the row that holds a token."""
        return TOP + self.row * (token // self.step) + self.row / 2

    def label(self, row: int) -> str:
        if not self.by_chunk:
            return f"token {row}" if row < self.real else f"pad {row - self.real + 1}"
        return f"{row * self.step}..{min((row + 1) * self.step, self.tokens) - 1}"


def _longest(report: Report) -> int:
    return sum(o["tokens"] for o in report.program.ops if o.kind == "delay")


def picture(report: Report) -> str:
    """An SVG element and its caption."""
    grid = _Grid(report)
    serial = {o.name for r in report.schedule.serial_regions for o in r.visits}
    path = tuple(s for s in segments(report.depths[None].critical_path(grid.real)) if s.token < grid.tokens)
    on_path = {(v, s.token // grid.step) for s in path for v in s.visits}
    parts = [
        f'<svg class="dp-picture" viewBox="0 0 {grid.width} {grid.height}" '
        f'style="width:{grid.width}px" role="img" '
        f'aria-label="{report.visits} block visits by {grid.tokens} tokens">',
        '<defs><marker id="dp-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" class="dp-arrowhead"/></marker></defs>',
        *_shade(report, grid, serial),
        *_headers(report, grid),
    ]
    for row in range(grid.rows):
        y = grid.y(row * grid.step)
        parts.append(f'<text class="dp-tick" x="{LEFT - 34}" y="{y + 4}" text-anchor="end">{grid.label(row)}</text>')
        parts.append(f'<circle class="dp-embed" cx="{LEFT - 18}" cy="{y}" r="4"/>')
        for j, o in enumerate(report.program.visits):
            kind = "dp-hot" if (o.name, row) in on_path else "dp-serial" if o.name in serial else "dp-parallel"
            parts.append(
                f'<rect class="dp-cell {kind}" x="{round(grid.x(j) - grid.cell / 2, 1)}" y="{y - 7}" '
                f'width="{round(grid.cell, 1)}" height="14" rx="3"><title>%{o.name}: block {o["index"]}, '
                f"{escape(grid.label(row))}</title></rect>"
            )
    parts += _faint(report, grid)
    parts += _critical(report, grid, path)
    parts.append("</svg>")
    return "".join(parts) + f'<p class="dp-caption">{escape(_caption(report, grid))}</p>'


def _shade(report: Report, grid: _Grid, serial: set[str]) -> list[str]:
    columns = [j for j, o in enumerate(report.program.visits) if o.name in serial]
    parts = []
    for run in _runs(columns):
        x0, x1 = grid.x(run[0]) - grid.pitch / 2, grid.x(run[-1]) + grid.pitch / 2
        parts.append(f'<rect class="dp-region" x="{x0:.1f}" y="{TOP - 6}" width="{x1 - x0:.1f}" '
                     f'height="{grid.row * grid.rows + 12}" rx="6"/>')
        per_chunk = 1 if grid.by_chunk else report.chunk or 1
        for row in range(per_chunk, grid.rows, per_chunk):
            y = TOP + grid.row * row
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


def _headers(report: Report, grid: _Grid) -> list[str]:
    every = 1 if grid.pitch >= 20 else 4
    parts = [f'<text class="dp-tick" x="{LEFT - 18}" y="{TOP - 14}" text-anchor="end">block</text>']
    for j, o in enumerate(report.program.visits):
        if j % every == 0:
            parts.append(
                f'<text class="dp-tick" x="{grid.x(j)}" y="{TOP - 14}" text-anchor="middle">{o["index"]}</text>'
            )
    return parts


def _faint(report: Report, grid: _Grid) -> list[str]:
    """Every delay once, from the first token."""
    return [
        f'<path class="dp-delay" d="{_curve(grid, e.source, 0, e.target, e.tokens)}"/>'
        for e in delay_edges(report.program)
        if e.tokens < grid.tokens
    ]


def _critical(report: Report, grid: _Grid, path: tuple) -> list[str]:
    column = {o.name: j for j, o in enumerate(report.program.visits)}
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
    half = grid.cell / 2
    x0, y0 = (LEFT - 14, grid.y(token)) if source < 0 else (grid.x(source) + half, grid.y(token))
    x1, y1 = grid.x(target) - half, grid.y(later)
    bend = 0.5 * grid.pitch + 10
    return f"M{x0:.1f} {y0}C{x0 + bend:.1f} {y0} {x1 - bend:.1f} {y1} {x1:.1f} {y1}"


def _caption(report: Report, grid: _Grid) -> str:
    rows = f"{grid.rows} chunks of {grid.step} tokens" if grid.by_chunk else f"{grid.tokens} tokens"
    text = f"Columns are block visits, rows are {rows}. "
    if report.serial_blocks:
        text += (f"Shaded: the serial region, {report.serial_blocks} of {report.visits} visits, run in chunks of "
                 f"{report.chunk} tokens. ")
    edges = delay_edges(report.program)
    if edges:
        text += f"Thin lines: the {len(edges)} delays, drawn from the first token only. "
    pads = grid.tokens + grid.hidden - grid.real
    row = f"a row of {grid.real} tokens" + (f" and {pads} pads" if pads else "")
    if grid.hidden:
        row += f" ({grid.hidden} of them not drawn)"
    return text + f"Thick: a longest path of {row}, {report.depth_at(grid.real)} block visits."
