"""Compile a segment of a block, forward and backward, with its weight gradients left for after the token loop.

A segment is a token-local piece of a block's graph between attention calls. Its forward and backward passes are traced
into one graph in which every product with a parameter, ``y = x W``, hands out x and the gradient of y in place of the
weight's gradient; the graph is cut in two where recomputing is cheaper than keeping, and both halves go to Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from depthpass.log import working
from depthpass_lowering.fx_passes.effects import writes
from depthpass_lowering.fx_passes.products import land, products
from depthpass_lowering.products.packed import Weights, blocked, packed_product, plain
from depthpass_lowering.products.sink import Sink


@dataclass(frozen=True)
class Product:
    """A product with parameters whose weight gradients are sunk.

    Attributes:
        weights, biases: which inputs of the segment they are.
        joined, transposed: as of :class:`depthpass_lowering.products.packed.Weights`.
        dtype: autocast's, which x and the weights are cast to; None = their own.
        packed: whether it is taken from packed weights.
        trained: whether there is a backward pass.
    """

    weights: tuple[int, ...]
    biases: tuple[int | None, ...]
    joined: bool
    transposed: bool
    dtype: torch.dtype | None
    packed: bool
    trained: bool

    @property
    def grads(self) -> int:
        """Gradients of results that it reports."""
        return 1 if self.packed or self.joined else len(self.weights)

    def of(self, inputs: Sequence[Tensor]) -> Weights:
        """The weights among the inputs of a call."""
        biases = tuple(None if b is None else inputs[b] for b in self.biases)
        return Weights(tuple(inputs[w] for w in self.weights), biases, self.joined, self.transposed)

    def operands(self, w: Weights, sink: Sink) -> list[Tensor]:
        """What the product reads instead of the segment's inputs: packed weights, or those that are cast once per loop.

        Packed are W, where there is a backward pass its transpose, and b if there is any bias.
        """
        w = sink.cast(w, self.dtype)
        if self.packed:
            matrix, bias = sink.products.packed(w, w.weights[0])
            back = [sink.products.packed_back(w, w.weights[0])] if self.trained else []
            return [matrix, *back, *([] if bias is None else [bias])]
        return [] if self.dtype is None else [*w.weights, *(b for b in w.biases if b is not None)]

    def examples(self, w: Weights) -> list[Tensor]:
        """Tensors like the operands, for a trace."""
        biases = [b for b in w.biases if b is not None]
        dtype = self.dtype or w.weights[0].dtype
        if self.packed:
            rows, columns = w.shape()
            like = w.weights[0].new_empty((), dtype=dtype)
            operands = [like.new_empty(rows, columns)]
            if self.trained:
                # A view of W where there are no blocks: a compiled graph relies on its strides.
                operands.append(like.new_empty(columns, rows) if blocked(like.new_empty(1, 1), like) else operands[0].t())
            return [*operands, *([like.new_empty(rows)] if biases else [])]
        return [] if self.dtype is None else [torch.empty_like(t, dtype=dtype) for t in (*w.weights, *biases)]


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


class _PackedProduct(torch.autograd.Function):
    """A product from packed weights in a trace: both directions read weights that are inputs of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, back: Tensor | None, bias: Tensor | None):
        ctx.save_for_backward(back)
        return packed_product(x, weight, bias)

    @staticmethod
    def backward(ctx, g: Tensor):
        return packed_product(g, ctx.saved_tensors[0], None), None, None, None


