"""Tables of a summary, as Markdown and for a terminal, and its JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from examples.harness.experiment import Experiment, Summary, value
from examples.harness.store import spread


def written(values: list[float], form: str) -> str:
    """Mean and, where they differ, the range."""
    s = spread(values)
    mean = form.format(s["mean"])
    low, high = form.format(s["min"]), form.format(s["max"])
    return mean if low == high else f"{mean} ({low} to {high})"


def results(summary: Summary, experiment: Experiment) -> list[list[str]]:
    """Heading and a row for each arm."""
    columns = experiment.columns(summary.settings)
    rows = [["arm", "lr (tried)", *columns]]
    for arm in summary.arms:
        runs = summary.runs[arm.name]
        cells = []
        for column in columns.values():
            path, form = (column, experiment.form) if isinstance(column, str) else column
            held = [v for r in runs if (v := _get(r, path)) is not None]
            some = "" if len(held) in (0, len(runs)) else f", {len(held)} of {len(runs)} seeds"
            cells.append(written(held, form) + some if held else "-")
        tried = ", ".join(f"{lr:g}" for lr in sorted(summary.sweep[arm.name]))
        rows.append([arm.name, f"{runs[0]['lr']:g} ({tried})", *cells])
    return rows


def _get(record: dict, path: str) -> float | None:
    try:
        return value(record, path)
    except (KeyError, TypeError):
        return None


def cost_table(summary: Summary) -> list[list[str]]:
    """Parameters, FLOPs, bytes, ms and KV of every arm."""
    rows = [["arm", "parameters", "depth", "FLOPs forward", "weight bytes", "KV bytes", "line bytes", "ms / step", "steps",
             "training FLOPs", "seconds"]]
    for arm in summary.arms:
        runs = summary.runs[arm.name]
        c = runs[0]["costs"]
        ms = [r["step_ms"] for r in runs if r["step_ms"] is not None]
        rows.append([
            arm.name, f"{c['parameters']:,}", str(c["depth"]), *(_short(c[k]) for k in (
                "FLOPs forward", "weight bytes", "KV bytes", "line bytes")),
            f"{min(ms):.0f}" if ms else "-", written([r["steps"] for r in runs], "{:.0f}"),
            written([r["flops"] for r in runs], "{:.2g}"), written([r["seconds"] for r in runs], "{:.0f}"),
        ])
    return rows


def _short(number: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in body])


def table(rows: list[list[str]], title: str) -> Table:
    grid = Table(title=title)
    for i, head in enumerate(rows[0]):
        grid.add_column(head, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        grid.add_row(*row)
    return grid


def page(summary: Summary, experiment: Experiment, command: str) -> str:
    """The tables with where and when they come from."""
    runs = [r for rs in summary.runs.values() for r in rs]
    dates, machines = sorted({r["date"] for r in runs}), sorted({r["machine"] for r in runs})
    seeds = sorted({len(rs) for rs in summary.runs.values()})
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    versions = sorted({f"torch {r['torch']}, transformers {r['transformers']}" for r in runs})
    about = (f"`{command}` · {', '.join(dates)} · {'; '.join(machines)} · {'; '.join(versions)} · "
             f"seeds: {count} · {summary.minutes:.1f} CPU minutes · mean (lowest to highest)")
    return "\n\n".join([about, markdown(results(summary, experiment)), "What the arms cost, for one row of "
                        f"{summary.settings.train.length} tokens (twins included):", markdown(cost_table(summary))])


def plain(summary: Summary, command: str) -> dict[str, Any]:
    """Everything, for a file."""
    sweep = {arm: {f"{lr:g}": score for lr, score in tried.items()} for arm, tried in summary.sweep.items()}
    return {
        "experiment": summary.name, "title": summary.title, "command": command, "settings": summary.settings,
        "minutes": summary.minutes,
        "arms": [a.plain() for a in summary.arms], "sweep": sweep,
        "runs": [r for rs in summary.runs.values() for r in rs], "others": summary.others,
    }
