"""A hand-scheduled region as one node of the outer graph; see ``carried.py`` for one whose state is handed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from depthpass_lowering.executors.first_order import first_order

if TYPE_CHECKING:
    from depthpass_lowering.executors.chunk_loop import Job


class RegionFunction(torch.autograd.Function):
    """A whole serial region as one node of the outer graph, so that hooks on parameters fire once, with the total."""

    @staticmethod
    def forward(ctx, job: Job, count: int, *tensors: Tensor):
        leaves = {key: t.detach().requires_grad_() for key, t in zip(job.parameters, tensors[:count])}
        streams = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors[count:]]
        with torch.enable_grad():
            out = job.loop(dict(zip(job.names, streams)), leaves)
        outs = [out[name] for name in job.wanted]
        # The job knows the run and the run will hold this node's outputs: keeping it here would be a cycle that no
        # collector sees. The backward pass needs the sink alone.
        job.release()
        ctx.sink, ctx.outs, ctx.leaves, ctx.streams = job.sink, outs, leaves, streams
        return tuple(o.detach() for o in outs)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        if ctx.outs is None:
            raise RuntimeError("backward through a hand-scheduled region a second time: its activations are freed. Run "
                               "forward again, or use lowering='eager' with retain_graph=True.")
        sink, leaves, streams = ctx.sink, ctx.leaves, ctx.streams
        pairs = [(o, g) for o, g in zip(ctx.outs, grads) if o.requires_grad and g is not None]
        sources = [*leaves.values(), *streams]
        found = torch.autograd.grad(
            [o for o, _ in pairs], sources, [g for _, g in pairs], allow_unused=True
        )
        ctx.outs = ctx.streams = ctx.leaves = None
        sunk = sink.finish()
        weights = []
        for leaf, g in zip(leaves.values(), found):
            extra = sunk.get(id(leaf))
            weights.append(g if extra is None else extra if g is None else g + extra)
        return (None, None, *weights, *found[len(leaves) :])
