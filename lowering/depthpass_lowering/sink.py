"""Weight-gradient sinking: the token loop keeps activation gradients only, one product per weight runs after it.

By linearity ``sum_c X_c^T G_c = [X_1; ..; X_n]^T [G_1; ..; G_n]``: instead of one small product per chunk, which reads and
writes the whole accumulator each time, the operands of many chunks are kept and multiplied together (arXiv 1604.01946; the
B/W split of arXiv 2401.10241).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthpass_lowering.products import Products, contraction

FLUSH = 256
"""Rows gathered before they are multiplied: enough for a product near full rate, few enough to hold little memory."""


class Sink:
    """Operands of the weight gradients of one backward pass, by weight, multiplied every ``FLUSH`` rows.

    Args:
        uses: how often the loop multiplies each weight, in each direction.
    """

    def __init__(self, uses: int = 0) -> None:
        self.products = Products(uses)
        self._waiting: dict[int, _Operands] = {}
        self._sums: dict[int, Tensor] = {}
        self._cast: dict[int, Tensor] = {}
        # What was joined last: q, k and v (gate and up) read the same activations.
        self._joined: tuple[list[Tensor], Tensor] = ([], torch.empty(0))

    def add(self, weight: Tensor, bias: Tensor | None, transposed: bool, x: Tensor, g: Tensor) -> None:
        """Keep the operands of one product's weight gradient.

        Args:
            x: the product's input, ``[..., in]``; g: gradient of its result, ``[..., out]``.
        """
        held = self._waiting.setdefault(id(weight), _Operands(weight, bias, transposed))
        held.x.append(x)
        held.g.append(g)
        held.rows += x.numel() // x.shape[-1]
        if held.rows >= FLUSH:
            self._flush(held)

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter in autocast's dtype, cast once per loop."""
        if parameter.dtype == dtype:
            return parameter
        if id(parameter) not in self._cast:
            self._cast[id(parameter)] = parameter.to(dtype)
        return self._cast[id(parameter)]

    def finish(self) -> dict[int, Tensor]:
        """Gradients by id of the weight or bias; empties the sink."""
        for held in self._waiting.values():
            self._flush(held)
        found = {
            id(t): self._sums[id(t)].to(t.dtype)
            for held in self._waiting.values() for t in (held.weight, held.bias) if t is not None and id(t) in self._sums
        }
        self.__init__(self.products.uses)
        return found

    def _flush(self, held: _Operands) -> None:
        if not held.rows:
            return
        parts, x = self._joined
        if len(parts) != len(held.x) or any(a is not b for a, b in zip(parts, held.x)):
            x = _rows(held.x)
            self._joined = held.x, x
        g = _rows(held.g)
        if held.weight.requires_grad:
            self._multiply(held.weight, *((x, g) if held.transposed else (g, x)))
        if held.bias is not None and held.bias.requires_grad:
            self._sums[id(held.bias)] = self._sums.get(id(held.bias), 0) + g.sum(0)
        held.x, held.g, held.rows = [], [], 0

    def _multiply(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        # Sums of low-precision products stay in the weight's own precision.
        part = contraction(a, b).to(weight.dtype)
        total = self._sums.get(id(weight))
        self._sums[id(weight)] = part if total is None else total.add_(part)


class _Operands:
    """What one weight waits for."""

    __slots__ = ("bias", "g", "rows", "transposed", "weight", "x")

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool):
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self.x: list[Tensor] = []
        self.g: list[Tensor] = []
        self.rows = 0


def _rows(parts: list[Tensor]) -> Tensor:
    flat = [p.reshape(-1, p.shape[-1]) for p in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


class _SunkLinear(torch.autograd.Function):
    """``x W^T + b`` (or ``x W + b``) whose backward returns the activation gradient only and reports to the sink."""

    @staticmethod
    def forward(ctx, x: Tensor, holder: tuple) -> Tensor:
        _, weight, bias, transposed, dtype = holder
        ctx.holder = holder
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.save_for_backward(x if trains else None)
        return _product(holder, x, weight, bias, transposed, dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        (x,) = ctx.saved_tensors
        sink, weight, bias, transposed, dtype = ctx.holder
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            sink.add(weight, bias, transposed, x, g)
        w = weight if dtype is None else sink.cast(weight, dtype)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = sink.products.linear(g, w) if transposed else sink.products.transposed(g, w)
        return gx, None


def _product(holder, x, weight, bias, transposed, dtype):
    sink = holder[0]
    if dtype is not None:
        weight = sink.cast(weight, dtype)
        bias = None if bias is None else sink.cast(bias, dtype)
    return sink.products.transposed(x, weight, bias) if transposed else sink.products.linear(x, weight, bias)


def sunk_linear(sink: Sink, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """A product with a parameter, its weight gradient sunk when there is one to compute.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, or ``[in, out]`` when ``transposed``.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if not torch.is_grad_enabled() and dtype is None:
        return _product((sink,), x, weight, bias, transposed, None)
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (trains or x.requires_grad):
        return torch.addmm(bias, x, weight) if transposed else F.linear(x, weight, bias)
    if dtype is not None and x.dtype != torch.float64:
        return _SunkLinear.apply(x.to(dtype), (sink, weight, bias, transposed, dtype))
    return _SunkLinear.apply(x, (sink, weight, bias, transposed, None))
