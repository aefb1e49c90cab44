"""A hand-scheduled region as one node of the outer graph.

Latents, and caches with gradients, go on from earlier calls or are gone on from: then keys, values and delay lines come in and
go out as tensors of the outer graph, too. A later call's gradients of the keys reach the accumulators of their buffers before
the backward loop begins, and what is left there of earlier calls' columns leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthpass.lowered.program import LoweredRegion
from depthpass.schedule.regions import Region
from depthpass_lowering.executors.first_order import first_order
from depthpass_lowering.state.buffers import Buffer
from depthpass_lowering.state.slots import Slot

if TYPE_CHECKING:
    from depthpass_lowering.executors.chunk_loop import Job
    from depthpass_lowering.executors.eager import Run


def carries(run: Run) -> bool:
    """Whether a call goes on from earlier ones, or may be gone on from."""
    return run.context.keep or run.state.length > 0


def uncarried(run: Run, region: Region) -> str | None:
    """Why a region cannot train with what it carries from call to call, or None."""
    if any(run.host.recomputes(o["index"]) for o in region.calls):
        return "a cache is kept while gradients are recorded and activations are computed again"
    if any(run.ring(o) is not None for o in region.visits):
        return "a cache of windows is kept while gradients are recorded"
    return None


@dataclass
class Carried:
    """The state of a region before a call, as tensors; empty where nothing is carried.

    Attributes:
        on: whether the state after the call is handed out as well.
        lines: by name of their delay.
        slots: keys and values by slot, of each attention call in turn.
    """

    on: bool
    lines: dict[str, Tensor]
    slots: dict[int, list[Tensor]]

    @classmethod
    def of(cls, run: Run, region: LoweredRegion) -> Carried:
        if not carries(run):
            return cls(False, {}, {})
        state, own = run.state, {o.writes for o in region.ops if o.writes is not None}
        return cls(
            True, {d.name: state.lines[d.name] for d in region.lines if d.name in state.lines},
            {n: [t for pair in zip(s.keys, s.values) for t in pair] for n, s in state.slots.items() if n in own},
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.lines.values(), *(t for pair in self.slots.values() for t in pair)]


def as_one_node(job: Job, streams: dict[str, Tensor]) -> dict[str, Tensor]:
    """The streams that a region hands out; the run's state is that after the call."""
    run, region, buffers = job.run, job.region, job.buffers
    carried = Carried.of(run, region)
    results = iter(RegionFunction.apply(job, carried, *job.parameters.values(), *streams.values(), *carried.tensors))
    outs = {name: next(results) for name in job.wanted}
    if carried.on:
        run.state.lines |= {d.name: next(results) for d in region.lines}
        for number, held in buffers.items():
            keys, values = zip(*[(next(results), next(results)) for _ in held], strict=True)
            run.state.slots[number] = Slot(keys, values, first=held[0].first)
        job.buffers = {}
    return outs


class RegionFunction(torch.autograd.Function):
    """A whole serial region as one node of the outer graph, so that hooks on parameters fire once, with the total."""

    @staticmethod
    def forward(ctx: Any, job: Job, carried: Carried, *tensors: Tensor):
        split, state, region = len(job.parameters), job.run.state, job.region
        leaves = {key: t.detach().requires_grad_() for key, t in zip(job.parameters, tensors)}
        streams = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors[split : split + len(job.names)]]
        lines = {name: t.detach().requires_grad_() for name, t in carried.lines.items()}
        state.lines |= lines
        for number, pair in carried.slots.items():
            flat = [t.detach() for t in pair]
            state.slots[number] = Slot(tuple(flat[::2]), tuple(flat[1::2]), first=state.slots[number].first)
        with torch.enable_grad():
            out = job.loop(dict(zip(job.names, streams)), leaves)
        outs = [*(out[name] for name in job.wanted), *(state.lines[d.name] for d in region.lines if carried.on)]
        buffers = [b for held in job.buffers.values() for b in held if carried.on]
        # Through the last use of every buffer: keys may have gradients that no stream has.
        tokens = [t for t in (job.chain, *(b.token for b in buffers)) if carried.on and t is not None and t.requires_grad]
        ctx.versions = versions(job.weights)
        # The job knows the run and the run will hold this node's outputs: keeping it here would be a cycle that no
        # collector sees. The backward pass needs the sink alone.
        job.release()
        ctx.job = job.sink, outs, tokens, buffers, leaves, [*streams, *lines.values()]
        ctx.before = [(job.buffers[n][i // 2], i % 2) for n, pair in carried.slots.items() for i in range(len(pair))]
        ctx.set_materialize_grads(False)
        return (*(o.detach() for o in outs), *(t.detach() for b in buffers for t in b.held()))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None):
        if ctx.job is None:
            raise RuntimeError("backward through a hand-scheduled region a second time: its activations are freed. Run "
                               "forward again, or use lowering='eager' with retain_graph=True.")
        check_unchanged(ctx.versions)
        (sink, outs, tokens, buffers, leaves, sources), ctx.job = ctx.job, None
        later = iter(grads[len(outs) :])
        for buffer in buffers:
            for sum_, g in zip(buffer.gradients(), (next(later), next(later))):
                if g is not None:
                    sum_.add_(g)
        pairs = [(o, g) for o, g in zip(outs, grads) if o.requires_grad and g is not None]
        pairs += [(token, torch.zeros_like(token)) for token in tokens]
        gradients = torch.autograd.grad(
            [o for o, _ in pairs], [*leaves.values(), *sources], [g for _, g in pairs], allow_unused=True
        )
        sunk = sink.finish()
        weights = []
        for leaf, g in zip(leaves.values(), gradients):
            extra = sunk.get(id(leaf))
            weights.append(g if extra is None else extra if g is None else g + extra)
        return (None, None, *weights, *gradients[len(leaves) :], *(_earlier(b, side) for b, side in ctx.before))


def versions(weights: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Weights, and how often each has been written by now."""
    return [(t, t._version) for t in weights if not t.is_inference()]


def check_unchanged(read: list[tuple[Tensor, int]]) -> None:
    """The backward loop reads the weights again; autograd raises the same error for those that it has saved."""
    changed = next((t for t, version in read if t._version != version), None)
    if changed is not None:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a weight of "
            f"shape {list(changed.shape)} in a token loop changed between forward and backward. Change weights after "
            "backward, or run forward again."
        )


def _earlier(buffer: Buffer, side: int) -> Tensor:
    """Gradient of the keys or the values that a buffer began with."""
    assert buffer.before is not None
    before = buffer.before[side]
    return buffer.gradients()[side].narrow(2, buffer.first, before.shape[2]).to(before.dtype)
