"""L4: a serial region's whole forward loop of compiled chunks as one CUDA graph, and its backward loop as another.

Thousands of small kernels are launched once per call of the graph instead of one by one. A graph is recorded per set of
shapes, so rows are padded to a few lengths.

The tests put a stand-in where CUDA records and replays; `benchmarks/gpu.py` checks the real thing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from depthpass.log import fallback
from depthpass.lowered.program import LoweredRegion
from depthpass.schedule.regions import Region
from depthpass_lowering.executors.chunk_loop import Job, recomputes
from depthpass_lowering.executors.compiled import Compiled
from depthpass_lowering.executors.context import CallContext
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.executors.region_function import Carried, RegionFunction, carries, check_unchanged, versions
from depthpass_lowering.executors.stand_ins import region_parameters
from depthpass_lowering.state.slots import State

MOST = 8
"""Graphs kept per region; each holds the memory of its own activations."""

_RECORDED: weakref.WeakKeyDictionary[Region, dict[tuple, Recording]] = weakref.WeakKeyDictionary()


class Graphed(Compiled):
    """As :class:`~depthpass_lowering.executors.compiled.Compiled`, training passes replayed as CUDA graphs."""

    name = "cudagraph"

    def refuse(self, run: Run, region: Region) -> str | None:
        if reason := super().refuse(run, region):
            return reason
        if region.groups and run.context.valid is not None:
            return "groups are counted from the first real token of each row, which a recording does not know"
        if torch.is_grad_enabled() and carries(run):
            return "a cache is kept while gradients are recorded"
        device = run.hidden.device.type
        return None if device == "cuda" else f"the model is on {device}, and CUDA graphs need a CUDA device"

    def level(self, run: Run, region: Region) -> tuple[str, str | None]:
        level, reason = super().level(run, region)
        if level != self.name or torch.is_grad_enabled():
            return level, reason
        return "inductor", _unrecorded("passes without gradients are not recorded")

    def padding(self, run: Run, region: LoweredRegion) -> int:
        return bucket(run.context.count, region.size) - run.context.count if region.level == self.name else 0

    def trained(self, run: Run, region: LoweredRegion, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        context = padded(run.context, self.padding(run, region))
        parameters = region_parameters(region, run.host)
        streams = {n: _longer(t, 1, context.padded) for n, t in inputs.items()}
        tensors = [*streams.values(), *context.side_inputs, *parameters.values()]
        if context.valid is not None:
            tensors.append(context.valid)
        key = (
            tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors), context.valid is None,
            # A graph reads the storage of the parameters it was recorded with.
            tuple(p.data_ptr() for p in parameters.values()), recomputes(run.host, region),
        )
        kept = _RECORDED.setdefault(region.scheduled, {})
        if key not in kept:
            if len(kept) >= MOST:
                kept.pop(next(iter(kept)))
            kept[key] = _record(context, run.state, region, list(streams), list(parameters), tensors)
        if kept[key].waits() is not None:
            reason = _unrecorded("an earlier pass waits for its backward pass, and a graph holds the activations of one")
            run.record[-1] = replace(run.record[-1], level="inductor", reason=reason, padded=0)
            return super().trained(run, region, inputs)
        out = kept[key](*tensors)
        # The memory of a replay is written again by the next one.
        return {name: t[:, : run.context.count].clone() for name, t in zip(region.outputs, out)}


def _unrecorded(reason: str) -> str:
    fallback(f"a pass under lowering='cudagraph' runs compiled chunks one by one (level 'inductor'): {reason}", asked=False)
    return reason


class Recording:
    """A recorded training pass.

    Attributes:
        turn: how many passes there have been; only the last one has its activations.
        waits: the last pass as long as it may still go back (a weak reference), or None.
    """

    def __init__(self, replay: Callable[..., tuple[Tensor, ...]]):
        self.replay, self.turn = replay, 0
        self.waits: Callable[[], object] = lambda: None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.replay(*_Inputs.apply(self, *tensors))


class _Inputs(torch.autograd.Function):
    """What a replay reads. Gradients are copied out of its memory: the next replay writes there, and p.grad may be kept."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *tensors: Tensor):
        recording.turn += 1
        ctx.recording, ctx.turn, recording.waits = recording, recording.turn, weakref.ref(ctx)
        ctx.versions = versions([t for t in tensors if isinstance(t, torch.nn.Parameter)])
        ctx.set_materialize_grads(False)
        outs = tuple(t.detach() for t in tensors)
        ctx.mark_non_differentiable(*(o for o, t in zip(outs, tensors) if not t.requires_grad))
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        if ctx.turn != ctx.recording.turn:
            raise RuntimeError(
                "backward through a recorded token loop whose activations a later forward pass has overwritten. Call backward "
                "once, before the next forward pass, or use lowering='inductor'."
            )
        check_unchanged(ctx.versions)
        ctx.recording.waits = lambda: None
        return None, *(None if g is None else g.clone() for g in grads)


def padded(context: CallContext, columns: int) -> CallContext:
    """The call with so many columns more, which belong to nobody: nothing that is real comes after them."""
    if not columns:
        return context
    c = context
    return replace(
        c, hidden=_longer(c.hidden, 1, columns), valid=None if c.valid is None else _longer(c.valid, 1, columns), padded=columns,
        side_inputs=tuple(s if axis is None else _longer(s, axis, columns) for s, axis in zip(c.side_inputs, c.side_axes)),
    )


def _longer(t: Tensor, axis: int, columns: int) -> Tensor:
    """Zeros behind the last column."""
    return torch.cat((t, t.new_zeros(*t.shape[:axis], columns, *t.shape[axis + 1 :])), axis) if columns else t


def _record(
    context: CallContext, state: State, region: LoweredRegion, names: list[str], ids: list[int], tensors: list[Tensor]
) -> Recording:
    """Record a region's training pass: ``(*streams, *side_inputs, *weights[, valid])`` -> what it hands out."""
    side_inputs, executor = len(context.side_inputs), Compiled()

    def region_of(*flat: Tensor) -> tuple[Tensor, ...]:
        streams, rest = dict(zip(names, flat)), flat[len(names) :]
        tables, weights = rest[:side_inputs], rest[side_inputs : side_inputs + len(ids)]
        inner = replace(context, side_inputs=tuple(tables), valid=None if context.valid is None else flat[-1])
        run = Run(inner, replace(state, slots={}, lines={}), executor)
        job = Job(executor, run, region, streams, dict(zip(ids, weights)))
        return RegionFunction.apply(job, Carried.of(run, region), *weights, *streams.values())

    # Weights are read where they lie, frozen ones too.
    first = len(names) + side_inputs
    samples = tuple(
        t if first <= i < first + len(ids) else t.detach().clone().requires_grad_(t.requires_grad) for i, t in enumerate(tensors)
    )
    return Recording(cast(Any, torch.cuda.make_graphed_callables(region_of, samples, allow_unused_input=True)))


def bucket(tokens: int, chunk: int) -> int:
    """The length that rows are padded to: a multiple of the chunk, at most an eighth longer from 8 chunks on."""
    chunks = -(-tokens // chunk)
    step = max(1, 1 << max(0, chunks.bit_length() - 4))
    return -(-chunks // step) * step * chunk
