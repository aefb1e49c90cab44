"""The numbers of a report, section by section, and what they leave out."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from depthpass.analysis.closed_form import format_formula
from depthpass.analysis.cost.build import visit_equivalents
from depthpass.analysis.cost.visits import route_share
from depthpass.analysis.depth import WEIGHTS, depth
from depthpass.analysis.kv import BITS, bytes_per_token, later_slots
from depthpass.analysis.routing import reads_future, unrouted_visits, without_routes
from depthpass.ir.program import plain as stock_program
from depthpass.ir.shares import by_route
from depthpass.report.numbers import Number, Section, plain
from depthpass.schedule.regions import schedule

if TYPE_CHECKING:
    from depthpass.report.model import Report

STACKS = 8
"""Stacked sets that are named in text; JSON has them all."""

FORMULA_LIMIT = 160
"""Longest closed form that is printed in full, in characters."""

SHOWN_ABOVE = {"parameters new", "KV slots", "KV bytes", "delay line bytes", "serial block calls", "serial steps"}
"""Quantities of the cost analysis that other sections show."""

NOT_COUNTED = (
    "Depth counts block visits; embedding, norms, head and new linear maps, gates and routers weigh 0. It is the "
    "longest path of the unrolled graph: an upper bound on the serial steps that one input needs.",
    "Depth is that of one forward pass over n given tokens; tokens that generate() feeds back add their own passes.",
)


def sections(report: Report) -> tuple[Section, ...]:
    """All sections in the order in which they are shown."""
    found = [_model(report), _depth(report), *_ahead(report), *_routing(report), _schedule(report), _state(report)]
    if report.cost is not None:
        found += _cost(report)
    if report.sufficiency is not None:
        found.append(_task(report))
    return _without_repeats(found)


REPEATS = {
    "depth_at_n": "depth", "depth_attention_at_n": "depth_at_n", "depth_mlp_at_n": "depth_at_n", "depth_max_at_n": "depth_at_n",
    "cost_flops_decode_deepest_token": "cost_flops_decode", "cost_kv_bytes_whole_slots": "kv_bytes",
    "cost_kv_bytes_read_decode": "kv_bytes", "cost_kv_bytes_read_decode_deepest_token": "cost_kv_bytes_read_decode",
    "cost_decode_block_calls": "visits", "cache_slots": "visits", "token_visits_max": "visits",
    "cost_parameters_unique": "stock_parameters", "token_steps": "recursions",
}
"""Rows that repeat another as long as both have one value."""

IDLE = {"delay_line_values": 0, "delay_line_bytes": 0, "cost_weight_bytes_per_serial_step": 0, "depth_rate": 0,
        "token_steps": 1}
"""Values that say nothing but that no stream is delayed."""


def _without_repeats(found: list[Section]) -> tuple[Section, ...]:
    """Mark what people need not read twice."""
    values = {x.key: x.value for s in found for x in s.numbers}

    def repeats(x: Number) -> bool:
        said = x.key in REPEATS and str(x.value) == str(values.get(REPEATS[x.key]))
        return said or IDLE.get(x.key) == x.value

    return tuple(replace(s, numbers=tuple(replace(x, repeats=repeats(x)) for x in s.numbers)) for s in found)


def summary(report: Report) -> tuple[Number, ...]:
    """The six numbers that a reader asks for first, each beside the stock model's."""
    n, cost = report.seq_len, report.cost
    formula = _formula(report, None)
    found = [
        Number("depth", "depth", report.depth_at(n), "", "; ".join([
            f"block visits{'' if formula.isdigit() else ': ' + formula}",
            *([_calls_note(_depth_of_calls(report))] if report.program.reads_calls else []),
        ]), stock=report.program.blocks),
        Number("recursions", "recursions", report.recursions, "", _recursion_note(report), stock=1),
        _all_parameters(report),
    ]
    if cost is None:
        found.append(Number("flops", "FLOPs", "-", "", "not counted: ask for the cost analysis"))
    else:
        stock = (cost.stock or cost).at("FLOPs forward", n, report.batch)
        found.append(Number("flops", "FLOPs", cost.at("FLOPs forward", n, report.batch), "FLOP", "forward", stock=stock))
    kv = report.kv_bytes
    found.append(Number("kv", "KV cache", "-" if kv is None else kv, "bytes", "" if kv is not None else "head counts not known",
                        stock=None if kv is None else _stock_kv_bytes(report)))
    return (*found, _floor(report))


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
    found = report.cost.floor(report.ceilings, report.seq_len, report.batch).rows()[0]
    stock = (report.cost.stock or report.cost).floor(report.ceilings, report.seq_len, report.batch).rows()[0]
    return Number("floor", "time floor", found[1], "s", f"forward on {report.ceilings.device}", stock=stock[1])


