"""Chunks of a token loop on two flat graphs, forward and backward, instead of an autograd node per op."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from depthpass.capture.direct import direct
from depthpass.capture.nodes import graph_module
from depthpass.ir.program import writes_slot
from depthpass_lowering.adjoint.fused import fold_gains_pass, fuse_pass
from depthpass_lowering.adjoint.projected import join_attention_pass, projected
from depthpass_lowering.adjoint.reverse import Adjoint, Reverse, Unsupported
from depthpass_lowering.adjoint.rules import rule_of
from depthpass_lowering.adjoint.sites import sites_of
from depthpass_lowering.executors.dropout import RandomState
from depthpass_lowering.fx_passes.products import land, products
from depthpass_lowering.fx_passes.recompute import absorbed, recompute_pass
from depthpass_lowering.fx_passes.region import ChunkGraph, delayed
from depthpass_lowering.products.sink import Sink

_TAPED: weakref.WeakKeyDictionary[ChunkGraph, dict[tuple, TapedGraph | None]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TapedGraph:
    """A chunk's graph with its backward pass.

    Attributes:
        code: takes what the chunk's graph takes, then the values of its delays.
        delays: names of the delays that it reads.
        moving: which of its inputs change with the chunk and may have a gradient: streams, what is known before, delays.
    """

    code: Adjoint
    delays: tuple[str, ...]
    moving: tuple[int, ...]


def taped_graph(
    graph: ChunkGraph, params: Sequence[Tensor], known: Sequence[bool], dtype: torch.dtype, grad: bool
) -> TapedGraph | None:
    """The graph of a chunk with its backward pass, made once; None where that cannot be.

    Args:
        params: of the graph, of which those with a gradient are trained.
        known: which of the values that are known before the loop have a gradient.
        dtype: of the streams.
    """
    key = (grad and tuple(p.requires_grad for p in params), tuple(known), dtype)
    kept = _TAPED.setdefault(graph, {})
    if key not in kept:
        try:
            kept[key] = _taped(graph, [grad and p.requires_grad for p in params], known, dtype, grad)
        except Unsupported:
            kept[key] = None
    return kept[key]


def _taped(graph: ChunkGraph, trained: Sequence[bool], known: Sequence[bool], dtype: torch.dtype, grad: bool) -> TapedGraph:
    if any(o.kind == "block" and o["gate"] is not None for o in graph.visits):
        raise Unsupported("a gate between two attentions")
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.distributed.loop.graph, {}))
    gm = graph_module(graph.distributed.loop, copied)
    if grad:
        recompute_pass(gm)
    delays = _hoist_delays(gm)
    fuse_pass(gm, dtype)
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    first, count = graph.opaque, len(graph.streams)
    at = first + count + len(graph.absents) + len(graph.side_inputs)
    inputs, streams = nodes[at : at + len(graph.params)], list(range(first, first + count))
    rest = list(range(at + len(inputs), len(nodes)))
    moving = (*streams, *rest)
    active: set[fx.Node] = set()
    if grad:
        flows = [*known, *[True] * len(delays)]
        active |= {nodes[i] for i in streams} | {nodes[i] for i, flow in zip(rest, flows, strict=True) if flow}
        active |= {p for p, t in zip(inputs, trained) if t}
    fold_gains_pass(gm.graph, active, inputs, dtype)
    join_attention_pass(gm.graph, {n for n, o in zip(nodes[1:], graph.visits) if o.kind == "block" and o["keys"] is None})
    writers = {n for n, o in zip(nodes[1:], graph.visits) if writes_slot(o) is not None}
    count = sum(n.target in (products, absorbed, land, projected) for n in gm.graph.nodes)
    return TapedGraph(Reverse(gm, active, inputs, writers, rule_of).build(count), delays, moving)


def _hoist_delays(gm: fx.GraphModule) -> tuple[str, ...]:
    """Make inputs of the delays that no value of the chunk itself goes into."""
    names = []
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    nodes: list[Any] = list(gm.graph.nodes)
    for n in nodes:
        if n.target is delayed and n.args[2] is None:
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"stream_delayed_{len(names)}")
            names.append(n.args[1])
            n.replace_all_uses_with(last)
            gm.graph.erase_node(n)
    return tuple(names)


class TapedChunks:
    """The chunks of one loop on a graph with its backward pass.

    Args:
        params: the chunk graph's parameters.
        like: a tensor of the dtype and device of the streams, with as many rows as a chunk.
        recompute: whether a chunk keeps its inputs only and runs again in the backward pass (gradient checkpointing).
        draws: whether it then has to draw random numbers again.
    """

    def __init__(
        self, graph: TapedGraph, params: Sequence[Tensor], sink: Sink, like: Tensor, recompute: bool = False, draws: bool = False
    ):
        self.graph, self.params, self.sink, self.recompute, self.draws = graph, list(params), sink, recompute, draws
        self.sites = sites_of(graph.code.sites, params, sink, like)
        self.forward = direct(graph.code.forward)
        self.backward = None if graph.code.backward is None else direct(graph.code.backward)

    def run(
        self, opaque: Sequence[Any], streams: Sequence[Tensor], tables: Sequence[Any], known: Sequence[Tensor],
        delays: Mapping[str, Tensor], chain: Tensor,
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Results of one chunk.

        Args:
            opaque: in place of the loop, which no such graph asks, None; the running visits.
            tables: masks and side inputs.
            chain: of the chunk before: makes later chunks go back first.
        """
        moving = [*streams, *known, *(delays[name] for name in self.graph.delays)]
        call = _ChunkInputs(self, opaque, tables, len(streams))
        if torch.is_grad_enabled() and self.backward is not None:
            *results, chain = _TapedChunk.apply(call, chain, *moving)
            return results, chain
        return self.forward(*call.inputs(moving), *self.sites)[0], chain

    def mode(self) -> contextlib.AbstractContextManager:
        """What a chunk runs in: no op of it is recorded, so none goes through autograd's part of the dispatcher, which costs more
        than a view. Ops that have no rule are differentiated by autograd itself."""
        return contextlib.nullcontext() if self.graph.code.islands else torch.inference_mode()

    def release(self) -> None:
        """Let go of the weights of the forward pass."""
        for site in self.sites:
            site.release()


