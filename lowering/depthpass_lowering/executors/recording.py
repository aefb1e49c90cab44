"""Depth as it happens: a record of which values of which tokens every op of a running model read, and its longest path.

The eager level runs a real model one token at a time. The result of every op at every token is cut out of autograd and made
a leaf, so the gradient of the next result with respect to all leaves says which of them it was computed from: nothing here
knows what a delay, a window, a slot, a pad or a trim means. What has no gradient, a choice, is recorded by what it was
handed. Routes are told whom to take, in several runs (all tokens, and for each route nobody), and what was read in any of
them counts: the depth over all choices.

The check of :mod:`depthpass.analysis.depth`, with which it shares no rule. Meant for a few tokens of a small model in float64
with random parameters (a parameter that is zero hides what it multiplies).
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import InputError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, op
from depthpass.lowered.build import lower
from depthpass.lowered.program import LoweredRegion
from depthpass.lowered.reads import Node, Record
from depthpass.schedule.stacking import StepOrder
from depthpass_lowering.executors.base import Executor
from depthpass_lowering.executors.context import CallContext, RunResult
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.state.slots import Span, State, spans
from depthpass_lowering.visits.attention import Masks
from depthpass_lowering.visits.routes import Route, choose

_CHOICES = ("select", "route", "distance")


def record(model: Any, ids: Tensor, calls: Sequence[int] | None = None) -> Record:
    """Run one row through a transformed model and record it.

    Args:
        model: a transformed model in eval mode, in float64 with random non-zero parameters. It is left as it was.
        ids: ``[tokens]``, without padding.
        calls: sizes of the calls that the tokens come in; None = one.

    Raises:
        InputError: sizes that do not add up to the row.
    """
    sizes = [len(ids)] if calls is None else list(calls)
    if sum(sizes) != len(ids) or min(sizes) < 1:
        raise InputError(f"calls: expected sizes of at least 1 that add up to {len(ids)} tokens, got {sizes}.")
    program = model.depth_program
    depth = Record(program)
    routes = [o.name for o in program if o.kind == "route"]
    for nobody in (None, *routes):
        _Runs(depth, nobody).run(model, ids, sizes)
    return depth


class _Leaves(UserDict):
    """The results of the ops at one token; remembers which of them were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


class _Runs:
    """One run of a row under one choice of whom the routes take.

    Args:
        nobody: the route that takes no token; all others take every token they may.
    """

    def __init__(self, record: Record, nobody: str | None) -> None:
        self.record, self.nobody = record, nobody
        self.leaves: dict[Node, Tensor] = {}
        self.waits: list[tuple[Node, str]] = []

    def run(self, model: Any, ids: Tensor, sizes: Sequence[int]) -> None:
        """Run the calls; then ask what of each token was handed out it was computed from."""
        from depthpass.hf.caches.cache import DepthCache

        runtime = model._depth
        before = runtime.lowering, runtime.fixed_point
        # Sweeps compute the same values in another order; what they read is no part of the program.
        runtime.lowering, runtime.fixed_point = _Recorder(self), None
        try:
            with torch.enable_grad():
                cache = None if len(sizes) == 1 else DepthCache(model)
                start = 0
                for part in ids.split(list(sizes)):
                    out = model(part[None], past_key_values=cache, use_cache=cache is not None)
                    for name, x in {"output": out.logits, **getattr(out, "taps", {})}.items():
                        self._handed(name, x, start)
                    start += len(part)
        finally:
            runtime.lowering, runtime.fixed_point = before
        columns = {i for _, i in self.leaves}
        for node, score in self.waits:
            self.note(node, ((score, i) for i in columns if (score, i) in self.record.reads))

    def _handed(self, name: str, x: Tensor, start: int) -> None:
        if x.is_floating_point():
            self.record.outputs.add(name)
            for j in range(x.shape[1]):
                self.note((f">{name}", start + j), self.sources(x[:, j]))

    def note(self, node: Node, read: Iterable[Node]) -> None:
        self.record.reads.setdefault(node, set()).update(read)

    def sources(self, x: Tensor) -> set[Node]:
        """The leaves that a tensor was computed from."""
        if not x.requires_grad or not self.leaves:
            return set()
        weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=torch.float64).to(x) + 0.5
        grads = torch.autograd.grad((x * weight).sum(), list(self.leaves.values()), retain_graph=True, allow_unused=True)
        return {node for node, g in zip(self.leaves, grads, strict=True) if g is not None and bool((g != 0).any())}