def _model(report: Report) -> Section:
    p, facts = report.program, report.facts
    found = [
        Number("blocks", "physical blocks", p.blocks, "blocks"),
        Number("width", "width of the hidden stream", p.width, "values"),
        Number("visits", "block visits per token", report.visits, "visits", stock=p.blocks),
    ]
    retired = sum(o.kind == "retire" for o in p)
    if retired:
        found.append(Number("retired_blocks", "retired blocks", retired, "blocks",
                            "no visit runs them; in the state dict under their stock names, frozen"))
    if facts is not None:
        found += [
            Number("stock_parameters", "parameters of the stock model", facts.parameters, "parameters",
                   "tied ones count once"),
            Number("dtype", "weights", facts.dtype, "", f"{facts.itemsize} bytes each"),
        ]
    found.append(
        Number("new_parameters", "new parameters", report.new_parameters, "parameters",
               f"plus those of {', '.join(report.unsized_parameters)}" if report.unsized_parameters else "",
               least=bool(report.unsized_parameters))
    )
    return Section("Model", tuple(found))


def _depth(report: Report) -> Section:
    n, main = report.seq_len, report.depths[None]
    blocks = report.program.blocks
    varying = report.lengths
    whole = varying is None or varying.formula is not None or not varying.follows_length
    exact = "exact for every n of at least 1" if whole else f"at the loop count of n = {n} only"
    found = [
        Number(f"loops.{name}", f"iterations of {name}", rule, "") for name, rule in (varying.rules if varying else ())
    ]
    found += [
        Number("depth", "depth", _formula(report, None), "block visits", exact),
        Number("depth_at_n", f"depth at n = {n}", main.at(n), "block visits", stock=blocks),
        Number("depth_rate", "growth", main.rate, "block visits per token",
               "in the long run" if varying is None else "in the long run, at this loop count"),
    ]
    counted: tuple[tuple[Literal["attention", "mlp"], str], ...] = (("attention", "attention layers"), ("mlp", "MLPs"))
    for weight, unit in counted:
        alike = sum(WEIGHTS[weight]) == 1 and all(o.kind != "ffn" for o in report.program)
        weighed = main if alike else depth(report.program, weight=weight)
        found.append(Number(f"depth_{weight}_at_n", f"longest path through {unit}", weighed.at(n), unit, stock=blocks))
    if report.program.reads_calls:
        found.append(_depth_of_calls(report))
    for tap, d in report.depths.items():
        if tap is not None:
            found += [
                Number(f"depth.{tap}", f"depth of tap {tap}", _formula(report, tap), "block visits"),
                Number(f"depth_at_n.{tap}", f"depth of tap {tap} at n = {n}", d.at(n), "block visits"),
            ]
    return Section("Depth", tuple(found))


def _depth_of_calls(report: Report) -> Number:
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


