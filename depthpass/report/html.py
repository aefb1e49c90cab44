"""One self-contained HTML page: picture, charts, tables; no script, no network."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from depthpass.errors import InputError
from depthpass.log import fallback
from depthpass.report.chart import Series, line_chart
from depthpass.report.numbers import short, times
from depthpass.report.picture import picture
from depthpass.report.text import ahead_line, heading, path_lines, size_line, spec_line, summary_rows, task_line

if TYPE_CHECKING:
    from jinja2 import Environment

    from depthpass.report.report import Report
    from depthpass.report.tables import Comparison

CHART_POINTS = 240


def to_page(report: Report) -> str:
    """A whole HTML document."""
    return _pages().get_template("page.html").render(
        title=f"depthpass: {report.model}", content="report.html", **_content(report, "dp dp-page")) + "\n"


def to_fragment(report: Report) -> str:
    """The same content for a notebook cell."""
    return _pages().get_template("report.html").render(**_content(report, "dp"))


def to_table(table: Comparison, page: bool) -> str:
    """Reports side by side: a whole document, or what a notebook cell shows."""
    cells = table.cells()
    rows = [(row[0], list(zip(table.names, row[1:-1])), row[-1]) for row in cells[1:]]
    content = {"heading": table.title, "names": table.names, "rows": rows}
    if not page:
        return _pages().get_template("comparison.html").render(classes="dp", **content)
    return _pages().get_template("page.html").render(
        title=f"depthpass: {table.title}", content="comparison.html", classes="dp dp-page", **content) + "\n"


@cache
def _pages() -> Environment:
    """The templates in ``pages/``; everything that is put in is escaped unless marked as markup."""
    from jinja2 import Environment, PackageLoader  # comes with torch

    return Environment(loader=PackageLoader("depthpass.report", "pages"), autoescape=True)


def _content(report: Report, classes: str) -> dict[str, Any]:
    from markupsafe import Markup

    sections = [
        {"title": s.title, "rows": [
            (x, x.short_unit, "" if x.stock is None else short(x.stock, x.unit), "" if x.ratio is None else times(x.ratio))
            for x in s.shown
        ]}
        for s in report.sections
    ]
    return {
        "classes": classes, "heading": heading(report), "spec": spec_line(report), "size": size_line(report),
        "notes": [*ahead_line(report), *task_line(report)],
        "summary": summary_rows(report), "depth": report.number("depth").value, "picture": Markup(picture(report)),
        "narrow": Markup(picture(report, narrow=True)),
        "charts": [(title, Markup(svg)) for title, svg in _charts(report)], "sections": sections, "path": path_lines(report),
        "complexity": None if report.complexity is None else [str(s) for s in report.complexity],
        "not_counted": report.not_counted, "program": str(report.program),
    }


def _charts(report: Report) -> list[tuple[str, str]]:
    """Charts with their titles; none where what draws them is not installed."""
    try:
        charts = [("Depth against the length of a row", _depth_chart(report))]
    except InputError as error:
        fallback(f"a page has no charts: {error}", asked=True)
        return []
    return charts + (_group_charts(report) if report.serial_blocks else [])


def _depth_chart(report: Report) -> str:
    last = max(report.seq_len, 2)
    lengths = sorted({1 + i * (last - 1) // CHART_POINTS for i in range(CHART_POINTS + 1)})
    # Where every length is drawn, depth goes up in steps; otherwise the points stand for many lengths.
    steps = len(lengths) == last
    series = [
        Series("this program", tuple((n, report.depth_at(n)) for n in lengths), steps),
        Series("stock model", ((1, report.program.blocks), (last, report.program.blocks))),
    ]
    return line_chart(series, "n (tokens per row)", "depth (block visits)")


def _group_charts(report: Report) -> list[tuple[str, str]]:
    """What smaller chunks than the largest legal one would cost."""
    limit = min(r.limit or 1 for r in report.schedule.serial_regions)
    groups = sorted({1, *(2**i for i in range(limit.bit_length()) if 2**i <= limit), limit})
    if len(groups) < 2:
        return []
    n, rest = report.seq_len, report.visits - report.serial_blocks
    calls = tuple((g, report.serial_blocks * -(-(n + report.serial_pads) // g) + rest) for g in groups)
    charts = [("Serial block calls against the chunk size",
               line_chart([Series("calls", calls)], "chunk (tokens)", "block calls per row", doubling=True))]
    if report.cost is not None:
        moved = tuple((g, report.cost.at("weight bytes forward", n, report.batch, g)) for g in groups)
        charts.append(("Weights read in one forward pass against the chunk size",
                       line_chart([Series("bytes", moved)], "chunk (tokens)", "bytes", doubling=True)))
    return charts