@dataclass(frozen=True)
class _ChunkInputs:
    """What a chunk is run on besides its streams."""

    chunks: TapedChunks
    opaque: Sequence[Any]
    tables: Sequence[Any]
    streams: int

    def inputs(self, moving: Sequence[Tensor]) -> list[Any]:
        """All inputs of the graph in order."""
        return [*self.opaque, *moving[: self.streams], *self.tables, *self.chunks.params, *moving[self.streams :]]


def ordinary(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What leaves a chunk, as tensors that autograd may record."""
    return [t.clone() if t.is_inference() else t for t in tensors]


class _TapedChunk(torch.autograd.Function):
    """One chunk as one node of the loop's graph."""

    @staticmethod
    def forward(ctx, call: _ChunkInputs, chain: Tensor, *moving: Tensor):
        chunks = call.chunks
        ctx.chunks, ctx.random = chunks, RandomState.now(moving) if chunks.draws else None
        with chunks.mode():
            results, ctx.saved = chunks.forward(*call.inputs(moving), *chunks.sites)
        if chunks.recompute:
            ctx.saved, ctx.call = None, call
            ctx.save_for_backward(*moving)
        return (*ordinary(results), chain.new_empty(0))

    @staticmethod
    def backward(ctx, *grads):
        chunks, graph, saved = ctx.chunks, ctx.chunks.graph, ctx.saved
        ctx.saved = None
        with chunks.mode():
            if chunks.recompute:
                with contextlib.nullcontext() if ctx.random is None else ctx.random.again():
                    _, saved = chunks.forward(*ctx.call.inputs(ctx.saved_tensors), *chunks.sites)
            gradients = chunks.backward(chunks.sink, saved, *grads[:-1])
        given = dict(zip(graph.code.wants, ordinary(gradients)))
        return (None, grads[-1], *(given.get(i) for i in graph.moving))
