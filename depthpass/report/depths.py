"""Sections of a report: the program, its depth, and what attention sees of later tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from depthpass.analysis.closed_form import format_formula
from depthpass.analysis.depth import WEIGHTS, depth
from depthpass.report.numbers import Number, Section

if TYPE_CHECKING:
    from depthpass.report.report import Report

FORMULA_LIMIT = 160
"""Longest closed form that is printed in full, in characters."""


def model_section(report: Report) -> Section:
    """The model and the program's visits."""
    p, facts = report.program, report.facts
    numbers = [
        Number("blocks", "physical blocks", p.blocks, "blocks"),
        Number("width", "width of the hidden stream", p.width, "values"),
        Number("visits", "block visits per token", report.visits, "visits", stock=p.blocks),
    ]
    retired = sum(o.kind == "retire" for o in p)
    if retired:
        numbers.append(Number("retired_blocks", "retired blocks", retired, "blocks",
                              "no visit runs them; in the state dict under their stock names, frozen"))
    if facts is not None:
        numbers += [
            Number("stock_parameters", "parameters of the stock model", facts.parameters, "parameters",
                   "tied ones count once"),
            Number("dtype", "weights", facts.dtype, "", f"{facts.itemsize} bytes each"),
        ]
    numbers.append(
        Number("new_parameters", "new parameters", report.new_parameters, "parameters",
               f"plus those of {', '.join(report.unsized_parameters)}" if report.unsized_parameters else "",
               least=bool(report.unsized_parameters))
    )
    return Section("Model", tuple(numbers))


def depth_section(report: Report) -> Section:
    """Depth of the output and of taps, with what it is made of."""
    n, main = report.seq_len, report.depths[None]
    blocks = report.program.blocks
    varying = report.lengths
    whole = varying is None or varying.formula is not None or not varying.follows_length
    exact = "exact for every n of at least 1" if whole else f"at the loop count of n = {n} only"
    numbers = [
        Number(f"loops.{name}", f"iterations of {name}", rule, "") for name, rule in (varying.rules if varying else ())
    ]
    numbers += [
        Number("depth", "depth", formula_of(report, None), "block visits", "; ".join((exact, *main.notes))),
        Number("depth_at_n", f"depth at n = {n}", main.at(n), "block visits", stock=blocks),
        Number("depth_rate", "growth", main.rate, "block visits per token",
               "in the long run" if varying is None else "in the long run, at this loop count"),
    ]
    counted: tuple[tuple[Literal["attention", "mlp"], str], ...] = (("attention", "attention layers"), ("mlp", "MLPs"))
    for weight, unit in counted:
        alike = sum(WEIGHTS[weight]) == 1 and all(o.kind != "ffn" for o in report.program)
        weighed = main if alike else depth(report.program, weight=weight)
        numbers.append(Number(f"depth_{weight}_at_n", f"longest path through {unit}", weighed.at(n), unit, stock=blocks))
    if report.program.reads_calls:
        numbers.append(depth_of_calls(report))
    for tap, d in report.depths.items():
        if tap is not None:
            numbers += [
                Number(f"depth.{tap}", f"depth of tap {tap}", formula_of(report, tap), "block visits"),
                Number(f"depth_at_n.{tap}", f"depth of tap {tap} at n = {n}", d.at(n), "block visits"),
            ]
    return Section("Depth", tuple(numbers))


def depth_of_calls(report: Report) -> Number:
    """Depth where it depends on how tokens are split into calls (KV policies ``last`` and ``mod:k``)."""
    program, note = report.program, "cached keys of earlier calls come from later iterations: the number of calls counts"
    if any(o.kind == "delay" for o in program):
        if any(o.kind == "pad" for o in program):
            return Number("depth_calls", "depth of n calls of one token", "not derived for pads with delays", "", note)
        return Number("depth_calls", "depth of n calls of one token", format_formula(depth(program, calls=True).formula),
                      "block visits", note)
    import sympy

    from depthpass.analysis.closed_form import n

    m = sympy.Symbol("m", nonnegative=True, integer=True)
    formula = sympy.expand(depth(program, calls=True).formula.subs(n, m + 1))
    return Number("depth_calls", "depth after a prompt and m calls of one token", format_formula(formula), "block visits",
                  note)


def ahead_sections(report: Report) -> list[Section]:
    """What attention sees of later tokens, and how masks are filled in; nothing for a causal program."""
    p, n, facts = report.program, report.seq_len, report.facts
    if p.ahead is None:
        return []
    sees = "the whole row" if not p.ahead else f"earlier blocks and the own one, of {p.ahead} tokens"
    numbers = [Number("attention_sees", "attention sees", sees, "",
                      "no cache: every pass runs the whole row" if not p.ahead else "a cache holds finished blocks")]
    if p.denoise is None:
        return [Section("Attention to later tokens", tuple(numbers))]
    steps, each = p.denoise["steps"], len(p.visits)
    numbers += [
        Number("denoising_steps", "denoising steps", steps, "steps", "for every block" if p.ahead else "at most one per mask"),
        Number("denoising_order", "positions are written by", p.denoise["order"], ""),
        Number("denoising_depth", f"depth of all steps at n = {n} masks", report.depth_at(n), "block visits",
               f"T * L with L = {report.depths[None].at(1)}: each step reads all that was written; {each} visits a step"),
    ]
    size = None if facts is None else facts.vocabulary
    if size is not None:
        numbers.append(Number("denoising_bits", "handed from step to step", round(math.log2(size), 3), "bits per written token",
                              f"log2 of a vocabulary of {size}: " + ("ids pass" if p.denoise["carry"] else "only ids pass")))
    if p.denoise["carry"]:
        numbers.append(Number("denoising_carry", "continuous state beside them", p.denoise["carry"], "values per token",
                              "no bottleneck; nothing is proven about programs with one"))
    return [Section("Denoising", tuple(numbers))]


def formula_of(report: Report, output: str | None) -> str:
    """A closed form, or its rate where it is too long to read."""
    text = format_formula(report.depth if output is None else report.depths[output].formula)
    if len(text) <= FORMULA_LIMIT:
        return text
    rate = report.depths[output].rate
    return f"{rate}*n + a bounded remainder; {len(text)} characters in full, see report.depths[{output!r}].formula"
