"""Weight-gradient sinking: the token loop keeps activation gradients only, one product per weight runs after it.

By linearity ``sum_c X_c^T G_c = [X_1; ..; X_n]^T [G_1; ..; G_n]``: instead of one small product per chunk, which reads and
writes the whole accumulator each time, the operands of many chunks are kept and multiplied together (arXiv 1604.01946; the
B/W split of arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from depthpass_kernels import bridge_in
from depthpass_kernels.packed_linear import contraction
from torch import Tensor

from depthpass_lowering.products.packed import Products, Tensors, Weights, plain
from depthpass_lowering.state.buffers import outer_mode

FLUSH = {"cpu": 256, "cuda": 8192}
"""Rows gathered before they are multiplied, by device: enough for a product near full rate, few enough to hold little memory.
On a GPU every partial sum reads and writes a whole weight gradient, which at the 1B shape cost as much as the products."""


LARGEST = 1 << 16
"""Entries of gathered gradients of one parameter that wait to be summed: gains of norms, many small ones."""


class Sink:
    """Operands of the weight gradients of one backward pass, by weight, multiplied every so many rows (``FLUSH``).

    Args:
        uses: how often the loop multiplies each weight, in each direction.

    Attributes:
        leaves: ids of the stand-ins of parameters, whose gradients it may take as well.
    """

    def __init__(self, uses: int = 0) -> None:
        self.products = Products(uses)
        self._waiting: dict[tuple, _Operands] = {}
        self._sums: dict[tuple, Tensor] = {}
        self._bias_sums: dict[int, Tensor] = {}
        self._cast: dict[int, Tensor] = {}
        self._others: dict[int, list[Tensor]] = {}
        self.leaves: set[int] = set()

    def add(self, w: Weights, xs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Keep the operands of one product's weight gradients.

        Args:
            xs: the streams ``[..., in]`` that the product read, as for :meth:`Products.forward`.
            grads: gradients of its results, ``[..., out]`` by weight, or of all of them side by side.
        """
        trained = [i for i, (t, b) in enumerate(zip(w.weights, w.biases)) if _trains(t, b)]
        if not trained:
            return
        if len(trained) < len(w.weights):
            # A frozen weight beside a trained one (LoRA) needs no product.
            if not w.joined and len(grads) == 1:
                grads = grads[0].split(w.sizes(), -1)
            if w.joined and len(xs) == 1:
                xs = xs[0].split(w.sizes(), -1)
            xs = [xs[i] for i in trained] if w.joined else xs
            grads = grads if w.joined else [grads[i] for i in trained]
            w = Weights(tuple(w.weights[i] for i in trained), tuple(w.biases[i] for i in trained), w.joined, w.transposed)
        held = self._waiting.setdefault(w.key, _Operands(w))
        self.hold(held, _joined(xs), _joined(grads))

    def trains(self, w: Weights) -> _Operands | None:
        """Where the operands of weights wait that are all trained; None: a part of them is frozen."""
        if w.gain is not None or all(_trains(t, b) for t, b in zip(w.weights, w.biases)):
            return self._waiting.setdefault(w.key, _Operands(w))
        return None

    def hold(self, held: _Operands, x: Tensor, g: Tensor) -> None:
        """As :meth:`add`, of weights that are all trained and multiplied as one."""
        if not held.g:
            held.room = -(-FLUSH.get(g.device.type, FLUSH["cuda"]) // max(1, g.shape[:-1].numel()))
        held.x.append(x)
        held.g.append(g)
        if len(held.g) >= held.room:
            self._flush(held)

    @outer_mode()
    def gather(self, parameter: Tensor, grad: Tensor, alone: bool = False) -> None:
        """Add to the gradient of a parameter that is no weight of a product; ``alone``: nobody else has the tensor."""
        parts = self._others.setdefault(id(parameter), [])
        parts.append(grad if alone else grad.clone())
        if len(parts) * grad.numel() >= LARGEST:
            parts[:] = [_total(parts)]

    def cast(self, w: Weights, dtype: torch.dtype | None) -> Weights:
        """Weights in autocast's dtype, cast once per loop; None = as they are."""
        if dtype is None:
            return w
        biases = tuple(None if b is None else self._in(b, dtype) for b in w.biases)
        return Weights(tuple(self._in(t, dtype) for t in w.weights), biases, w.joined, w.transposed)

    def _in(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        if parameter.dtype == dtype:
            return parameter
        if id(parameter) not in self._cast:
            self._cast[id(parameter)] = parameter.to(dtype)
        return self._cast[id(parameter)]

    def finish(self) -> dict[int, Tensor]:
        """Gradients by id of the weight or bias; empties the sink."""
        gradients: dict[int, Tensor] = {}
        for key, held in self._waiting.items():
            self._flush(held)
            w = held.weights
            if key in self._sums:
                parts = self._sums[key].split(w.sizes(), 1 if w.joined or w.transposed else 0)
                for t, part in zip(w.weights, parts):
                    if w.gain is not None:
                        part = _through_gain(gradients, w, t, part)
                    if t.requires_grad:
                        _gather(gradients, t, part.contiguous())
            for b in w.biases:
                if b is not None and id(b) in self._bias_sums:
                    gradients[id(b)] = self._bias_sums[id(b)]
        for key, g in ((key, _total(parts)) for key, parts in self._others.items()):
            gradients[key] = gradients[key] + g if key in gradients else g
        self.__init__(self.products.uses)
        return gradients

    @outer_mode()
    def _flush(self, held: _Operands) -> None:
        if not held.g:
            return
        w, x, g = held.weights, _rows(held.x), _rows(held.g)
        held.x, held.g = [], []
        if any(t.requires_grad for t in w.weights):
            # Sums of low-precision products stay in the weight's own precision.
            part = (contraction(x, g) if w.transposed else contraction(g, x)).to(w.weights[0].dtype)
            total = self._sums.get(w.key)
            self._sums[w.key] = part if total is None else total.add_(part)
        biases = [b for b in w.biases if b is not None and b.requires_grad]
        if not biases:
            return
        sums = g.sum(0)
        parts = [sums] * len(w.biases) if w.joined or w.transposed else sums.split(w.sizes())
        for b, part in zip(w.biases, parts):
            if b is not None and b.requires_grad:
                self._bias_sums[id(b)] = self._bias_sums.get(id(b), 0) + part.to(b.dtype)


def _total(parts: list[Tensor]) -> Tensor:
    """The sum of gradients of one shape, in one sweep over them."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class _Operands:
    """What the weights of one product wait for.

    Attributes:
        room: how many operands are gathered before they are multiplied.
    """

    __slots__ = ("g", "room", "weights", "x")

    def __init__(self, weights: Weights):
        self.weights = weights
        self.x: list[Tensor] = []
        self.g: list[Tensor] = []
        self.room = 0


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _gather(gradients: dict[int, Tensor], weight: Tensor, part: Tensor) -> None:
    """Add to a weight's gradient: it may stand in several products (tied, or visited in other company)."""
    known = gradients.get(id(weight))
    gradients[id(weight)] = part if known is None else known + part


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Streams side by side as one matrix."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
    return whole.reshape(-1, whole.shape[-1])


def _through_gain(gradients: dict[int, Tensor], w: Weights, weight: Tensor, part: Tensor) -> Tensor:
    """The gradient of a weight from that of the weight with its gain taken in, and the gain's own."""
    gain = w.gain
    assert gain is not None
    if gain.requires_grad:
        _gather(gradients, gain, (part * weight.detach()).sum(1 if w.transposed else 0))
    return part * (gain.detach()[:, None] if w.transposed else gain.detach())


def _rows(parts: list[Tensor]) -> Tensor:
    """Operands of several chunks of the same rows, ``[.., tokens, width]``, below one another: ``[rows, width]``."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -2)).flatten(0, -2)


class _SunkProduct(torch.autograd.Function):
    """Products with parameters whose backward returns activation gradients only and reports to the sink.

    With ``steps`` they are products of what pointwise steps make of the inputs, taken again in the backward pass.
    """

    @staticmethod
    def forward(ctx, sink: Sink, w: Weights, dtype: torch.dtype | None, steps: Callable[..., Tensor] | None, *leaves: Tensor):
        ctx.sink, ctx.weights, ctx.dtype, ctx.steps = sink, w, dtype, steps
        ctx.save_for_backward(*(leaves if steps or any(_trains(t, b) for t, b in zip(w.weights, w.biases)) else ()))
        xs = leaves if steps is None else [_cast(steps(*leaves), dtype)]
        return tuple(sink.products.forward(sink.cast(w, dtype), xs))

    @staticmethod
    def backward(ctx, *grads):
        sink, w, dtype, steps, leaves = ctx.sink, ctx.weights, ctx.dtype, ctx.steps, ctx.saved_tensors
        xs = leaves
        if steps is not None:
            leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in leaves]
            with torch.enable_grad(), torch.autocast(grads[0].device.type, dtype, enabled=dtype is not None):
                xs = [_cast(steps(*leaves), dtype)]
        if xs:
            sink.add(w, [x.detach() for x in xs], grads)
        if not any(ctx.needs_input_grad):
            return (None,) * len(ctx.needs_input_grad)
        dxs = sink.products.backward(sink.cast(w, dtype), grads)
        return (None, None, None, None, *(dxs if steps is None else torch.autograd.grad(xs, leaves, dxs)))


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def sunk_products(sink: Sink, w: Weights, *xs: Tensor) -> Sequence[Tensor]:
    """Products with parameters, their weight gradients sunk when there are any to compute.

    Args:
        xs: the stream ``[..., in]``, or of joined weights one for each.

    Returns:
        results ``[..., out]`` by weight, or of joined weights one, the sum.
    """
    dtype = _autocast_dtype(xs[0])
    xs = tuple(_cast(x, dtype) for x in xs)
    if not torch.is_grad_enabled():
        return sink.products.forward(sink.cast(w, dtype), xs)
    if not any(x.requires_grad for x in xs) and not any(_trains(t, b) for t, b in zip(w.weights, w.biases)):
        return plain(w, xs)
    return _SunkProduct.apply(sink, w, dtype, None, *xs)


def sunk_absorbed(sink: Sink, w: Weights, steps: Callable[..., Tensor], *leaves: Tensor) -> Sequence[Tensor]:
    """As :func:`sunk_products` of ``steps(*leaves)``, keeping the leaves only."""
    dtype = _autocast_dtype(leaves[0])
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in leaves):
        return sunk_products(sink, w, steps(*leaves))
    return _SunkProduct.apply(sink, w, dtype, steps, *leaves)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a product's operands here; None = nothing."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else None


def sunk_linear(sink: Sink, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One product ``x W^T + b`` with W ``[out, in]``, its weight gradient sunk."""
    return sunk_products(sink, Weights((weight,), (bias,)), x)[0]


class _Landing(torch.autograd.Function):
    """A block's stream plus what bridges bring to it: one product for all of them, fused into one kernel on CUDA."""

    @staticmethod
    def forward(ctx, sink: Sink, w: Weights, dtype: torch.dtype | None, present: Tensor | None, x: Tensor, *cs: Tensor):
        ctx.sink, ctx.weights, ctx.dtype, ctx.present = sink, w, dtype, present
        ctx.types = [c.dtype for c in cs]
        ctx.save_for_backward(*(cs if any(_trains(t, b) for t, b in zip(w.weights, w.biases)) else ()))
        return landed(sink, sink.cast(w, dtype), present, x, cs if dtype is None else [c.to(dtype) for c in cs])

    @staticmethod
    def backward(ctx, grad):
        sink, w, present = ctx.sink, ctx.weights, ctx.present
        # Absent tokens brought nothing.
        g = grad if present is None else torch.where(present, grad, 0)
        g = g if ctx.dtype is None else g.to(ctx.dtype)
        if ctx.saved_tensors:
            sink.add(w, [c.to(g.dtype) for c in ctx.saved_tensors], [g])
        dcs = sink.products.backward(sink.cast(w, ctx.dtype), [g])
        return (None, None, None, None, grad, *(d.to(t) for d, t in zip(dcs, ctx.types)))


def _fuses(x: Tensor) -> bool:
    """Whether the fused bridge runs here: on a CPU packed products are faster."""
    return x.is_cuda


def landed(sink: Sink, w: Weights, present: Tensor | None, x: Tensor, cs: Tensors) -> Tensor:
    """``x + present * (sum_b c_b W_b^T + bias_b)``, without gradient."""
    if _fuses(x) and x.dtype == cs[0].dtype == w.weights[0].dtype:
        mask = None if present is None else present.squeeze(-1).expand(x.shape[:-1])
        matrix, bias = sink.products.whole(w, x)[:2]
        return bridge_in(x, cs[0] if len(cs) == 1 else torch.cat(list(cs), -1), matrix, bias, present=mask)[0]
    (y,) = sink.products.forward(w, cs)
    return x + (y if present is None else torch.where(present, y, 0))


def sunk_landing(sink: Sink, w: Weights, present: Tensor | None, x: Tensor, *cs: Tensor) -> Tensor:
    """Add what bridges bring to a stream, their weight gradients sunk.

    Args:
        w: joined up-weights ``[width, rank]``.
        present: ``[batch or 1, tokens, 1]`` bool, where the bridges' delay reaches back to a real token; None = everywhere.
        x: ``[batch, tokens, width]``; cs: delayed streams ``[batch, tokens, rank]``, one for each weight.
    """
    dtype = _autocast_dtype(x)
    if not torch.is_grad_enabled():
        return landed(sink, sink.cast(w, dtype), present, x, cs if dtype is None else [c.to(dtype) for c in cs])
    return _Landing.apply(sink, w, dtype, present, x, *cs)
