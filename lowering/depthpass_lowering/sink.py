"""Weight-gradient sinking: the token loop keeps activation gradients only, one product per weight runs after it.

By linearity ``sum_c X_c^T G_c = [X_1; ..; X_n]^T [G_1; ..; G_n]``: instead of one small product per chunk, which reads and
writes the whole accumulator each time, the operands are kept and multiplied once (arXiv 1604.01946; the B/W split of
arXiv 2401.10241).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Sink:
    """Operands of the weight gradients of one backward pass, by weight."""

    def __init__(self) -> None:
        self._x: dict[int, list[Tensor]] = {}
        self._g: dict[int, list[Tensor]] = {}
        self._weight: dict[int, tuple[Tensor, Tensor | None, bool]] = {}
        self._cast: dict[int, Tensor] = {}

    def add(self, weight: Tensor, bias: Tensor | None, transposed: bool, x: Tensor, g: Tensor) -> None:
        key = id(weight)
        self._weight[key] = (weight, bias, transposed)
        self._x.setdefault(key, []).append(x)
        self._g.setdefault(key, []).append(g)

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter in autocast's dtype, cast once per loop."""
        if parameter.dtype == dtype:
            return parameter
        if id(parameter) not in self._cast:
            self._cast[id(parameter)] = parameter.to(dtype)
        return self._cast[id(parameter)]

    def finish(self) -> dict[int, Tensor]:
        """Gradients by id of the weight or bias; empties the sink."""
        joined: dict[tuple[int, ...], Tensor] = {}
        found: dict[int, Tensor] = {}
        for key, (weight, bias, transposed) in self._weight.items():
            xs, gs = self._x[key], self._g[key]
            # q, k and v (gate and up) read the same activations: they are joined once.
            shared = tuple(map(id, xs))
            if shared not in joined:
                joined[shared] = _rows(xs)
            x, g = joined[shared], _rows(gs)
            if weight.requires_grad:
                product = x.t() @ g if transposed else g.t() @ x
                found[key] = product.to(weight.dtype)
            if bias is not None and bias.requires_grad:
                found[id(bias)] = found.get(id(bias), 0) + g.sum(0).to(bias.dtype)
        self._x.clear(), self._g.clear(), self._weight.clear(), self._cast.clear()
        return found


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
