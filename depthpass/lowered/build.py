"""Lower a schedule for one kind of call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from depthpass.errors import SpecError, did_you_mean
from depthpass.ir.definitions import CHUNK
from depthpass.ir.ops import OPS, PARTS, unfit
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.lowered.ops import UNKNOWN, BlockFacts, LoweredOp, expanded
from depthpass.lowered.program import Line, LoweredProgram, LoweredRegion
from depthpass.lowered.verify import verify_lowered
from depthpass.schedule.regions import Region, Schedule
from depthpass.schedule.stacking import Stack, StepOrder

CALLS = {
    "train": "gradients are recorded",
    "score": "a whole row, nothing kept",
    "prefill": "the first tokens of a cache",
    "chunk": "several tokens behind a cache",
    "token": "one token behind a cache",
}
"""Kinds of calls."""

Choose = Callable[[Region], tuple[str, str | None]]
"""The level that runs a serial region, and why not a higher one."""

Expand = Callable[..., tuple[LoweredOp, ...]]
"""An op of the program, and the row of its call -> its lowered ops."""


def call_kind(grad: bool, keep: bool, past: int, tokens: int) -> str:
    """The kind of a call.

    Args:
        grad: whether gradients are recorded.
        keep: whether the state is kept.
        past: columns of the state before the call.
        tokens: new columns.
    """
    if grad:
        return "train"
    if not past:
        return "prefill" if keep else "score"
    return "token" if tokens == 1 else "chunk"


def lower(
    schedule: Schedule, call: str = "train", level: str = "auto", choose: Choose | None = None, step: StepOrder | None = None,
    facts: Callable[[int], BlockFacts] | None = None,
) -> LoweredProgram:
    """The lowered program of a schedule.

    Args:
        schedule: of a verified program.
        call: a key of :data:`CALLS`.
        level: the level that is asked for.
        choose: the level of each serial region; None = the one that the program alone allows.
        step: run the whole program as this step instead of region by region.
        facts: of a captured block; None = no capture is known.

    Raises:
        SpecError: no such kind of call.
        VerifyError: the result breaks a rule of :mod:`depthpass.lowered.verify`.
    """
    if call not in CALLS:
        raise SpecError(f"call: expected one of {', '.join(CALLS)}, got {call!r}.{did_you_mean(str(call), CALLS)}")
    program = schedule.program

    def allowed(region: Region) -> tuple[str, str | None]:
        return level_of(program, region, call, level)

    def lowered(o: Op, row: int | None = None) -> tuple[LoweredOp, ...]:
        return expanded(o, facts(o["index"]) if facts and o.kind == "block" else UNKNOWN, row)

    def together(region: Region) -> tuple[str, str | None]:
        return ("inductor" if level in ("inductor", "cudagraph") else "eager"), None

    if step is not None:
        regions = (_step_region(step, lowered, level),)
    else:
        regions = tuple(
            _region(region, lowered, (choose or allowed) if region.serial else together, read, handed)
            for region, read, handed in zip(schedule.regions, schedule.reads, schedule.results)
        )
    return verify_lowered(
        LoweredProgram(program.model, call, level, program.blocks, program.width, _with_last(regions))
    )


def level_of(program: Program, region: Region, call: str, level: str) -> tuple[str, str | None]:
    """The level of a serial region by what the program says; a model may have more reasons (hooks, dropout)."""
    if level == "eager":
        return "eager", None
    if reason := unschedulable_ops(program, region):
        return "eager", reason
    if call in ("chunk", "token"):
        return "eager", "one chunk without gradients"
    return ("scheduled" if level == "auto" else level), None


def unschedulable_ops(program: Program, region: Region) -> str | None:
    """Why the ops of a serial region cannot be scheduled by hand, or None."""
    if reason := unfit(region.ops, CHUNK):
        return reason
    here = {writes_slot(o) for o in region.visits}
    for o in program.visits:
        if o["keys"] is not None and (o in region.visits) != (o["keys"] in here):
            return f"block {o['index']} shares the keys of slot {o['keys']} across the border of the token loop"
    return None


def lines_of(ops: Sequence[Op]) -> tuple[Line, ...]:
    """The delay lines of some ops."""
    return tuple(Line(o.name, o.args[0], OPS[o.kind].lag(o)) for o in ops if OPS[o.kind].forward_refs)


def _region(
    region: Region, lowered: Expand, choose: Choose, read: Sequence[str], handed: frozenset[str]
) -> LoweredRegion:
    here = {o.name for o in region.ops}
    inputs = tuple(a for a in read if a not in here)
    outputs = tuple(o.name for o in region.ops if o.name in handed)
    level, reason = choose(region)
    return LoweredRegion(
        "chunks" if region.serial else "parallel", tuple(part for o in region.ops for part in lowered(o)), region.chunk, level,
        reason, inputs, outputs, lines=lines_of(region.ops), source=region,
    )


def _step_region(step: StepOrder, lowered: Expand, level: str) -> LoweredRegion:
    ops: list[LoweredOp] = []
    for number, item in enumerate(step.items):
        if isinstance(item, Stack):
            parts = [part for o in item.visits for part in lowered(o, number)]
            # All rows of one call write their keys before any of them reads.
            ops += sorted(parts, key=lambda o: list(PARTS).index(o.kind) if o.kind in PARTS else 0)
        else:
            ops += lowered(item)
    level = level if level in ("inductor", "cudagraph") else "eager"
    return LoweredRegion("step", tuple(ops), step.tokens, level, lines=lines_of([o.op for o in ops if o.line is not None]))


def _with_last(regions: Sequence[LoweredRegion]) -> tuple[LoweredRegion, ...]:
    """The regions with what each of them lets go of."""
    backwards: list[LoweredRegion] = []
    later: set[Any] = set()
    for region in reversed(regions):
        known = dict.fromkeys((*region.inputs, *region.outputs))
        backwards.append(replace(region, last=tuple(n for n in known if n not in later)))
        later |= set(region.inputs)
    return tuple(reversed(backwards))
