"""The program as a Graphviz graph.

Written by hand, without pydot: the text must be there without an extra, and quoting is all that a library would add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.ir.program import Op
from depthpass.ir.text import format_attr

if TYPE_CHECKING:
    from depthpass.report.report import Report

FILL = {"block": "#dbe9f6", "delay": "#fde8c8", "route": "#e6dcf2", "tap": "#e2f0d9", "output": "#e2f0d9"}


def to_dot(report: Report) -> str:
    """Ops as nodes in order of execution, dependences as edges; delays dashed with their number of tokens.

    Serial regions are boxes; visits on the critical path and the edges between them are bold.
    """
    critical = {v for s in report.critical_path for v in s.visits}
    lines = [
        f'digraph "{_escape(report.model)}" {{',
        '  rankdir=TB; fontname="sans-serif"; label="'
        + _escape(f"{report.model}: depth {report.number('depth').value} block visits") + '"; labelloc=t;',
        '  node [shape=box, style="rounded,filled", fillcolor="#f5f5f5", fontname="sans-serif", fontsize=10];',
        '  edge [fontname="sans-serif", fontsize=9, color="#555555"];',
    ]
    names = {id(o): o.name or f"{o.kind}{i}" for i, o in enumerate(report.program.ops)}
    for number, region in enumerate(report.schedule.regions):
        indent = "  "
        if region.serial:
            lines += [
                f"  subgraph cluster_{number} {{",
                f'    label="serial, chunks of {region.chunk} tokens"; style="rounded,filled"; color="#c0504d"; '
                'fillcolor="#fbeceb";',
            ]
            indent = "    "
        lines += [f"{indent}{_node(names[id(o)], o, o.name in critical)}" for o in region.ops]
        if region.serial:
            lines.append("  }")
    for o in report.program.ops:
        for a in o.args:
            lines.append(f"  {_edge(a, names[id(o)], o, a in critical and o.name in critical)}")
    return "\n".join([*lines, "}"])


def _node(name: str, o: Op, critical: bool) -> str:
    label = o.kind if not o.name else f"%{o.name} {o.kind}"
    detail = [f"{k} {format_attr(v)}" for k, v in o.attrs if k != "init"]
    if detail:
        label += "\\n" + _escape(", ".join(detail))
    style = ', penwidth=2.5, color="#b45309"' if critical else ""
    return f'"{name}" [label="{label}", fillcolor="{FILL.get(o.kind, "#f5f5f5")}"{style}];'


def _edge(source: str, target: str, o: Op, critical: bool) -> str:
    options = []
    if o.kind == "delay":
        # A delay may point backwards; it must not turn the ranks of the picture around.
        options += ['style="dashed"', 'color="#c0504d"', f'label="{o["tokens"]} tokens"', "constraint=false"]
    if critical:
        options += ["penwidth=2.5", 'color="#b45309"']
    return f'"{source}" -> "{target}"' + (f" [{', '.join(options)}]" if options else "") + ";"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
