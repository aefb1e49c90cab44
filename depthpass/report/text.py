"""Plain text and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from depthpass.report.numbers import Number

if TYPE_CHECKING:
    from depthpass.report.model import Report, Segment

SHOWN_SEGMENTS = 6
"""Segments of the critical path in text; the others are summed up."""


def heading(report: Report) -> str:
    """First line of every text form."""
    weights = "" if report.facts is None else (
        ", from its config, no weights read" if report.facts.from_config else ", from the model"
    )
    return f"depthpass report: {report.model}{weights}"


def spec_line(report: Report) -> str:
    """The passes in one line: ``turboconn(group=4), ...``."""
    passes = report.spec.get("passes", ()) if report.spec else ()
    return ", ".join(_pass_text(p) for p in passes) or "(none given)"


def _pass_text(entry: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in entry.items() if k != "pass")
    return f"{entry['pass']}({options})"


def to_text(report: Report) -> str:
    """Aligned plain text, also used where the output is not a terminal."""
    lines = [
        heading(report),
        f"spec: {spec_line(report)}",
        f"at n = {report.seq_len} tokens per row, {report.batch} rows",
    ]
    numbers = [x for s in report.sections for x in s.numbers]
    labels = max(len(x.label) for x in numbers)
    values = min(max(len(x.text) for x in numbers), 40)
    for section in report.sections:
        lines += ["", section.title]
        lines += [_line(x, labels, values) for x in section.numbers]
    lines += ["", f"Critical path (one of the longest, at n = {report.seq_len})"]
    lines += [f"  {line}" for line in path_lines(report)]
    if report.complexity is not None:
        lines += ["", "What is proven about such programs"]
        lines += [f"  - {s}" for s in report.complexity]
    lines += ["", "Not counted"]
    lines += [f"  - {line}" for line in report.not_counted]
    return "\n".join(lines)


def _line(x: Number, labels: int, values: int) -> str:
    remark = f"  ({x.remark})" if x.remark else ""
    return f"  {x.label:<{labels}}  {x.text:<{values}}{remark}".rstrip()


def path_lines(report: Report) -> list[str]:
    """The critical path, its middle summed up."""
    path = report.critical_path
    if not path:
        return ["no block visit lies on it"]
    if len(path) <= SHOWN_SEGMENTS + 1:
        return _lead(report) + [str(s) for s in path]
    head, tail = path[: SHOWN_SEGMENTS // 2], path[-(SHOWN_SEGMENTS // 2) :]
    middle = path[len(head) : len(path) - len(tail)]
    visits = sum(len(s.visits) for s in middle)
    return [
        *_lead(report), *map(str, head),
        f"... {len(middle)} more tokens, {visits} block visits ({_pace(middle)})", *map(str, tail),
    ]


def _lead(report: Report) -> list[str]:
    if report.path_is_whole:
        return []
    shown = sum(len(s.visits) for s in report.critical_path)
    return [f"(its last {shown:,} of {report.depth_at(report.seq_len):,} block visits)"]


def _pace(path: tuple[Segment, ...]) -> str:
    gaps = sorted({b.token - a.token for a, b in pairwise(path)})
    return f"every {gaps[0]} tokens" if len(gaps) == 1 else "at irregular distances" if gaps else "one token"


def to_markdown(report: Report) -> str:
    """Tables, the critical path, and the program text in a code block."""
    lines = [
        f"# {heading(report)}", "",
        f"- spec: `{spec_line(report)}`",
        f"- n = {report.seq_len} tokens per row, {report.batch} rows",
    ]
    for section in report.sections:
        lines += ["", f"## {section.title}", "", "| | value | unit | stock | note |", "|---|---:|---|---:|---|"]
        lines += [_row(x) for x in section.numbers]
    lines += ["", "## Critical path", "", *(f"- {line}" for line in path_lines(report))]
    if report.complexity is not None:
        lines += ["", "## What is proven about such programs", "", *(f"- {_cell(str(s))}" for s in report.complexity)]
    lines += ["", "## Not counted", "", *(f"- {line}" for line in report.not_counted)]
    lines += ["", "## Program", "", "```", str(report.program), "```", ""]
    return "\n".join(lines)


def _row(x: Number) -> str:
    from depthpass.report.numbers import plain

    stock = "" if x.stock is None else plain(x.stock) + (f" ({plain(x.ratio)}x)" if x.ratio is not None else "")
    return "| " + " | ".join(map(_cell, (x.label, x.figure, x.unit, stock, x.note))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
