"""Plain text and Markdown."""

from __future__ import annotations

from itertools import pairwise
from textwrap import wrap
from typing import TYPE_CHECKING

from depthpass.report.numbers import Number, plain, short, times

if TYPE_CHECKING:
    from depthpass.report.report import Report, Segment

SHOWN_SEGMENTS = 6
"""Segments of the critical path in text; the others are summed up."""


def heading(report: Report) -> str:
    """First line of every text form."""
    weights = "" if report.facts is None else (
        ", from its config, no weights read" if report.facts.from_config else ", from the model"
    )
    return f"depthpass report: {report.model}{weights}"


def spec_line(report: Report) -> str:
    """The passes in one line, with the options that say what they do even at their defaults: ``loop(start=1, times=2)``."""
    from depthpass.spec import load_spec

    if not report.spec:
        return "(none given)"
    return ", ".join(p.describe() for p in load_spec(report.spec)) or "(none given)"


def size_line(report: Report) -> str:
    """The lengths that all numbers are for."""
    return f"n = {report.seq_len:,} tokens, {report.batch} row{'s' * (report.batch != 1)}"


def to_summary(report: Report) -> str:
    """Six numbers with their ratios, in at most twelve lines."""
    cells = [["", "stock", "now", "ratio"], *([x.label, was, now, ratio] for x, was, now, ratio in summary_rows(report))]
    widths = [max(len(row[j]) for row in cells) for j in range(4)]
    notes = ["", *(x.note for x, *_ in summary_rows(report))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:])), note]).rstrip()
        for row, note in zip(cells, notes)
    ]
    head = [heading(report), *_wrapped(f"{spec_line(report)}; {size_line(report)}")]
    return "\n".join([*head, *lines, *ahead_line(report), *task_line(report), MORE])


MORE = "Not counted: embeddings, norms and tokens that generate() feeds back. All numbers: --full, report.to_text()."


def task_line(report: Report) -> list[str]:
    """Whether a task that was asked about fits; nothing without one."""
    s = report.sufficiency
    if s is None:
        return []
    covers = "covers this DAG" if s.sufficient else "does not cover this DAG"
    missing = f", missing {s.missing_depth:,} block visits" if s.missing_depth else ""
    width = "" if s.available_tokens is None or s.available_tokens >= s.needed_tokens else (
        f"; its widest level is {s.needed_tokens:,} tokens, at hand {s.available_tokens:,}")
    return [f"task {s.task}: {covers}: its DAG has depth {s.needed_depth:,}, at hand {s.available_depth:,}{missing}{width}"]


def ahead_line(report: Report) -> list[str]:
    """What attention sees of later tokens, and how masks are filled in; nothing for a causal program."""
    p = report.program
    if p.ahead is None:
        return []
    sees = "the whole row" if not p.ahead else f"blocks of {p.ahead:,} tokens"
    if p.denoise is None:
        return [f"attention sees {sees}"]
    each = " for each" if p.ahead else ""
    return [f"attention sees {sees}; {p.denoise['steps']:,} denoising steps{each}, depth is that of all, all else that of one"]


def _wrapped(text: str) -> list[str]:
    """At most two lines of 120 characters: a long spec is cut in the summary, the full report has all of it."""
    lines = wrap(text, 120)
    return lines if len(lines) <= 2 else [lines[0], lines[1][:116] + " ..."]


def summary_rows(report: Report) -> list[tuple[Number, str, str, str]]:
    """The summary: what is counted, the stock model's number, this program's, and their ratio."""
    from depthpass.report.summary import summary

    rows = []
    for x in summary(report):
        figure = short(x.value, x.unit) if not isinstance(x.value, str) else x.value
        rows.append((
            x, "" if x.stock is None else short(x.stock, x.unit), ("at least " if x.least else "") + figure,
            "" if x.ratio is None else times(x.ratio),
        ))
    return rows


def to_text(report: Report) -> str:
    """Aligned plain text with every number, the summary first."""
    lines = [*to_summary(report).splitlines()[:-1], "", f"spec: {spec_line(report)}"]
    numbers = [x for s in report.sections for x in s.shown]
    labels = max(len(x.label) for x in numbers)
    values = min(max(len(x.text) for x in numbers), 40)
    for section in report.sections:
        lines += ["", section.title]
        lines += [_line(x, labels, values) for x in section.shown]
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
    if len(gaps) != 1:
        return "at irregular distances" if gaps else "one token"
    return f"every {gaps[0]} tokens" if gaps[0] > 1 else "at every token"


def to_markdown(report: Report) -> str:
    """Tables with the summary first, the critical path, and the program text in a code block; large numbers in full."""
    lines = [f"# {heading(report)}", "", f"- spec: `{spec_line(report)}`", f"- {size_line(report)}", ""]
    lines += ["| | stock | now | ratio | note |", "|---|---:|---:|---:|---|"]
    lines += [f"| {' | '.join(map(_cell, (x.label, was, now, ratio, x.note)))} |" for x, was, now, ratio in summary_rows(report)]
    for section in report.sections:
        lines += ["", f"## {section.title}", "", "| | value | unit | stock | note |", "|---|---:|---|---:|---|"]
        lines += [_row(x) for x in section.shown]
    lines += ["", "## Critical path", "", *(f"- {line}" for line in path_lines(report))]
    if report.complexity is not None:
        lines += ["", "## What is proven about such programs", "", *(f"- {_cell(str(s))}" for s in report.complexity)]
    lines += ["", "## Not counted", "", *(f"- {line}" for line in report.not_counted)]
    lines += ["", "## Program", "", "```", str(report.program), "```", ""]
    return "\n".join(lines)


def _row(x: Number) -> str:
    stock = "" if x.stock is None else plain(x.stock) + (f" ({times(x.ratio)})" if x.ratio is not None else "")
    value = x.figure if x.out_of is not None else ("at least " if x.least else "") + plain(x.value)
    return "| " + " | ".join(map(_cell, (x.label, value, x.unit, stock, x.note))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
