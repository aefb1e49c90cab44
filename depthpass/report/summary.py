"""The six numbers that a reader asks for first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.report.costs import stock_kv_bytes
from depthpass.report.depths import depth_of_calls, formula_of
from depthpass.report.numbers import Number
from depthpass.report.runs import recursion_note

if TYPE_CHECKING:
    from depthpass.report.report import Report


def summary(report: Report) -> tuple[Number, ...]:
    """The six numbers that a reader asks for first, each beside the stock model's."""
    n, cost = report.seq_len, report.cost
    formula = formula_of(report, None)
    numbers = [
        Number("depth", "depth", report.depth_at(n), "", "; ".join([
            f"block visits{'' if formula.isdigit() else ': ' + formula}",
            *([_calls_note(depth_of_calls(report))] if report.program.reads_calls else []),
        ]), stock=report.program.blocks),
        Number("recursions", "recursions", report.recursions, "", recursion_note(report), stock=1),
        _all_parameters(report),
    ]
    if cost is None:
        numbers.append(Number("flops", "FLOPs", "-", "", "not counted: ask for the cost analysis"))
    else:
        stock = (cost.stock or cost).at("FLOPs forward", n, report.batch)
        numbers.append(Number("flops", "FLOPs", cost.at("FLOPs forward", n, report.batch), "FLOP", "forward", stock=stock))
    kv = report.kv_bytes
    numbers.append(Number("kv", "KV cache", "-" if kv is None else kv, "bytes", "" if kv is not None else "head counts not known",
                          stock=None if kv is None else stock_kv_bytes(report)))
    return (*numbers, _floor(report))


def _calls_note(x: Number) -> str:
    return f"{x.value} {x.label.removeprefix('depth ')}: {x.note}"


def _all_parameters(report: Report) -> Number:
    new = f"{report.new_parameters:,} new"
    if report.facts is None:
        return Number("parameters", "parameters", report.new_parameters, "parameters", "new ones alone", least=bool(
            report.unsized_parameters))
    stock, now, cost = report.facts.parameters, report.facts.parameters + report.new_parameters, report.cost
    if cost is not None and not report.unsized_parameters:
        # Without the blocks that no visit runs any more: what sharing saves.
        now = cost.at("parameters unique", report.seq_len, report.batch)
    return Number("parameters", "parameters", now, "parameters", new, stock=stock, least=bool(report.unsized_parameters))


def _floor(report: Report) -> Number:
    """The least time of a forward pass, where a machine was named."""
    if report.ceilings is None or report.cost is None:
        return Number("floor", "time floor", "-", "", "no machine named: --ceilings h200")
    forward = report.cost.floor(report.ceilings, report.seq_len, report.batch).rows()[0]
    stock = (report.cost.stock or report.cost).floor(report.ceilings, report.seq_len, report.batch).rows()[0]
    return Number("floor", "time floor", forward[1], "s", f"forward on {report.ceilings.device}", stock=stock[1])
