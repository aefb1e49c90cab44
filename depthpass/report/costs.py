"""Sections of a report: state, work, bytes and times."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from depthpass.analysis.kv import BITS, bytes_per_token, later_slots
from depthpass.report.numbers import Number, Section

if TYPE_CHECKING:
    from depthpass.report.report import Report

SHOWN_ABOVE = {"parameters new", "KV slots", "KV bytes", "delay line bytes", "serial block calls", "serial steps"}
"""Quantities of the cost analysis that other sections show."""


def state_section(report: Report) -> Section:
    """What a cache holds after n tokens."""
    p, n = report.program, report.seq_len
    values = report.delay_line_values
    numbers = [Number("cache_slots", "cache slots", len(p.slots), "slots", "one per visit that keeps keys and values",
                      stock=p.blocks)]
    if report.kv_bytes is not None:
        note = f"keys and values of {report.batch} row{'s' * (report.batch != 1)}"
        if report.cost is not None:
            note += ", as far as windows and chunks still see them"
        numbers.append(Number("kv_bytes", "KV cache", report.kv_bytes, "bytes", note, stock=stock_kv_bytes(report)))
    numbers += _per_token(report)
    numbers.append(Number("delay_line_values", "values in delay lines", values, "values per row",
                          f"delayed streams: {len(report.delay_lines)}"))
    if report.facts is not None:
        numbers.append(Number("delay_line_bytes", "delay lines", values * report.facts.itemsize * report.batch, "bytes",
                              f"{report.batch} row{'s' * (report.batch != 1)}, independent of n"))
    return Section(f"State after n = {n} tokens", tuple(numbers))


def _per_token(report: Report) -> list[Number]:
    """Bytes that one more token takes, whole and with residuals of later visits, where a block is visited again."""
    facts = report.facts
    if facts is None or facts.kv_widths is None or not facts.head_dim or not later_slots(report.program):
        return []
    heads = [(facts.head_dim,) * (w // facts.head_dim) for w in facts.kv_widths]
    whole = bytes_per_token(report.program, heads, facts.itemsize)
    small = ", ".join(f"{bytes_per_token(report.program, heads, facts.itemsize, b):,} with residual_bits={b}" for b in BITS)
    return [Number("kv_bytes_per_token", "KV of one more token", whole, "bytes", f"one row, no windows; {small} (DepthCache)",
                   stock=facts.itemsize * sum(facts.kv_widths))]


def stock_kv_bytes(report: Report) -> int | None:
    """Bytes of the stock model's keys and values; None where its head counts are not known."""
    if report.cost is not None:
        return int((report.cost.stock or report.cost).at("KV bytes", report.seq_len, report.batch))
    facts = report.facts
    if facts is None or facts.kv_widths is None:
        return None
    return report.batch * report.seq_len * facts.itemsize * sum(facts.kv_widths)


def cost_sections(report: Report) -> list[Section]:
    """Work and bytes, and least times where a machine was named."""
    cost, n, batch = report.cost, report.seq_len, report.batch
    assert cost is not None
    parts = [replace(r, name=f"FLOPs forward, {r.name}") for r in cost.flop_rows(n, batch)]
    rows = [*parts, *(r for r in cost.rows(n, batch) if r.name not in SHOWN_ABOVE)]
    table = [Section(
        f"Cost at n = {n}, {batch} row{'s' * (batch != 1)}",
        tuple(Number(_key(r.name), r.name, r.value, _plural(r.unit), r.note, r.stock) for r in rows),
    )]
    if report.ceilings is not None:
        stock = (cost.stock or cost).floor(report.ceilings, n, batch).rows()
        bound = cost.floor(report.ceilings, n, batch).rows()
        machine = f"{report.ceilings.device}, {report.ceilings.source}"
        times = tuple(
            Number(_key(name), name, value, unit, "", was) for (name, value, unit), (_, was, _) in zip(bound, stock)
        )
        table.append(Section(f"Least times on {machine}", times))
    return table


def _key(name: str) -> str:
    return "cost_" + re.sub(r"\W+", "_", name.lower()).strip("_")


def _plural(unit: str) -> str:
    return f"{unit}s" if unit and unit not in ("FLOP", "s") and not unit.endswith("s") else unit
