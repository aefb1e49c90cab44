"""Compile a segment of a block, forward and backward, with its weight gradients left for after the token loop.

A segment is a token-local piece of a block's graph between attention calls. Its forward and backward passes are traced
into one graph in which every product with a parameter, ``y = x W``, hands out x and the gradient of y in place of the
weight's gradient; the graph is cut in two where recomputing is cheaper than keeping, and both halves go to Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from depthpass.log import working
from depthpass_lowering.fx_passes.effects import writes
from depthpass_lowering.products.sink import Sink
from depthpass_lowering.products.traced import Product, Recorder, gains_of


@dataclass(frozen=True)
class Joint:
    """A segment compiled for one set of shapes.

    Attributes:
        forward: inputs and the products' operands -> results, operands x of the products, then what the backward pass needs.
        backward: what it needs, then gradients of the results -> gradients of ``wants``, then of the products' results.
            None = nothing to train.
        results: how many results.
        differentiable: which results have a gradient.
        wants: which inputs get a gradient (activations and parameters that are no weight of a product).
        strides: of what the backward pass was traced with for each gradient of a result.
    """

    forward: Callable
    backward: Callable | None
    results: int
    differentiable: tuple[int, ...]
    wants: tuple[int, ...]
    products: tuple[Product, ...]
    strides: tuple[tuple[int, ...], ...]


def trace(
    gm: fx.GraphModule, inputs: Sequence[Tensor], trains: Sequence[bool], leaves: Sequence[bool], sink: Sink,
    dtype: torch.dtype | None,
) -> Joint:
    """Trace and compile a segment for inputs of these shapes.

    Args:
        trains: which inputs need a gradient; among weights of products it only says whether to sink theirs.
        leaves: which inputs are parameters, whose gradients the sink may take.
        sink: of the loop, which says which products are packed.
        dtype: autocast's; None = no autocast.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    # Nothing is computed here: dropout must not draw from the generators of the run.
    with FakeTensorMode(), torch.no_grad():
        examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
        gains = gains_of(gm, inputs, trains, leaves)
        probe = Recorder(gm, sink, dtype, any(trains), gains=gains)
        results = probe.run(*examples)
        for product in probe.products:
            examples += product.examples(product.of(examples))
    own = len(inputs)
    if not any(trains):
        forward = _forward_only(gm, sink, dtype, examples, own)
        return Joint(forward, None, len(results), (), (), tuple(probe.products), ())
    weights = {i for p in probe.products for i in (*p.weights, *p.biases, p.gain) if i is not None}
    # A trained parameter that is no weight of a product is wanted like an activation.
    floating = [i for i, t in enumerate(inputs) if t.is_floating_point() and i not in weights]
    wants = tuple(i for i in floating if trains[i])
    differentiable = tuple(i for i, t in enumerate(results) if t.is_floating_point())
    sunk = [
        any(trains[i] for i in (*p.weights, *p.biases) if i is not None) for p in probe.products for _ in range(p.grads)
    ]

    def joint(primals, tangents):
        leaves = [t.detach().requires_grad_(i in floating) for i, t in enumerate(primals)]
        with torch.enable_grad():
            recorder = Recorder(gm, sink, dtype, True, leaves[own:], gains)
            outs = recorder.run(*leaves[:own])
            sources = [leaves[i] for i in wants] + [y for y, s in zip(recorder.y, sunk) if s]
            grads = torch.autograd.grad([outs[i] for i in differentiable], sources, tangents, allow_unused=True)
        grads = [torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads)]
        flat = [g.reshape(-1, g.shape[-1]) if k >= len(wants) else g for k, g in enumerate(grads)]
        kept = [x for x, p in zip(recorder.x, recorder.products) if _is_sunk(p, trains)]
        return [*outs, *kept], flat

    to_sink = tuple(p for p in probe.products if _is_sunk(p, trains))
    tangents = [torch.empty_like(results[i]) for i in differentiable]
    graph = make_fx(joint, decomposition_table=select_decomp_table(), tracing_mode="fake")(examples, tangents)
    if any(writes(n) for n in graph.graph.nodes):
        graph = _functional(graph, examples, tangents)
    _flatten(graph)
    forward, backward = min_cut_rematerialization_partition(graph, None, num_fwd_outputs=len(results) + len(to_sink))
    return Joint(
        _inductor(forward), _inductor(backward), len(results), differentiable, wants, tuple(probe.products),
        tuple(t.stride() for t in tangents),
    )


def _functional(mutating: fx.GraphModule, examples: Sequence[Tensor], tangents: Sequence[Tensor]) -> fx.GraphModule:
    """The same graph without writes: some formulas of gradients fill in place, which cannot be cut in two."""
    from torch._inductor.decomposition import select_decomp_table

    def whole(primals, tangents):  # the partitioner goes by these names
        return functionalize(mutating, remove="mutations_and_views")(primals, tangents)

    return make_fx(whole, decomposition_table=select_decomp_table(), tracing_mode="fake")(examples, tangents)


