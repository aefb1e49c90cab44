"""A search result as text: never without its controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.search.damped import text_of
from depthpass.search.statistics import Estimate

if TYPE_CHECKING:
    from depthpass.search.result import Found, SearchResult


def to_text(result: SearchResult) -> str:
    """Settings, best program and controls, differences, per-sample oracle, front, what the memo saved."""
    s, better = result.settings, "lower" if result.lower else "higher"
    lines = [
        f"Search over layer programs of {result.model} ({result.blocks} blocks): {s['method']}, {s['programs']} programs"
        f"{' per sample' if result.per_sample else ''}, score {s['score']} ({better} is better), seed {s['seed']}",
        f"{s['samples']} samples to search on, {s['held_out']} held out; 95 % intervals", "",
        *_table(result), "",
        f"best program: {text_of(result.best.layers)}",
    ]
    for c in result.controls.values():
        lines.append(f"control {c.name}: {c.what}")
        if c.difference is not None:
            lines.append(f"  held out, best minus {c.name}: {c.difference}{_reading(c.difference, result.lower)}")
    if not s["held_out"]:
        lines.append("nothing is held out: scores are of the samples that chose the programs, so they are too good")
    if result.per_sample is not None:
        lines += ["", *_oracle(result)]
    return "\n".join([*lines, "", *front_lines(result), "", f"block visits: {result.block_visits}"])


def front_lines(result: SearchResult) -> list[str]:
    rows = [(str(f.visits), str(f.searched), _held(f), text_of(f.layers)) for f in result.front]
    return ["Pareto front, score against visits", *_columns([("visits", "searched", "held out", "program"), *rows])]


def _table(result: SearchResult) -> list[str]:
    rows = [("", "visits", "searched", "held out", "programs", "mean of them"), _row("stock", result.stock, 1, None),
            _row("best", result.best, result.settings["scored"], None)]
    rows += [_row(f"control: {c.name}", c.best, c.programs, c.mean) for c in result.controls.values()]
    return _columns(rows)


def _row(name: str, entry: Found, programs: int, mean: float | None) -> tuple[str, ...]:
    return (name, str(entry.visits), str(entry.searched), _held(entry), str(programs), "" if mean is None else f"{mean:.4g}")


def _held(entry: Found) -> str:
    return "none" if entry.held_out is None else str(entry.held_out)


def _reading(difference: Estimate, lower: bool) -> str:
    if difference.low is None or difference.high is None:
        return "; too few samples to tell"
    sign = -1 if lower else 1
    ends = sorted((sign * difference.low, sign * difference.high))
    if ends[0] > 0:
        return "; the search is better"
    return "; the control is better" if ends[1] < 0 else "; no difference can be told"


def _oracle(result: SearchResult) -> list[str]:
    oracle = result.per_sample
    assert oracle is not None
    lines = [
        "a program for each sample, chosen with its answer in sight (an oracle, not a method):",
        f"  searched {oracle.score} with {oracle.visits:.3g} visits; random programs, same budget {oracle.random} with "
        f"{oracle.random_visits:.3g}",
        f"  searched minus random: {oracle.difference}{_reading(oracle.difference, result.lower)}",
    ]
    for share, text in ((oracle.shorter, "of the samples that stock has right, a shorter program is right, too"),
                        (oracle.fixed, "of the samples that stock has wrong, some program is right")):
        if share is not None:
            lines.append(f"  {100 * share:.0f} % {text}")
    return lines


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[j]) for r in rows) for j in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