class _Recorder(fx.Interpreter):
    """Runs a segment with detached weights and records operands and results of its products.

    Args:
        sink: says which products are packed.
        dtype: autocast's; None = no autocast.
        trained: whether there will be a backward pass.
        operands: of the products, one after the other; None = run on the segment's inputs, which tells the products.
    """

    def __init__(
        self, gm: fx.GraphModule, sink: Sink, dtype: torch.dtype | None, trained: bool,
        operands: Sequence[Tensor] | None = None,
    ):
        super().__init__(gm)
        self.sink, self.dtype, self.trained = sink, dtype, trained
        self.operands = None if operands is None else list(operands)
        self.place = {n: i for i, n in enumerate(m for m in gm.graph.nodes if m.op == "placeholder")}
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []
        self.products: list[Product] = []

    def run(self, *args, **kwargs):
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node):
        if n.target is products:
            transposed, weights, biases, x = cast(Any, n.args)
            return self._multiply(weights, biases, False, transposed, [self.env[x]])
        if n.target is land:
            weights, biases, mask, x, *cs = cast(Any, n.args)
            (y,) = self._multiply(weights, biases, True, False, [self.env[c] for c in cs])
            return self.env[x] + (y if mask is None else torch.where(self.env[mask], y, 0))
        return super().run_node(n)

    def _multiply(self, weights, biases, joined: bool, transposed: bool, xs: list[Tensor]) -> list[Tensor]:
        own = Weights(
            tuple(self.env[w].detach() for w in weights),
            tuple(None if b is None else self.env[b].detach() for b in biases), joined, transposed,
        )
        dtype = None if xs[0].dtype == torch.float64 else self.dtype
        if dtype is not None:
            xs = [x.to(dtype) for x in xs]
        # Not through the sink, which keeps what it casts: these tensors exist in the trace only.
        cast = Weights(
            tuple(t.to(xs[0].dtype) for t in own.weights),
            tuple(None if b is None else b.to(xs[0].dtype) for b in own.biases), joined, transposed,
        )
        packed = self.sink.products.packs(cast, xs[0])
        product = Product(
            tuple(self.place[t] for t in weights), tuple(None if b is None else self.place[b] for b in biases), joined,
            transposed, dtype, packed, self.trained,
        )
        operands = [] if self.operands is None else [self.operands.pop(0) for _ in product.examples(own)]
        if operands and packed:
            bias = operands.pop() if operands[-1].dim() == 1 else None
            whole = xs[0] if len(xs) == 1 else torch.cat(xs, -1)
            y = _PackedProduct.apply(whole, operands[0], operands[1] if self.trained else None, bias)
            self.y.append(y)
            outs = [y] if joined or len(weights) == 1 else list(y.split(own.sizes(), -1))
        else:
            if operands:
                rest = iter(operands[len(weights) :])
                cast = Weights(
                    tuple(operands[: len(weights)]), tuple(None if b is None else next(rest) for b in biases), joined, transposed
                )
            outs = plain(cast, xs)
            self.y += outs
        flat = [x.reshape(-1, x.shape[-1]) for x in xs]
        self.x.append(flat[0] if len(flat) == 1 else torch.cat(flat, -1))
        self.products.append(product)
        return outs


def trace(
    gm: fx.GraphModule, inputs: Sequence[Tensor], trains: Sequence[bool], sink: Sink, dtype: torch.dtype | None
) -> Joint:
    """Trace and compile a segment for inputs of these shapes.

    Args:
        trains: which inputs need a gradient; among weights of products it only says whether to sink theirs.
        sink: of the loop, which says which products are packed.
        dtype: autocast's; None = no autocast.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    # Nothing is computed here: dropout must not draw from the generators of the run.
    with FakeTensorMode(), torch.no_grad():
        examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
        probe = _Recorder(gm, sink, dtype, any(trains))
        results = probe.run(*examples)
        for product in probe.products:
            examples += product.examples(product.of(examples))
    own = len(inputs)
    if not any(trains):
        forward = _forward_only(gm, sink, dtype, examples, own)
        return Joint(forward, None, len(results), (), (), tuple(probe.products), ())
    weights = {i for p in probe.products for i in (*p.weights, *p.biases) if i is not None}
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
            recorder = _Recorder(gm, sink, dtype, True, leaves[own:])
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
        return _Recorder(gm, sink, dtype, False, primals[own:]).run(*primals[:own])

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
        key = (trains, dtype, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs))
        joint = self.joints.get(key)
        if joint is None:
            # A backward pass runs without autocast, and so do the casts that are in the trace already.
            with torch.autocast(device, enabled=False):
                joint = self.joints[key] = trace(self.gm, inputs, trains, sink, dtype)
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
        ctx.products = [(p, p.of(inputs)) for p in joint.products if _is_sunk(p, trains)]
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
