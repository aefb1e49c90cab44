"""Several reports side by side: specs against each other, and one spec at several groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from depthpass.errors import SpecError
from depthpass.passes import Pass
from depthpass.prompt import at_prompt
from depthpass.report.chart import Series, chart_file
from depthpass.report.numbers import Value, as_json, plain, short, times
from depthpass.report.report import Report
from depthpass.report.text import size_line
from depthpass.spec import SpecLike, load_spec

if TYPE_CHECKING:
    from rich.table import Table

    from depthpass.report.subject import Subject

SWEEP_KEYS = (
    "depth", "depth_at_n", "depth_rate", "serial_blocks", "recursions", "serial_block_calls", "delay_line_bytes",
    "cost_flops_forward", "cost_weight_bytes_forward", "cost_floor_forward", "cost_floor_training_step",
    "cost_floor_decoded_token",
)
"""Numbers that a sweep shows where they exist."""


@at_prompt
@dataclass(frozen=True)
class Comparison:
    """A table of numbers: one row per quantity, one column per report.

    Attributes:
        title: what is compared, at which n and batch.
        names: of the columns.
        reports: one per column.
        rows: (label, unit, values); None where a report does not have the number.
        ratios: show each value's ratio to the first column's.
    """

    title: str
    names: tuple[str, ...]
    reports: tuple[Report, ...]
    rows: tuple[tuple[str, str, tuple[Value | None, ...]], ...]
    ratios: bool = False

    def cells(self) -> list[list[str]]:
        """The table as text, header first."""
        head = ["", *self.names, "unit"]
        return [head, *([label, *(self._cell(v, values[0], unit) for v in values), unit] for label, unit, values in self.rows)]

    def _cell(self, value: Value | None, first: Value | None, unit: str) -> str:
        if value is None:
            return ""
        ratio = _ratio(value, first) if self.ratios else None
        return (short(value, unit) if unit else plain(value)) + ("" if ratio is None else f" ({times(ratio)})")

    def diff(self) -> Comparison:
        """Only the numbers in which the columns differ, each with its ratio to the first column's."""
        rows = tuple(row for row in self.rows if len(set(map(str, row[2]))) > 1)
        return replace(self, title=f"{self.title}; differences, ratios to {self.names[0]}", rows=rows, ratios=True)

    def _repr_html_(self) -> str:
        """The whole table: a notebook scrolls what is wider than it, where a prompt's lines are cut."""
        from depthpass.report.html import to_table

        return to_table(self, page=False)

    def to_html(self) -> str:
        """The table as one self-contained page."""
        from depthpass.report.html import to_table

        return to_table(self, page=True)

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(len(row[j]) for row in cells) for j in range(len(cells[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1])), row[-1]])
                 for row in cells]
        return "\n".join([self.title, "", *(line.rstrip() for line in lines)])

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        head, *body = self.cells()
        for j, name in enumerate(head):
            table.add_column(escape(name), justify="right" if 0 < j < len(head) - 1 else "left", overflow="fold")
        for row in body:
            table.add_row(*map(escape, row))
        return table

    def to_markdown(self) -> str:
        """A Markdown table."""
        head, *body = self.cells()
        rule = "|".join(["---", *(["---:"] * len(self.names)), "---"])
        rows = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in (head, *body)]
        return "\n".join([f"# {self.title}", "", rows[0], f"|{rule}|", *rows[1:], ""])

    def to_json(self) -> str:
        """The table and each whole report."""
        rows = [
            {"label": label, "unit": unit, "values": [as_json(v) for v in values]}
            | ({"ratios": [_ratio(v, values[0]) for v in values]} if self.ratios else {})
            for label, unit, values in self.rows
        ]
        return json.dumps({
            "schema": "depthpass.comparison", "version": 1, "title": self.title, "columns": list(self.names),
            "rows": rows, "reports": [r.to_dict() for r in self.reports],
        }, indent=2)

    def to_svg(self, keys: Sequence[str] = ("depth_at_n", "serial_block_calls")) -> str:
        """Numbers against the column names (which must be numbers, as in a sweep), as a file of its own."""
        series = []
        for key in keys:
            points = [(float(name), float(r.number(key).value)) for name, r in zip(self.names, self.reports)]
            series.append(Series(self.reports[0].number(key).label, tuple(sorted(points))))
        return chart_file(series, "group (tokens)", "block visits, block calls", doubling=True)


def compare(subject: Subject, specs: Sequence[tuple[str, SpecLike | None]], **options: Any) -> Comparison:
    """Reports of several specs on one model, side by side.

    Args:
        subject: the model.
        specs: (name, spec) pairs; spec None = the stock model.
        options: as for :func:`depthpass.report.report`.
    """
    if not specs:
        raise SpecError("compare: expected at least one spec.")
    reports = tuple(subject.report(spec, **options) for _, spec in specs)
    first = reports[0]
    return _table(f"{first.model} at {size_line(first)}", tuple(n for n, _ in specs), reports)


def sweep(subject: Subject, spec: SpecLike, groups: Sequence[int], **options: Any) -> Comparison:
    """Reports of one spec at several groups (the delay of its edges).

    Raises:
        SpecError: no pass of the spec has a field ``group``, or a group is out of range.
    """
    passes = load_spec(spec)
    if not any(_has_group(p) for p in passes):
        raise SpecError(f"sweep: expected a spec with a pass that has a field 'group', got "
                        f"{', '.join(p.name for p in passes)}.")
    if not groups or len(set(groups)) != len(groups):
        raise SpecError(f"group: expected different numbers of tokens, got {list(groups)}.")
    reports = tuple(subject.report(with_group(passes, g), **options) for g in groups)
    first = reports[0]
    title = f"{first.model} by group (tokens), at {size_line(first)}"
    return _table(title, tuple(map(str, groups)), reports, SWEEP_KEYS)


def with_group(passes: Sequence[Pass], group: int) -> list[Pass]:
    """The same passes with another group, where they have one."""
    return [replace(p, **{"group": group}) if _has_group(p) else p for p in passes]


def _has_group(p: Pass) -> bool:
    return any(f.name == "group" for f in fields(p))


def _table(
    title: str, names: tuple[str, ...], reports: tuple[Report, ...], keys: Sequence[str] | None = None
) -> Comparison:
    columns = [{x.key: x for s in r.sections for x in s.numbers} for r in reports]
    order = dict.fromkeys(key for numbers in columns for key in numbers)
    rows = []
    for key in order:
        if keys is not None and key not in keys:
            continue
        cells = [numbers.get(key) for numbers in columns]
        there = [c for c in cells if c is not None]
        if keys is None and all(c.repeats for c in there):
            continue
        unit = next((c.unit for c in there if c.unit), "")
        rows.append((there[0].label, unit, tuple(None if c is None else c.figure if c.least else c.value for c in cells)))
    return Comparison(title, names, reports, tuple(rows))


def _ratio(value: Value | None, first: Value | None) -> float | None:
    if isinstance(value, str | None) or isinstance(first, str | None) or not first:
        return None
    return float(value / first)
