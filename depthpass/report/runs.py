"""Sections of a report: which tokens a route takes, and what runs after what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.analysis.cost.build import visit_equivalents
from depthpass.analysis.cost.visits import route_share
from depthpass.analysis.depth import depth
from depthpass.analysis.routing import reads_future, unrouted_visits, without_routes
from depthpass.ir.program import plain as stock_program
from depthpass.ir.shares import by_route
from depthpass.report.numbers import Number, Section, plain
from depthpass.schedule.regions import schedule

if TYPE_CHECKING:
    from depthpass.report.report import Report

STACKS = 8
"""Stacked sets that are named in text; JSON has them all."""


def routing_sections(report: Report) -> list[Section]:
    """Whether the program is causal, and how many visits a token takes; nothing for a program without routes."""
    p, n = report.program, report.seq_len
    routes = [o for o in p if o.kind == "route"]
    if not routes:
        return []
    future = reads_future(p)
    numbers = [Number(
        "causal", "causal", "no" if future else "yes", "",
        f"{future} chooses with scores of later tokens: it scores whole rows, generate() refuses it" if future else
        "no token depends on later ones: it decodes as it scores",
    )]
    ratios = by_route(p, report.ratios)
    shares: dict[str, Number] = {}
    for o in routes:
        label, share = o["label"] or f"%{o.name}", route_share(o, ratios)
        expected = o.name in ratios or o["rule"] == "topk"
        note = f"rule {o['rule']}" + ("" if expected else "; depends on the data, every token at most: give ratios")
        shares[label] = Number(f"share.{label}", f"share that {label} takes", float(share), "of the tokens", note)
    numbers += shares.values()
    least, lowest = unrouted_visits(p), without_routes(p)
    if lowest is not None:
        numbers.append(Number("depth_min_at_n", f"least depth at n = {n}", depth(lowest).at(n), "block visits",
                              "no route takes a token", stock=p.blocks))
    numbers += [
        Number("depth_max_at_n", f"largest depth at n = {n}", report.depth_at(n), "block visits",
               "over all choices that routes may make", stock=p.blocks),
        Number("token_visits_min", "visits of a token, at least", least, "block visits", "no route takes it"),
        Number("token_visits_expected", "visits of a token, expected", float(visit_equivalents(p, ratios)), "block visits",
               "at these shares"),
        Number("token_visits_max", "visits of a token, at most", len(p.visits), "block visits", "every route takes it"),
    ]
    losses = {o["name"]: o["coefficient"] for o in p.losses}
    if losses:
        words = ", ".join(f"{name} ({plain(c)})" for name, c in losses.items())
        numbers.append(Number("training_losses", "training losses", words, "", "added to outputs.loss; also outputs.losses"))
    return [Section("Routing", tuple(numbers))]


def schedule_section(report: Report) -> Section:
    """What waits for what, and what runs together."""
    p, n = report.program, report.seq_len
    stock = schedule(stock_program(p.model, p.blocks, p.width))
    chunk = report.chunk
    swept = ()
    if (policy := report.fixed_point) is not None and report.serial_blocks:
        note = policy.approximate or "sweeps over all tokens at once, same numbers; recursions and calls are the token loop's"
        swept = (Number("fixed_point", "serial regions run as", str(policy), "", note),)
    split = any(o.kind == "ffn" for r in report.schedule.serial_regions for o in r.ops)
    alone = (Number("latents", "latents", p.latents, "positions", "each runs by itself, fed with the output of the one before; "
                    "n tokens stand before them"),) if p.latents else ()
    return Section("Schedule", (
        *alone,
        Number("serial_blocks", "serial blocks", report.serial_blocks, "block visits",
               f"{'with their feed-forward networks ' * split}on a delay cycle; all others run over the whole row at once",
               out_of=report.visits),
        Number("chunk", "chunk", chunk if chunk is not None else "the whole row", "tokens" if chunk is not None else "",
               "tokens that a serial region runs together"),
        Number("recursions", "recursions", report.recursions, "runs through one block", recursion_note(report), stock=1),
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
    numbers = []
    for i, step in enumerate(report.schedule.stacked):
        # The first step is the one that decoding takes.
        key = f".{step.tokens}" if i else ""
        up_to = "a step of 1 token" if step.tokens == 1 else f"a step of up to {step.tokens} tokens"
        sets = [f"block {s.index}: {' '.join(f'%{n}' for n in s.names)}" for s in step.stacks]
        shown = sets if len(sets) <= STACKS else [*sets[: STACKS - 1], f"{len(sets) - STACKS + 1} more"]
        numbers += [
            Number(f"step_block_calls{key}", f"block calls of {up_to}", step.calls, "block calls",
                   "visits without a path between them run as rows of one call", stock=report.program.blocks),
            Number(f"stacked_visits{key}", f"stacked in {up_to}", sum(len(s.visits) for s in step.stacks),
                   "block visits", "; ".join(shown), out_of=report.visits),
        ]
    return numbers


def recursion_note(report: Report) -> str:
    """Where the number comes from: visits of a token, steps of the token loop, or both."""
    block = report.most_run_block
    visits = [(o, r.serial) for r in report.schedule.regions for o in r.counted if o["index"] == block]
    looped = sum(serial for _, serial in visits)
    latents = report.program.latents
    parts = []
    if looped:
        parts.append((f"{looped} visits x " if looped > 1 else "") + _loop_note(report))
    if len(visits) - looped and len(visits) > 1:
        parts.append(f"{len(visits) - looped} visits of a token")
    if latents and not looped:
        parts = [f"{len(visits)} visits x (1 + {latents} latents)" if len(visits) > 1 else f"the row, then {latents} latents"]
    rules = () if report.lengths is None else report.lengths.rules
    return "; ".join([" + ".join(parts) or "no block runs twice", *(f"{name}: {rule}" for name, rule in rules)])


def _loop_note(report: Report) -> str:
    if not report.serial_blocks:
        return "no token loop"
    return f"ceil((n + {report.serial_pads} pads) / chunk)" if report.serial_pads else "ceil(n / chunk)"