class _Recorder(Executor):
    """Starts runs that record."""

    name = "recording"

    def __init__(self, runs: _Runs) -> None:
        self.runs = runs

    def start(self, context: CallContext, state: State) -> Run:
        # Where no gradient flows values do all the same.
        program = replace(context.program, ops=tuple(_flowing(o) for o in context.program))
        return _Recording(replace(context, schedule=replace(context.schedule, program=program)), state, self.runs)


class _Recording(Run):
    """The eager level, one token at a time and in program order, with every result made a leaf."""

    def __init__(self, context: CallContext, state: State, runs: _Runs) -> None:
        super().__init__(context, state)
        self.runs = runs

    def run(self) -> RunResult:
        self._recall()
        c, parts = self.context, {}
        lowered = lower(c.schedule, "train", step=StepOrder(1, self.program.ops))
        side_inputs = [[s] * c.count if axis is None else s.split(1, axis) for s, axis in zip(c.side_inputs, c.side_axes)]
        for i, span in enumerate(spans(c.start, c.count, c.valid, None, 1)):
            self._token(lowered.regions[0], span, [cut[i] for cut in side_inputs])
            for name, x in self.out.items():
                parts.setdefault(name, []).append(x)
        for o in c.passing:
            self.state.slots.pop(o["slot"], None)
        self.state.length += c.count
        self.state.valid = c.valid
        return RunResult({name: torch.cat(pieces, 1) for name, pieces in parts.items()}, self.state, (), lowered)

    def _token(self, region: LoweredRegion, span: Span, tables: list[Tensor]) -> None:
        masks, local = Masks(span.start, 1, self.context.valid_until(span.start + 1), self.hidden.device), _Leaves()
        for o in self.program.ops:
            self.one(o, local, span, masks, tables, True)
        self.push(region, local, span)

    def one(self, o: Op, local: Any, span: Span, masks: Masks, tables, keep: bool) -> None:
        local.asked.clear()
        super().one(o, local, span, masks, tables, keep)
        if not o.name:
            return
        asked, result = set(local.asked), local.data[o.name]
        handed = asked if o.kind in _CHOICES else {a for a in asked if isinstance(local.data.get(a), Route)}
        node, read = (o.name, span.start), {(a, span.start) for a in handed - {o.name}}
        if isinstance(result, Route):
            self.runs.note(node, read)
            return
        if not result.shape[1]:
            return  # a routed value of a token that is not routed
        self.runs.note(node, read | self.runs.sources(result))
        if OPS[o.kind].depth(o)[1]:
            self.runs.record.visits[node] = o["index"]
        local[o.name] = self.runs.leaves[node] = result.detach().clone().requires_grad_()

    def _route(self, o: Op, local: Any, span: Span) -> Route:
        score, outer = local[o.args[0]], local[o.args[1]] if len(o.args) == 2 else None
        held = self.types[o.args[0]].tokens
        try:
            # What follows a token behind a cache shows whether a part of the row is enough to choose.
            choose(o, score if held is None else local[held].spread(score), outer, span.valid, 1)
        except InputError:
            self.runs.waits.append(((o.name, span.start), o.args[0]))
        taken = torch.full((len(score), 1), self.runs.nobody != o.name, device=score.device)
        return Route.of(taken if outer is None else taken & outer.chosen, span.valid)


def _flowing(o: Op) -> Op:
    return op("scale", *o.args, name=o.name, by=1.0) if o.kind == "detach" else o
