"""Rules of views and copies."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depthpass_lowering.adjoint.registry import direct, rule
from depthpass_lowering.adjoint.reverse import Tape

aten = torch.ops.aten


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(t: Tape, n: Any) -> None:
    x = n.args[0]
    t.env[n] = t.method("view" if n.target is aten.view.default else "reshape", *n.args)
    if t.differentiates(n):
        shape = t.emit(getattr, x, "shape")
        t.on_back(n, lambda g: t.add(x, t.back_method("reshape", g, shape), False))


@rule(aten.transpose.int)
def _transpose(t: Tape, n: Any) -> None:
    x, a, b = n.args
    t.env[n] = t.method("transpose", x, a, b)
    if t.differentiates(n):
        t.on_back(n, lambda g: t.add(x, t.back_method("transpose", g, a, b), False))


@rule(aten.unsqueeze.default)
def _unsqueeze(t: Tape, n: Any) -> None:
    x, axis = n.args
    t.env[n] = t.method("unsqueeze", x, axis)
    if t.differentiates(n):
        t.on_back(n, lambda g: t.add(x, t.back_method("squeeze", g, axis), False))


@rule(aten.slice.Tensor)
def _slice(t: Tape, n: Any) -> None:
    given = dict(zip(("x", "dim", "start", "end", "step"), n.args), **n.kwargs)
    x, dim, start, end, step = given["x"], given.get("dim", 0), given.get("start"), given.get("end"), given.get("step", 1)
    t.env[n] = t.emit(n.target, x, dim, start, end, step)
    if t.differentiates(n):
        shape = t.emit(getattr, x, "shape")
        last = torch.iinfo(torch.int64).max
        where = dim, 0 if start is None else start, last if end is None else end, step
        t.on_back(n, lambda g: t.add(x, t.back(aten.slice_backward.default, g, shape, *where), True))


@rule(aten.cat.default)
def _cat(t: Tape, n: Any) -> None:
    parts, axis = n.args[0], n.args[1] if len(n.args) > 1 else 0
    t.env[n] = t.emit(torch.cat, parts, axis)
    if t.differentiates(n):
        sizes = [t.emit(_size, p, axis) for p in parts]

        def back(g: fx.Node) -> None:
            pieces = t.back(torch.split, g, sizes, axis)
            for i, p in enumerate(parts):
                if p in t.active:
                    t.add(p, _as(t, p, n, t.behind.call_function(operator.getitem, (pieces, i))), False)

        t.on_back(n, back)


def _as(t: Tape, p: fx.Node, n: fx.Node, g: fx.Node) -> fx.Node:
    """The gradient of a part in the part's own dtype."""
    x, y = p.meta.get("val"), n.meta.get("val")
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype:
        return g
    return t.back_method("to", g, t.emit(getattr, p, "dtype"))


def _size(x: Tensor, axis: int) -> int:
    return x.shape[axis]


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(t: Tape, n: Any) -> None:
    x = n.args[0]
    axis = n.args[2] if len(n.args) > 2 else n.kwargs.get("dim", 0)
    pieces = t.emit(n.target, *n.args, **n.kwargs)
    parts = {u.args[1]: u for u in n.users if u.target is operator.getitem}
    for i, u in parts.items():
        t.env[u] = t.emit(operator.getitem, pieces, i)
    t.env[n] = pieces
    if x not in t.active:
        return
    t.active.update(parts.values())

    def step() -> None:
        grads = {i: t.gradients[u].node for i, u in parts.items() if u in t.gradients}
        if grads:
            t.add(x, t.back(_side_by_side, pieces, grads, axis), True)

    t.steps.append(step)


def _side_by_side(parts: Sequence[Tensor], grads: dict[int, Tensor], axis: int) -> Tensor:
    return torch.cat([grads[i] if i in grads else torch.zeros_like(p) for i, p in enumerate(parts)], axis)


@rule(aten.clone.default, aten.contiguous.default, aten.alias.default)
def _same(t: Tape, n: Any) -> None:
    x = n.args[0]
    t.env[n] = t.method("contiguous", x)
    if t.differentiates(n):
        t.on_back(n, lambda g: t.add(x, g, False))


@rule(aten.to.dtype, aten._to_copy.default)
def _cast(t: Tape, n: Any) -> None:
    x = n.args[0]
    t.env[n] = t.emit(direct(n), *n.args, **n.kwargs)
    if t.differentiates(n):
        dtype = t.emit(getattr, x, "dtype")
        t.on_back(n, lambda g: t.add(x, t.back_method("to", g, dtype), False))


@rule(torch.detach, aten.detach.default)
def _detach(t: Tape, n: Any) -> None:
    t.env[n] = t.value(n.args[0])
