"""The report for a terminal, with rich."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from depthpass.report.numbers import Section
from depthpass.report.text import MORE, heading, path_lines, size_line, spec_line, summary_rows, task_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from depthpass.report.report import Report

NARROW = 90
"""Columns, below which remarks go under their numbers."""
KEY_NUMBERS = {"depth", "depth_at_n", "serial_blocks", "new_parameters"}


def summary(report: Report) -> Group:
    """The summary as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "stock", "now", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for x, was, now, ratio in summary_rows(report):
        table.add_row(escape(x.label), was, Text(now, style="bold green"), ratio, escape(x.note))
    line = Text(f"{spec_line(report)}; {size_line(report)}")
    task = [Text(text) for text in task_line(report)]
    return Group(Text(heading(report), style="bold"), line, table, *task, Text(MORE, style="dim"))


def to_rich(report: Report) -> Group:
    """Everything: the summary, one table per section, then path, statements and what is not counted."""
    parts: list[RenderableType] = [*summary(report).renderables[:-1]]
    for section in report.sections:
        parts += [_title(section.title), _Numbers(section)]
    parts += [_title(f"Critical path (one of the longest, at n = {report.seq_len})"), _list(path_lines(report))]
    if report.complexity is not None:
        parts += [_title("What is proven about such programs"), _list([f"- {s}" for s in report.complexity])]
    parts += [_title("Not counted"), _list([f"- {line}" for line in report.not_counted], style="dim")]
    return Group(*parts)


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold cyan")


@dataclass(frozen=True)
class _Numbers:
    """A section's numbers with their remarks beside them, or below where the terminal is narrow."""

    section: Section

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(min_width=22, overflow="fold")
        table.add_column(overflow="fold")
        table.add_column(style="dim", overflow="fold")
        for x in self.section.shown:
            value = Text(x.text, style="bold green" if x.key in KEY_NUMBERS else "")
            below = Group(value, Text(x.remark, style="dim")) if narrow and x.remark else value
            table.add_row(escape(x.label), below, "" if narrow else escape(x.remark))
        yield table


def _list(lines: list[str], style: str = "") -> Table:
    table = Table.grid(padding=(0, 0, 0, 2))
    table.add_column(style=style, overflow="fold")
    for line in lines:
        table.add_row(escape(line))
    return table
