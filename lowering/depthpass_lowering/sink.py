"""Weight-gradient sinking: the token loop keeps activation gradients only, one product per weight runs after it.

By linearity ``sum_c X_c^T G_c = [X_1; ..; X_n]^T [G_1; ..; G_n]``: instead of one small product per chunk, which reads and
writes the whole accumulator each time, the operands of many chunks are kept and multiplied together (arXiv 1604.01946; the
B/W split of arXiv 2401.10241).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


FLUSH = 512
"""Rows gathered before they are multiplied: enough for a product at full rate, few enough to stay in the heap."""


class Sink:
    """Operands of the weight gradients of one backward pass, by weight, multiplied every ``FLUSH`` rows."""

    def __init__(self) -> None:
        self._waiting: dict[int, _Operands] = {}
        self._sums: dict[int, Tensor] = {}
        self._cast: dict[int, Tensor] = {}
        # What was joined last: q, k and v (gate and up) read the same activations.
        self._joined: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0))

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
        self.__init__()
        return found

    def _flush(self, held: _Operands) -> None:
        if not held.rows:
            return
        key = tuple(map(id, held.x))
        if self._joined[0] != key:
            self._joined = (key, _rows(held.x))
        x, g = self._joined[1], _rows(held.g)
        if held.weight.requires_grad:
            self._multiply(held.weight, *((x.t(), g) if held.transposed else (g.t(), x)))
        if held.bias is not None and held.bias.requires_grad:
            self._sums[id(held.bias)] = self._sums.get(id(held.bias), 0) + g.sum(0)
        held.x, held.g, held.rows = [], [], 0

    def _multiply(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        total = self._sums.get(id(weight))
        if total is None:
            self._sums[id(weight)] = a @ b
        elif total.dtype == a.dtype:
            total.addmm_(a, b)
        else:
            total += a @ b
        if weight.dtype != a.dtype:
            # Sums of low-precision products stay in the weight's own precision.
            self._sums[id(weight)] = self._sums[id(weight)].to(weight.dtype)


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
        ctx.save_for_backward(x)
        return _product(holder, x, weight, bias, transposed, dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        (x,) = ctx.saved_tensors
        sink, weight, bias, transposed, dtype = ctx.holder
        sink.add(weight, bias, transposed, x, g)
        w = weight if dtype is None else sink.cast(weight, dtype)
        gx = F.linear(g, w if transposed else w.t()) if ctx.needs_input_grad[0] else None
        return gx, None


def _product(holder, x, weight, bias, transposed, dtype):
    sink = holder[0]
    if dtype is not None:
        weight = sink.cast(weight, dtype)
        bias = None if bias is None else sink.cast(bias, dtype)
    if not transposed:
        return F.linear(x, weight, bias)
    return torch.addmm(bias, x, weight) if x.dim() == 2 else x @ weight + bias


def sunk_linear(sink: Sink, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """A product with a parameter, its weight gradient sunk when there is one to compute.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, or ``[in, out]`` when ``transposed``.
    """
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not trains or not torch.is_grad_enabled():
        if not transposed:
            return F.linear(x, weight, bias)
        return torch.addmm(bias, x, weight)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if dtype is not None and x.dtype != torch.float64:
        return _SunkLinear.apply(x.to(dtype), (sink, weight, bias, transposed, dtype))
    return _SunkLinear.apply(x, (sink, weight, bias, transposed, None))