def _forward_only(
    gm: fx.GraphModule, sink: Sink, dtype: torch.dtype | None, examples: Sequence[Tensor], own: int
) -> Callable:
    """A segment without a backward pass, compiled; its own inputs are the first so many examples."""
    from torch._inductor.decomposition import select_decomp_table

    def plainly(*primals: Tensor):
        return Recorder(gm, sink, dtype, False, primals[own:]).run(*primals[:own])

    with torch.no_grad():
        graph = make_fx(plainly, decomposition_table=select_decomp_table(), tracing_mode="fake")(*examples)
    # The inner compiler runs what is dead as well.
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return _inductor(graph)


def _is_sunk(product: Product, trains: Sequence[bool]) -> bool:
    return any(trains[i] for i in (*product.weights, *product.biases) if i is not None)


def _flatten(gm: fx.GraphModule) -> None:
    """Give a traced graph a flat signature and a flat tuple of results, as the partitioner expects."""
    gm.graph.set_codegen(CodeGen())
    out = gm.graph.output_node()
    results: Any = out.args[0]
    if isinstance(results[0], (list, tuple)):
        out.args = (tuple(x for side in results for x in side),)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _inductor(gm: fx.GraphModule) -> Callable:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    # A packed weight has no strides to check.
    with config.patch(size_asserts=False), working(f"compiling {len(gm.graph.nodes)} ops of a chunk"):
        return compile_fx_inner(gm, [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"])


class Segment:
    """A compiled segment: called with a sink and the segment's inputs, under autograd or not."""

    def __init__(self, gm: fx.GraphModule):
        self.gm = gm
        self.joints: dict[tuple, Joint] = {}

    def __call__(self, sink: Sink, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(_plain(t) for t in inputs)
        trains = tuple(t.requires_grad and torch.is_grad_enabled() for t in inputs)
        device = inputs[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        leaves = tuple(id(t) in sink.leaves for t in inputs)
        key = (trains, leaves, dtype, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs))
        joint = self.joints.get(key)
        if joint is None:
            # A backward pass runs without autocast, and so do the casts that are in the trace already.
            with torch.autocast(device, enabled=False):
                joint = self.joints[key] = trace(self.gm, inputs, trains, leaves, sink, dtype)
        if any(trains):
            return _Segment.apply(joint, sink, trains, *inputs)
        return tuple(joint.forward([*inputs, *_operands(joint, sink, inputs)])[: joint.results])


def _operands(joint: Joint, sink: Sink, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t for p in joint.products for t in p.operands(p.of(inputs), sink)]


class _Segment(torch.autograd.Function):
    """One call of a compiled segment."""

    @staticmethod
    def forward(ctx, joint: Joint, sink: Sink, trains: tuple[bool, ...], *inputs: Tensor):
        results = joint.forward([*(t.detach() for t in inputs), *_operands(joint, sink, inputs)])
        ctx.joint, ctx.sink = joint, sink
        # The sink sums gradients of parameters in one sweep, autograd one at a time and in their own precision.
        ctx.parameters = {i: inputs[i] for i in joint.wants if id(inputs[i]) in sink.leaves}
        ctx.products = [(p, p.sunk(inputs)) for p in joint.products if _is_sunk(p, trains)]
        count = joint.results + len(ctx.products)
        ctx.operands = results[joint.results : count]
        ctx.saved = results[count:]
        outs = tuple(results[: joint.results])
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outs) if i not in joint.differentiable))
        return outs

    @staticmethod
    def backward(ctx, *grads):
        joint, sink = ctx.joint, ctx.sink
        tangents = [_strided(grads[i], s) for i, s in zip(joint.differentiable, joint.strides)]
        gradients = joint.backward([*ctx.saved, *tangents])
        rest = iter(gradients[len(joint.wants) :])
        for (product, w), x in zip(ctx.products, ctx.operands):
            sink.add(w, [x], [next(rest) for _ in range(product.grads)])
        ctx.saved = ctx.operands = ctx.products = None
        out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, g in zip(joint.wants, gradients):
            if i in ctx.parameters:
                sink.gather(ctx.parameters[i], g, alone=True)
            else:
                out[3 + i] = g
        return tuple(out)


def _plain(t: Tensor) -> Tensor:
    """A tensor with the strides of its shape: a chunk cut out of a row has those of the row."""
    return t if t.is_contiguous() else t.contiguous()


def _strided(g: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A gradient with the strides that the backward pass was traced with."""
    if g.stride() == strides:
        return g
    return torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
