"""The products with parameters of a segment, told by running it: what is multiplied, from what, and what the sink keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from depthpass_kernels.packed_linear import blocked, packed_product
from torch import Tensor, fx

from depthpass_lowering.fx_passes.products import land, products
from depthpass_lowering.products.packed import Weights, plain
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
        gain: which input is the gain of the norm that x comes from, where its gradient comes from those of the weights:
            of ``gain * n`` the sink then keeps n.
    """

    weights: tuple[int, ...]
    biases: tuple[int | None, ...]
    joined: bool
    transposed: bool
    dtype: torch.dtype | None
    packed: bool
    trained: bool
    gain: int | None = None

    @property
    def grads(self) -> int:
        """Gradients of results that it reports."""
        return 1 if self.packed or self.joined else len(self.weights)

    def of(self, inputs: Sequence[Tensor]) -> Weights:
        """The weights among the inputs of a call."""
        biases = tuple(None if b is None else inputs[b] for b in self.biases)
        return Weights(tuple(inputs[w] for w in self.weights), biases, self.joined, self.transposed)

    def sunk(self, inputs: Sequence[Tensor]) -> Weights:
        """The weights as the sink is to know them."""
        return replace(self.of(inputs), gain=None if self.gain is None else inputs[self.gain])

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


class _PackedProduct(torch.autograd.Function):
    """A product from packed weights in a trace: both directions read weights that are inputs of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, back: Tensor | None, bias: Tensor | None):
        ctx.save_for_backward(back)
        return packed_product(x, weight, bias)

    @staticmethod
    def backward(ctx, g: Tensor):
        return packed_product(g, ctx.saved_tensors[0], None), None, None, None


class Recorder(fx.Interpreter):
    """Runs a segment with detached weights and records operands and results of its products.

    Args:
        sink: says which products are packed.
        dtype: autocast's; None = no autocast.
        trained: whether there will be a backward pass.
        operands: of the products, one after the other; None = run on the segment's inputs, which tells the products.
        gains: of :func:`gains_of`.
    """

    def __init__(
        self, gm: fx.GraphModule, sink: Sink, dtype: torch.dtype | None, trained: bool,
        operands: Sequence[Tensor] | None = None, gains: Mapping[fx.Node, tuple[int, fx.Node]] | None = None,
    ):
        super().__init__(gm, garbage_collect_values=False)  # the factors of a product with a gain are read once more
        self.sink, self.dtype, self.trained = sink, dtype, trained
        self.operands = None if operands is None else list(operands)
        self.gains = gains or {}
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
            gain, source = self.gains.get(x, (None, x))
            return self._multiply(weights, biases, False, transposed, [self.env[x]], [self.env[source]], gain)
        if n.target is land:
            weights, biases, mask, x, *cs = cast(Any, n.args)
            given = [self.env[c] for c in cs]
            (y,) = self._multiply(weights, biases, True, False, given, given)
            return self.env[x] + (y if mask is None else torch.where(self.env[mask], y, 0))
        return super().run_node(n)

    def _multiply(
        self, weights, biases, joined: bool, transposed: bool, xs: list[Tensor], kept: list[Tensor], gain: int | None = None
    ) -> list[Tensor]:
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
            transposed, dtype, packed, self.trained, gain,
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
        flat = [x.reshape(-1, x.shape[-1]).to(xs[0].dtype) for x in kept]
        self.x.append(flat[0] if len(flat) == 1 else torch.cat(flat, -1))
        self.products.append(product)
        return outs


Gains = dict[fx.Node, tuple[int, fx.Node]]


def gains_of(gm: fx.GraphModule, inputs: Sequence[Tensor], trains: Sequence[bool], leaves: Sequence[bool]) -> Gains:
    """Products of a norm with its gain, ``gain * n``, that nothing but products with trained weights reads: input and n.

    With M = sum_rows g^T n the weight's gradient is ``M * gain``, the gain's ``sum_out W * M``: of weights, once behind the
    loop. By itself it is a sum over the rows of every chunk, which on a GPU took as long as the norm.
    """
    place = {n: i for i, n in enumerate(m for m in gm.graph.nodes if m.op == "placeholder")}

    def reads(u: fx.Node, m: fx.Node) -> bool:
        return u.target is products and u.args[3] is m and all(trains[place[w]] for w in cast(Sequence, u.args[1]))

    def scales(m: fx.Node, gain: Tensor, n: fx.Node) -> bool:
        vector = _size(n) == _size(m) and _size(m)[-2:-1] == gain.shape
        return vector and m.target is torch.ops.aten.mul.Tensor and all(reads(u, m) for u in m.users)

    gains: Gains = {}
    for node, i in place.items():
        factors = {m: [a for a in m.all_input_nodes if a is not node] for m in node.users}
        if trains[i] and leaves[i] and all(len(of) == 1 and scales(m, inputs[i], *of) for m, of in factors.items()):
            gains |= {m: (i, of[0]) for m, of in factors.items()}
    return gains


def _size(n: fx.Node) -> tuple:
    """Shape and dtype of a node's value."""
    return (*n.meta["val"].shape, n.meta["val"].dtype) if isinstance(n.meta.get("val"), Tensor) else (n,)
