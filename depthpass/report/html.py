"""One self-contained HTML page: picture, charts, tables; no script, no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from depthpass.report.chart import Series, line_chart
from depthpass.report.numbers import Number, Section, plain, short, times
from depthpass.report.picture import picture
from depthpass.report.text import heading, path_lines, spec_line

if TYPE_CHECKING:
    from depthpass.report.model import Report

TILES = ("depth_at_n", "serial_blocks", "recursions", "new_parameters")
CHART_POINTS = 240

STYLE = """
.dp{--ink:#1c2733;--soft:#5b6875;--line:#d8dee4;--paper:#ffffff;--card:#f6f8fa;--hot:#d9480f;--serial:#9ec5e8;
--parallel:#d3dae1;--region:#eaf3fb;--s0:#0b6bb8;--s1:#8a949e;
color:var(--ink);background:var(--paper);font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
max-width:1240px;margin:0 auto;padding:20px}
@media (prefers-color-scheme:dark){.dp.dp-page{--ink:#e6ebf0;--soft:#9aa7b4;--line:#37424d;--paper:#14191f;
--card:#1d242c;--hot:#ff8a4c;--serial:#2f6ea3;--parallel:#46515c;--region:#1a2a39;--s0:#5fb0f0;--s1:#8a949e}}
.dp h1{font-size:22px;margin:0 0 4px}.dp h2{font-size:16px;margin:28px 0 8px}.dp p{margin:4px 0}
.dp-sub,.dp-caption,.dp-note{color:var(--soft)}.dp-caption{font-size:13px;max-width:80ch}
.dp-tiles{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
.dp-tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:150px}
.dp-tile b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.dp-tile span{color:var(--soft);font-size:13px}
.dp-formula{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:17px;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:10px 16px;margin:12px 0;overflow-x:auto}
.dp-scroll{overflow-x:auto}.dp-charts{display:flex;flex-wrap:wrap;gap:28px}
.dp-charts figure{margin:0;flex:1 1 380px;max-width:520px}
.dp-charts figcaption{font-weight:600;margin-bottom:4px}
.dp table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.dp td,.dp th{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
.dp td.dp-num,.dp th.dp-num{text-align:right;white-space:nowrap}.dp th{color:var(--soft);font-weight:500;font-size:12px}
.dp pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto;
font-size:12px}
.dp svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
.dp-tick{fill:var(--soft);font-size:11px}.dp-axis{fill:var(--ink);font-size:12px}.dp-grid{stroke:var(--line)}
.dp-line{fill:none;stroke-width:2}.dp-line.dp-series0{stroke:var(--s0)}.dp-line.dp-series1{stroke:var(--s1)}
.dp-mark{stroke:none}.dp-mark.dp-series0{fill:var(--s0)}.dp-mark.dp-series1{fill:var(--s1)}
.dp-legend{display:flex;gap:18px;font-size:13px;color:var(--soft)}
.dp-key{display:inline-block;width:14px;height:3px;margin-right:6px;vertical-align:middle}
.dp-key.dp-series0{background:var(--s0)}.dp-key.dp-series1{background:var(--s1)}
.dp-region{fill:var(--region);stroke:var(--serial)}.dp-chunk{stroke:var(--serial);stroke-dasharray:4 4}
.dp-cell.dp-parallel{fill:var(--parallel)}.dp-cell.dp-serial{fill:var(--serial)}.dp-cell.dp-hot{fill:var(--hot)}
.dp-embed{fill:var(--parallel)}.dp-delay{fill:none;stroke:var(--soft);stroke-width:1;opacity:.45}
.dp-critical{fill:none;stroke:var(--hot);stroke-width:2.5}.dp-arrowhead{fill:var(--hot)}
"""


def to_page(report: Report) -> str:
    """A whole HTML document."""
    title = escape(f"depthpass: {report.model}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>body{{margin:0}}</style></head>\n"
        f'<body>{_body(report, "dp dp-page")}</body></html>\n'
    )


def to_fragment(report: Report) -> str:
    """The same content for a notebook cell."""
    return _body(report, "dp")


def _body(report: Report, classes: str) -> str:
    parts = [
        f'<div class="{classes}"><style>{STYLE}</style>',
        f"<h1>{escape(heading(report))}</h1>",
        f'<p class="dp-sub">spec: <code>{escape(spec_line(report))}</code> · at n = {report.seq_len} tokens per row, '
        f"{report.batch} rows</p>",
        f'<div class="dp-formula">depth(n) = {escape(str(report.number("depth").value))} block visits</div>',
        f'<div class="dp-tiles">{"".join(_tile(report.number(k)) for k in TILES)}</div>',
        f'<h2>The program over tokens</h2><div class="dp-scroll">{picture(report)}</div>',
        f'<h2>Charts</h2><div class="dp-charts">{"".join(_charts(report))}</div>',
        *(_table(s) for s in report.sections),
        f"<h2>Critical path</h2>{_list(path_lines(report))}",
    ]
    if report.complexity is not None:
        parts.append(f"<h2>What is proven about such programs</h2>{_list([str(s) for s in report.complexity])}")
    parts += [
        f"<h2>Not counted</h2>{_list(list(report.not_counted))}",
        f"<details><summary>Program text</summary><pre>{escape(str(report.program))}</pre></details></div>",
    ]
    return "\n".join(parts)


def _tile(x: Number) -> str:
    unit = "" if x.label.endswith(x.unit) else f": {x.unit}"
    against = "" if x.stock is None else f" · stock {plain(x.stock)}"
    label = escape(f"{x.label}{unit}{against}")
    return f'<div class="dp-tile"><b>{escape(x.figure)}</b><span>{label}</span></div>'


def _table(section: Section) -> str:
    head = (
        '<colgroup><col style="width:22%"><col style="width:19%"><col style="width:15%"><col style="width:10%">'
        '<col style="width:8%"><col></colgroup>'
        '<tr><th></th><th class="dp-num">value</th><th>unit</th><th class="dp-num">stock model</th>'
        '<th class="dp-num">ratio</th><th></th></tr>'
    )
    rows = "".join(_row(x) for x in section.shown)
    return f'<h2>{escape(section.title)}</h2><div class="dp-scroll"><table>{head}{rows}</table></div>'


def _row(x: Number) -> str:
    was = "" if x.stock is None else short(x.stock, x.unit)
    unit = x.short_unit
    ratio = "" if x.ratio is None else times(x.ratio)
    return (
        f'<tr><td>{escape(x.label)}</td><td class="dp-num">{escape(x.figure)}</td><td>{escape(unit)}</td>'
        f'<td class="dp-num">{escape(was)}</td><td class="dp-num">{ratio}</td>'
        f'<td class="dp-note">{escape(x.note)}</td></tr>'
    )


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _charts(report: Report) -> list[str]:
    found = [_figure("Depth against the length of a row", _depth_chart(report))]
    if report.serial_blocks:
        found += [_figure(title, svg) for title, svg in _group_charts(report)]
    return found


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


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
    n, rest = report.seq_len, report.visits - report.serial_blocks
    calls = tuple((g, report.serial_blocks * -(-(n + report.serial_pads) // g) + rest) for g in groups)
    found = [("Serial block calls against the chunk size",
              line_chart([Series("calls", calls)], "chunk (tokens)", "block calls per row", marks=True))]
    if report.cost is not None:
        moved = tuple((g, report.cost.at("weight bytes forward", n, report.batch, g)) for g in groups)
        found.append(("Weights read in one forward pass against the chunk size",
                      line_chart([Series("bytes", moved)], "chunk (tokens)", "bytes", marks=True)))
    return found
