"""Columns of a picture: which visits stand in which, and the delays between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthpass.ir.program import Op, Program
from depthpass.report.brackets import brackets

if TYPE_CHECKING:
    from depthpass.report.report import Report

MOST = 48
"""Columns, beyond which visits of neighbouring blocks that all do the same share one."""
EDGE = 2
"""Visits at both ends of such a stretch that keep columns of their own."""


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
    column = columns_of(program)
    edges = []
    for o in program.ops:
        if o.kind == "delay":
            edges.append(Edge(_source(program, o.args[0], column), _target(program, o, column), o["tokens"]))
    return tuple(dict.fromkeys(edges))


def columns_of(program: Program) -> dict[str, int]:
    """Columns of visits by the names of their values; a feed-forward network that runs by itself stands in its block's."""
    column = {o.name: i for i, o in enumerate(program.visits)}
    return column | {o.name: _source(program, o.args[0], column) for o in program.ops if o.kind == "ffn"}


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
    todo, seen, first = [delay.name], set(), len(program.visits)
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


def folded(report: Report, gaps: set[int]) -> list[range]:
    """Columns as ranges of visits: one visit each, or, of a deep program, the inside of a stretch of neighbouring blocks.

    Args:
        gaps: visits that begin behind a gap.
    """
    visits, edges = report.program.visits, delay_edges(report.program)
    if len(visits) <= MOST:
        return [range(j, j + 1) for j in range(len(visits))]
    serial = {o.name for r in report.schedule.serial_regions for o in r.counted}
    like = [(o.name in serial, report.types[o.name].tokens) for o in visits]
    starts = {0, *gaps, *(j for j in range(1, len(visits))
                          if visits[j]["index"] <= visits[j - 1]["index"] or like[j] != like[j - 1])}
    for b in brackets([o["index"] for o in visits]):
        starts |= {b.first + i * ((b.last - b.first + 1) // b.times) for i in range(b.times + 1)}
    # Ends of few delays stand by themselves; many can only be shown as a sheaf.
    ends = {c for e in edges for c in (e.source, e.target)} if len(edges) <= MOST // 4 else set()
    starts |= {c + i for c in ends for i in (0, 1)}
    runs: list[range] = []
    bounds = sorted(s for s in starts if 0 <= s < len(visits))
    for first, end in zip(bounds, [*bounds[1:], len(visits)]):
        inside = range(first + EDGE, end - EDGE) if end - first > 3 * EDGE else range(end, end)
        runs += [range(j, j + 1) for j in range(first, inside.start)]
        runs += [inside] * bool(inside)
        runs += [range(j, j + 1) for j in range(max(inside.stop, inside.start), end)]
    return runs
