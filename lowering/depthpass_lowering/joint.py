"""Compile a segment of a block, forward and backward, with its weight gradients left for after the token loop.

A segment is a token-local piece of a block's graph between attention calls. Its forward and backward passes are traced
into one graph in which every product with a parameter, ``y = x W``, hands out x and the gradient of y in the place of the
weight's gradient; the graph is cut in two where recomputing is cheaper than keeping, and both halves go to Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from depthpass_lowering.fx_passes.sink import match_product
from depthpass_lowering.sink import Sink


@dataclass(frozen=True)
class Product:
    """A product with a parameter whose weight gradient is sunk.

    Attributes:
        weight, bias: which inputs of the segment they are.
        transposed: whether the weight is ``[in, out]``.
    """

    weight: int
    bias: int | None
    transposed: bool


@dataclass(frozen=True)
class Joint:
    """A segment compiled for one set of shapes.

    Attributes:
        forward: inputs -> results, operands x of the products, then what the backward pass needs.
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


class _Recorder(fx.Interpreter):
    """Runs a segment with detached weights and records operands and results of its products."""

    def __init__(self, gm: fx.GraphModule, trains: Sequence[bool]):
        super().__init__(gm)
        self.trains = trains
        self.parameters = {n for n in gm.graph.nodes if n.op == "placeholder" and n.name.startswith("p_")}
        self.place = {n: i for i, n in enumerate(m for m in gm.graph.nodes if m.op == "placeholder")}
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []
        self.products: list[Product] = []

    def run_node(self, n: fx.Node):
        found = match_product(n, self.parameters)
        if found is None:
            return super().run_node(n)
        x, weight, bias, transposed = found
        value, w = self.env[x], self.env[weight].detach()
        b = None if bias is None else self.env[bias].detach()
        flat = value.reshape(-1, value.shape[-1])
        if transposed:
            y = torch.addmm(b, flat, w)
        else:
            y = torch.nn.functional.linear(value, w, b)
        product = Product(self.place[weight], None if bias is None else self.place[bias], transposed)
        if any(self.trains[i] for i in (product.weight, product.bias) if i is not None):
            self.x.append(flat)
            self.y.append(y)
            self.products.append(product)
        return y


def trace(gm: fx.GraphModule, inputs: Sequence[Tensor], trains: Sequence[bool]) -> Joint:
    """Trace and compile a segment for inputs of these shapes.

    Args:
        trains: which inputs need a gradient; among weights of products it only says whether to sink theirs.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    if not any(trains):
        return _forward_only(gm, inputs)
    examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
    with torch.no_grad():
        probe = _Recorder(gm, trains)
        results = probe.run(*examples)
    weights = {i for p in probe.products for i in (p.weight, p.bias) if i is not None}
    # A trained weight that is not the weight of a product is wanted like an activation.
    floating = [i for i, t in enumerate(inputs) if t.is_floating_point() and i not in weights]
    wants = tuple(i for i in floating if trains[i])
    differentiable = tuple(i for i, t in enumerate(results) if t.is_floating_point())

    def joint(primals, tangents):
        leaves = [t.detach().requires_grad_(i in floating) for i, t in enumerate(primals)]
        with torch.enable_grad():
            recorder = _Recorder(gm, trains)
            outs = recorder.run(*leaves)
            sources = [leaves[i] for i in wants] + recorder.y
            grads = torch.autograd.grad([outs[i] for i in differentiable], sources, tangents, allow_unused=True)
        grads = [torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads)]
        flat = [g.reshape(-1, g.shape[-1]) if k >= len(wants) else g for k, g in enumerate(grads)]
        return [*outs, *recorder.x], flat

    tangents = [torch.empty_like(results[i]) for i in differentiable]
    graph = make_fx(joint, decomposition_table=select_decomp_table(), tracing_mode="fake")(examples, tangents)
    _flatten(graph)
    forward, backward = min_cut_rematerialization_partition(
        graph, None, num_fwd_outputs=len(results) + len(probe.products)
    )
    return Joint(
        _inductor(forward), _inductor(backward), len(results), differentiable, wants, tuple(probe.products),
        tuple(t.stride() for t in tangents),
    )


def _forward_only(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Joint:
    """A segment that needs no gradient."""
    from torch._inductor.decomposition import select_decomp_table

    with torch.no_grad():
        graph = make_fx(gm, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    return Joint(_inductor(graph), None, len(graph.graph.output_node().args[0]), (), (), (), ())


def _flatten(gm: fx.GraphModule) -> None:
    """Give a traced graph a flat signature and a flat tuple of results, as the partitioner expects."""
    gm.graph.set_codegen(fx.graph.CodeGen())
    out = gm.graph.output_node()
    if isinstance(out.args[0][0], (list, tuple)):
        out.args = (tuple(x for side in out.args[0] for x in side),)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _inductor(gm: fx.GraphModule) -> Callable:
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"])


class Segment:
    """A compiled segment: called with a sink and the segment's inputs, under autograd or not."""

    def __init__(self, gm: fx.GraphModule):
        self.gm = gm
        self.made: dict[tuple, Joint] = {}

    def __call__(self, sink: Sink, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(_plain(t) for t in inputs)
        trains = tuple(t.requires_grad and torch.is_grad_enabled() for t in inputs)
        key = (trains, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs))
        joint = self.made.get(key)
        if joint is None:
            joint = self.made[key] = trace(self.gm, inputs, trains)
        if any(trains):
            return _Segment.apply(joint, sink, *inputs)
        return tuple(joint.forward(list(inputs))[: joint.results])


class _Segment(torch.autograd.Function):
    """One call of a compiled segment."""

    @staticmethod
    def forward(ctx, joint: Joint, sink: Sink, *inputs: Tensor):
        made = joint.forward([t.detach() for t in inputs])
        ctx.joint, ctx.sink = joint, sink
        count = joint.results + len(joint.products)
        ctx.inputs = [None if p is None else inputs[p] for q in joint.products for p in (q.weight, q.bias)]
        ctx.operands = made[joint.results : count]
        ctx.saved = made[count:]
        outs = tuple(made[: joint.results])
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outs) if i not in joint.differentiable))
        return outs

    @staticmethod
    def backward(ctx, *grads):
        joint, sink = ctx.joint, ctx.sink
        tangents = [_strided(grads[i], s) for i, s in zip(joint.differentiable, joint.strides)]
        found = joint.backward([*ctx.saved, *tangents])
        weights = iter(ctx.inputs)
        for product, x, g in zip(joint.products, ctx.operands, found[len(joint.wants) :]):
            weight, bias = next(weights), next(weights)
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                sink.add(weight, bias, product.transposed, x, g)
        ctx.saved = ctx.operands = ctx.inputs = None
        out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, g in zip(joint.wants, found):
            out[2 + i] = g
        return tuple(out)


def _plain(t: Tensor) -> Tensor:
    """A tensor with the strides of its shape: a chunk cut out of a row has those of the row."""
    return t if t.is_contiguous() else t.contiguous()


def _strided(g: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A gradient with the strides that the backward pass was traced with."""
    if g.stride() == strides:
        return g
    return torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