def _ahead(report: Report) -> list[Section]:
    """What attention sees of later tokens, and how masks are filled in; nothing for a causal program."""
    p, n, facts = report.program, report.seq_len, report.facts
    if p.ahead is None:
        return []
    sees = "the whole row" if not p.ahead else f"earlier blocks and the own one, of {p.ahead} tokens"
    found = [Number("attention_sees", "attention sees", sees, "",
                    "no cache: every pass runs the whole row" if not p.ahead else "a cache holds finished blocks")]
    if p.denoise is None:
        return [Section("Attention to later tokens", tuple(found))]
    steps, each = p.denoise["steps"], len(p.visits)
    found += [
        Number("denoising_steps", "denoising steps", steps, "steps", "for every block" if p.ahead else "at most one per mask"),
        Number("denoising_order", "positions are written by", p.denoise["order"], ""),
        Number("denoising_depth", f"depth of all steps at n = {n} masks", report.depth_at(n), "block visits",
               f"T * L with L = {report.depths[None].at(1)}: each step reads all that was written; {each} visits a step"),
    ]
    size = None if facts is None else facts.vocabulary
    if size is not None:
        found.append(Number("denoising_bits", "handed from step to step", round(math.log2(size), 3), "bits per written token",
                            f"log2 of a vocabulary of {size}: " + ("ids pass" if p.denoise["carry"] else "only ids pass")))
    if p.denoise["carry"]:
        found.append(Number("denoising_carry", "continuous state beside them", p.denoise["carry"], "values per token",
                            "no bottleneck; nothing is proven about programs with one"))
    return [Section("Denoising", tuple(found))]


def _routing(report: Report) -> list[Section]:
    """Whether the program is causal, and how many visits a token takes; nothing for a program without routes."""
    p, n = report.program, report.seq_len
    routes = [o for o in p if o.kind == "route"]
    if not routes:
        return []
    future = reads_future(p)
    found = [Number(
        "causal", "causal", "no" if future else "yes", "",
        f"{future} chooses with scores of later tokens: it scores whole rows, generate() refuses it" if future else
        "no token depends on later ones: it decodes as it scores",
    )]
    given = by_route(p, report.ratios)
    shares: dict[str, Number] = {}
    for o in routes:
        label, share = o["label"] or f"%{o.name}", route_share(o, given)
        expected = o.name in given or o["rule"] == "topk"
        note = f"rule {o['rule']}" + ("" if expected else "; depends on the data, every token at most: give ratios")
        shares[label] = Number(f"share.{label}", f"share that {label} takes", float(share), "of the tokens", note)
    found += shares.values()
    least, lowest = unrouted_visits(p), without_routes(p)
    if lowest is not None:
        found.append(Number("depth_min_at_n", f"least depth at n = {n}", depth(lowest).at(n), "block visits",
                            "no route takes a token", stock=p.blocks))
    found += [
        Number("depth_max_at_n", f"largest depth at n = {n}", report.depth_at(n), "block visits",
               "over all choices that routes may make", stock=p.blocks),
        Number("token_visits_min", "visits of a token, at least", least, "block visits", "no route takes it"),
        Number("token_visits_expected", "visits of a token, expected", float(visit_equivalents(p, given)), "block visits",
               "at these shares"),
        Number("token_visits_max", "visits of a token, at most", len(p.visits), "block visits", "every route takes it"),
    ]
    losses = {o["name"]: o["coefficient"] for o in p.losses}
    if losses:
        words = ", ".join(f"{name} ({plain(c)})" for name, c in losses.items())
        found.append(Number("training_losses", "training losses", words, "", "added to outputs.loss; also outputs.losses"))
    return [Section("Routing", tuple(found))]


def _formula(report: Report, output: str | None) -> str:
    text = format_formula(report.depth if output is None else report.depths[output].formula)
    if len(text) <= FORMULA_LIMIT:
        return text
    rate = report.depths[output].rate
    return f"{rate}*n + a bounded remainder; {len(text)} characters in full, see report.depths[{output!r}].formula"


