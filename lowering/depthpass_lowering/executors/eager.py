"""L0: run a schedule op by op, region by region. Obviously right, and the oracle of every faster level.

One primitive: advance a state by m new tokens. Training and prefill are m = all tokens, decoding is m = 1. Parallel
regions see all m tokens at once, serial regions run in chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from depthpass.ir.definitions import Type
from depthpass.ir.program import writes_slot
from depthpass.ir.verify import infer
from depthpass.lowered.build import call_kind, lower
from depthpass.lowered.program import LoweredProgram, LoweredRegion
from depthpass.lowered.record import Lowered, Recorder
from depthpass.schedule.regions import Schedule
from depthpass.schedule.stacking import Stack, StepOrder
from depthpass_lowering.executors.base import EAGER, Executor
from depthpass_lowering.executors.context import CallContext, RunResult
from depthpass_lowering.executors.ops import Ops
from depthpass_lowering.host import Host
from depthpass_lowering.state.slots import Span, State, spans
from depthpass_lowering.visits.attention import Masks
from depthpass_lowering.visits.cut import block_facts
from depthpass_lowering.visits.stacked import StackedVisit

MOST = 64
"""Lowered programs kept per schedule."""


def run(
    schedule: Schedule,
    host: Host,
    hidden: Tensor,
    side_inputs: Sequence[Tensor],
    side_axes: Sequence[int | None],
    state: State,
    valid: Tensor | None,
    keep: bool,
    types: Mapping[str, Type] | None = None,
    lowering: str | Executor = "eager",
    jacobi=None,
    record: Recorder | None = None,
) -> RunResult:
    """Advance a state by the tokens of ``hidden``.

    Args:
        hidden: the embedded new tokens, ``[batch, m, width]``.
        side_inputs: the prologue's per-token tables for the new tokens.
        valid: validity of all columns, old and new, ``[batch, state.length + m]``; None = no padding anywhere.
        keep: whether the returned state is needed (a cache, not just a forward pass).
        lowering: a level of :data:`depthpass_lowering.executors.levels.LEVELS`, or an executor.
        jacobi: runs serial regions by sweeps (``fixed_point.py``), and keeps their record.
        record: gets what ran.
    """
    from depthpass_lowering.executors.levels import executor

    chosen = executor(lowering) if jacobi is None else jacobi.on(executor(lowering))
    context = CallContext(
        schedule, host, hidden, tuple(side_inputs), tuple(side_axes), valid, keep, types or infer(schedule.program), state.length
    )
    result = chosen.start(context, state.fork()).run()
    if record is not None:
        record.add(result)
    return result


class Run(Ops):
    """One advance of a state: walks the lowered program of a call and leaves serial regions to its executor."""

    def __init__(self, context: CallContext, state: State, executor: Executor = EAGER):
        super().__init__(context, state)
        self.executor = executor
        self.record: list[Lowered] = []

    def run(self) -> RunResult:
        self._recall()
        lowered = self.lowered()
        for region in lowered.regions:
            self._region(region)
        for o in self.context.passing:
            self.state.slots.pop(o["slot"], None)
        self.state.length += self.context.count
        self.state.valid = self.context.valid
        return RunResult(self.out, self.state, tuple(self.record), lowered)

    def lowered(self) -> LoweredProgram:
        """The lowered program of this call, made once for all calls that are alike."""
        c, schedule = self.context, self.context.schedule
        step = self._step()
        chosen = {} if step is not None else {r: self.executor.level(self, r) for r in schedule.serial_regions}
        kind = call_kind(torch.is_grad_enabled(), c.keep, c.start, c.count)
        asked, facts = self.executor.name, functools.partial(block_facts, self.host)
        captured = self.host.captured
        key = (kind, asked, None if step is None else step.tokens, tuple(chosen.values()), id(captured))
        kept = schedule.lowered
        entry = kept.get(key)
        if entry is None:
            while len(kept) >= MOST:
                kept.pop(next(iter(kept)), None)
            # The capture is kept, so that its id stays its own.
            entry = kept[key] = lower(schedule, kind, asked, chosen.__getitem__, step, facts), captured
        return entry[0]

    def _region(self, region: LoweredRegion) -> None:
        if region.kind == "step":
            self._run_step(region)
        elif region.serial:
            self.env |= self.executor.region(self, region)
        else:
            # Slots of parallel regions are only needed by a later call.
            self.env |= self.loop(region, {a: self.env[a] for a in region.inputs}, region.outputs, self.context.keep)
        for name in region.last:
            self.env.pop(name, None)

    def streams(self, region: LoweredRegion) -> dict[str, Any]:
        """What a region reads of earlier ones: streams, and routes beside them."""
        return {a: self.env[a] for a in region.inputs}

    def _step(self) -> StepOrder | None:
        """The order with stacked visits for this call, or None: region by region."""
        if torch.is_grad_enabled() or not self.context.keep:
            return None
        step = self.context.schedule.step(self.context.count)
        return step if step is not None and all(self._rows_stack(stack) for stack in step.stacks) else None

    def _recall(self) -> None:
        """Start the slots of visits with a past from the entries that another visit has kept of earlier calls."""
        kept = dict(self.state.slots)
        for o in self.context.passing:
            if o["past"] in kept:
                self.state.slots[o["slot"]] = kept[o["past"]]

    def _rows_stack(self, stack: Stack) -> bool:
        """Whether the tables of a block have a batch dimension to stack on, or none that matters."""
        c = self.context
        tables = ((c.side_inputs[s], c.side_axes[s]) for s in self.host.side_inputs_of(stack.index))
        return c.batch == 1 or all(axis is not None or t.dim() == 0 or t.shape[0] != c.batch for t, axis in tables)

    def _run_step(self, region: LoweredRegion) -> None:
        """All ops over all new tokens in the order of a step, stacks as one call each."""
        span, masks = self._at_once()
        # A stack's result often is the next one's input as it stands.
        names: tuple[str, ...] = ()
        rows, tables = self.hidden, {}
        for item in region.items:
            if not isinstance(item, Stack):
                self.one(item, self.env, span, masks, self.context.side_inputs, self.context.keep)
                continue
            if item.inputs != names:
                given: list[Any] = [self.env[a] for a in item.inputs]
                rows = torch.cat(given)
            names, rows = item.names, self._stack(item, rows, span, masks, tables)
            self.env |= zip(names, rows.chunk(len(names)))
        self.push(region, self.env, span)

    def _at_once(self) -> tuple[Span, Masks]:
        """All new tokens as one span, and its masks."""
        c = self.context
        (span,) = spans(c.start, c.count, c.valid, None, None)
        return span, Masks(c.start, c.count, c.valid, self.hidden.device, self.program.ahead)

    def _stack(self, stack: Stack, hidden: Tensor, span: Span, masks: Masks, tables: dict) -> Tensor:
        """Visits of one block as rows of one call: ``[members * batch, tokens, width]`` -> the same."""
        self._check_operands(stack.visits[0])
        count = len(stack.visits)
        visits = [self._visit(o, span, masks, self.context.keep or writes_slot(o) in self.context.read) for o in stack.visits]
        stacked = StackedVisit(stack, visits, hidden)
        side_inputs = [self._stacked_side(s, count, tables) for s in self.host.side_inputs_of(stack.index)]
        y = self.host.block(stack.index, stacked, hidden, side_inputs)
        stacked.commit()
        return y

    def _stacked_side(self, number: int, count: int, tables: dict) -> Tensor:
        """A table for the rows of a stack; one without a batch dimension, or with one row for all, serves as it is."""
        if (number, count) not in tables:
            t, whole = self.context.side_inputs[number], self.context.side_axes[number] in (0, None)
            tables[number, count] = t if whole or t.shape[0] == 1 else torch.cat([t] * count)
        return tables[number, count]