def _schedule(report: Report) -> Section:
    p, n = report.program, report.seq_len
    stock = schedule(stock_program(p.model, p.blocks, p.width))
    chunk = report.chunk
    swept = ()
    if (policy := report.fixed_point) is not None and report.serial_blocks:
        note = policy.approximate or "sweeps over all tokens at once, same numbers; recursions and calls are the token loop's"
        swept = (Number("fixed_point", "serial regions run as", str(policy), "", note),)
    alone = (Number("latents", "latents", p.latents, "positions", "each runs by itself, fed with the output of the one before; "
                    "n tokens stand before them"),) if p.latents else ()
    return Section("Schedule", (
        *alone,
        Number("serial_blocks", "serial blocks", report.serial_blocks, "block visits",
               "on a delay cycle; all others run over the whole row at once", out_of=report.visits),
        Number("chunk", "chunk", chunk if chunk is not None else "the whole row", "tokens" if chunk is not None else "",
               "tokens that a serial region runs together"),
        Number("recursions", "recursions", report.recursions, "runs through one block", _recursion_note(report), stock=1),
        Number("token_steps", "steps of the token loop", report.token_steps, "steps", _loop_note(report), stock=1),
        Number("serial_block_calls", "serial block calls", report.serial_block_calls, "block calls",
               "one after another for the whole row", stock=stock.steps(n)),
        *_levels(report),
        *_stacks(report),
        *swept,
    ))


def _levels(report: Report) -> list[Number]:
    """What runs the token loops of a training call; nothing where there are none."""
    levels = {r.level: r.reason for r in report.lowered if r.serial}
    note = "; ".join(f"{level}: {reason}" for level, reason in levels.items() if reason)
    return [Number("levels", "token loops run on", ", ".join(levels), "level",
                   note or "in training; see depthpass show --lowered")] if levels else []


def _stacks(report: Report) -> list[Number]:
    """What an incremental step runs as one call; nothing where it stacks nothing."""
    found = []
    for i, step in enumerate(report.schedule.stacked):
        # The first step is the one that decoding takes.
        key = f".{step.tokens}" if i else ""
        up_to = "a step of 1 token" if step.tokens == 1 else f"a step of up to {step.tokens} tokens"
        sets = [f"block {s.index}: {' '.join(f'%{n}' for n in s.names)}" for s in step.stacks]
        shown = sets if len(sets) <= STACKS else [*sets[: STACKS - 1], f"{len(sets) - STACKS + 1} more"]
        found += [
            Number(f"step_block_calls{key}", f"block calls of {up_to}", step.calls, "block calls",
                   "visits without a path between them run as rows of one call", stock=report.program.blocks),
            Number(f"stacked_visits{key}", f"stacked in {up_to}", sum(len(s.visits) for s in step.stacks),
                   "block visits", "; ".join(shown), out_of=report.visits),
        ]
    return found


def _recursion_note(report: Report) -> str:
    """Where the number comes from: visits of a token, steps of the token loop, or both."""
    block = report.most_run_block
    visits = [(o, r.serial) for r in report.schedule.regions for o in r.visits if o["index"] == block]
    looped = sum(serial for _, serial in visits)
    parts = []
    if looped:
        parts.append((f"{looped} visits x " if looped > 1 else "") + _loop_note(report))
    if len(visits) - looped and len(visits) > 1:
        parts.append(f"{len(visits) - looped} visits of a token")
    rules = () if report.lengths is None else report.lengths.rules
    return "; ".join([" + ".join(parts) or "no block runs twice", *(f"{name}: {rule}" for name, rule in rules)])


def _loop_note(report: Report) -> str:
    if not report.serial_blocks:
        return "no token loop"
    return f"ceil((n + {report.serial_pads} pads) / chunk)" if report.serial_pads else "ceil(n / chunk)"


def _state(report: Report) -> Section:
    p, n = report.program, report.seq_len
    values = report.delay_line_values
    found = [Number("cache_slots", "cache slots", len(p.slots), "slots", "one per visit that keeps keys and values",
                    stock=p.blocks)]
    if report.kv_bytes is not None:
        note = f"keys and values of {report.batch} rows"
        if report.cost is not None:
            note += ", as far as windows and chunks still see them"
        found.append(Number("kv_bytes", "KV cache", report.kv_bytes, "bytes", note, stock=_stock_kv_bytes(report)))
    found += _per_token(report)
    found.append(Number("delay_line_values", "values in delay lines", values, "values per row",
                        f"delayed streams: {len(report.delay_lines)}"))
    if report.facts is not None:
        found.append(Number("delay_line_bytes", "delay lines", values * report.facts.itemsize * report.batch, "bytes",
                            f"{report.batch} rows, independent of n"))
    return Section(f"State after n = {n} tokens", tuple(found))


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


def _stock_kv_bytes(report: Report) -> int | None:
    if report.cost is not None:
        return int((report.cost.stock or report.cost).at("KV bytes", report.seq_len, report.batch))
    facts = report.facts
    if facts is None or facts.kv_widths is None:
        return None
    return report.batch * report.seq_len * facts.itemsize * sum(facts.kv_widths)


def _cost(report: Report) -> list[Section]:
    cost, n, batch = report.cost, report.seq_len, report.batch
    assert cost is not None
    parts = [replace(r, name=f"FLOPs forward, {r.name}") for r in cost.flop_rows(n, batch)]
    rows = [*parts, *(r for r in cost.rows(n, batch) if r.name not in SHOWN_ABOVE)]
    table = [Section(
        f"Cost at n = {n}, {batch} rows",
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


def _task(report: Report) -> Section:
    s = report.sufficiency
    assert s is not None
    return Section(f"Task: {s.task}", (
        Number("task_needed_depth", "depth of its DAG", s.needed_depth, "rounds",
               "level by level; another algorithm may take fewer"),
        Number("task_available_depth", "depth at hand", s.available_depth, "block visits"),
        Number("task_missing_depth", "missing", s.missing_depth, "block visits"),
        Number("task_needed_tokens", "widest level of its DAG", s.needed_tokens, "tokens"),
        Number("task_sufficient", "depth and tokens cover this DAG", "yes" if s.sufficient else "no", "",
               "about this one DAG: no lower bound of the task, and nothing about what training finds"),
    ))


def _key(name: str) -> str:
    return "cost_" + re.sub(r"\W+", "_", name.lower()).strip("_")


def _plural(unit: str) -> str:
    return f"{unit}s" if unit and unit not in ("FLOP", "s") and not unit.endswith("s") else unit


def not_counted(report: Report) -> tuple[str, ...]:
    """What the numbers of this report leave out."""
    found = [*NOT_COUNTED]
    if any(o.kind == "route" for o in report.program):
        found.append("Routes choose tokens by their data; depth is the longest over all choices.")
    if report.program.denoise is not None:
        found.append("Work, bytes and times are those of one denoising step; depth is that of all steps.")
    if report.program.reads_calls:
        found.append("Depth and work are those of one call: with kv='last' or 'mod:k' a cached token reads keys of later "
                     "iterations, so the function itself changes with the split into calls.")
    if report.unsized_parameters:
        found.append("New parameters leave out attention gates and per-visit LoRA: no model or config says how large they are.")
    if report.cost is None:
        found.append("KV bytes hold every token in every slot: sliding windows of the stock layers are not taken off.")
        found.append("No FLOPs, weight traffic, activations or times: ask for the cost analysis.")
    else:
        found += report.cost.notes
    if report.kv_bytes is None:
        found.append("KV bytes: the head counts of this model are not known.")
    facts = report.facts
    if facts is not None and facts.max_positions is not None and report.seq_len > facts.max_positions:
        found.append(f"n = {report.seq_len} is beyond the {facts.max_positions} positions that the config is made for.")
    return tuple(found)
