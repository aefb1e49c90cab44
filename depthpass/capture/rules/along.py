"""Rules of ops that work along one dimension, which must not run over tokens."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from depthpass.capture.axes import Axes, AxisError, broadcast, dim_of, has_stream, normal
from depthpass.capture.rules.call import OpCall, Result, Rule, dims_of, refuse_stream
from depthpass.capture.rules.shapes import elementwise


def along(doing: str) -> Rule:
    """Ops that combine entries along a dimension and keep it (possibly with another length)."""

    def rule(call: OpCall) -> Result:
        axes = call.tensors()[0]
        for d in dims_of(call, len(axes)):
            refuse_stream(axes[d], doing)
        results = tuple(
            tuple(a if has_stream(a) else dim_of(s) for a, s in zip(axes, size)) for size in call.sizes
        )
        return results[0] if len(results) == 1 else results

    return rule


def last(doing: str, count: Callable[[OpCall], int]) -> Rule:
    """Ops over the last dimensions: norms, triangles, pooling."""

    def rule(call: OpCall) -> Result:
        axes = call.tensors()[0]
        n = count(call)
        for a in axes[len(axes) - n :]:
            refuse_stream(a, doing)
        for name in ("weight", "bias"):
            for a in call.maybe(name) or ():
                refuse_stream(a, "takes weights over")
        return axes[: len(axes) - n] + tuple(dim_of(s) for s in call.size[len(axes) - n :])

    return rule


def reduce(call: OpCall) -> Result:
    if "other" in call.args:
        return elementwise(call)
    axes = call.tensors()[0]
    dims = dims_of(call, len(axes))
    for d in dims:
        refuse_stream(axes[d], "reduces over")
    kept = call.args.get("keepdim", False)
    out = tuple(() if i in dims else a for i, a in enumerate(axes) if kept or i not in dims)
    return out if len(call.sizes) == 1 else (out,) * len(call.sizes)


def pieces(call: OpCall) -> tuple[Axes, ...]:
    """``split``, ``chunk``: several results."""
    axes = call.axes("self")
    dim = normal(call.args.get("dim", 0), len(axes))
    if len(call.sizes) > 1:
        refuse_stream(axes[dim], "splits")
    return tuple(axes[:dim] + ((axes[dim] if has_stream(axes[dim]) else dim_of(s[dim])),) + axes[dim + 1 :]
                 for s in call.sizes)


def unbind(call: OpCall) -> tuple[Axes, ...]:
    axes = call.axes("self")
    dim = normal(call.args.get("dim", 0), len(axes))
    refuse_stream(axes[dim], "takes apart")
    return (axes[:dim] + axes[dim + 1 :],) * len(call.sizes)


def select(call: OpCall) -> Axes:
    axes = call.axes("self")
    dim = normal(call.args["dim"], len(axes))
    refuse_stream(axes[dim], "picks one of")
    return axes[:dim] + axes[dim + 1 :]


def slice_(call: OpCall) -> Axes:
    axes = call.axes("self")
    dim = normal(call.args.get("dim", 0), len(axes))
    whole = call.args.get("start") in (None, 0) and call.args.get("step", 1) == 1
    if has_stream(axes[dim]):
        if not whole or sympy.Mul(*axes[dim]) != call.size[dim]:
            refuse_stream(axes[dim], "shifts or picks")
        return axes
    if call.size[dim].free_symbols:
        raise AxisError("takes the first entries of a table, one per token of the call, instead of looking positions up")
    return axes[:dim] + (dim_of(call.size[dim]),) + axes[dim + 1 :]


def pad(call: OpCall) -> Axes:
    axes, amounts = call.axes("self"), call.args["pad"]
    out = list(axes)
    for i in range(len(amounts) // 2):
        dim = len(axes) - 1 - i
        if any(not isinstance(a, int) or a != 0 for a in amounts[2 * i : 2 * i + 2]):
            refuse_stream(axes[dim], "pads")
            out[dim] = dim_of(call.size[dim])
    return tuple(out)


def unfold(call: OpCall) -> Axes:
    axes = call.axes("self")
    dim = normal(call.args["dimension"], len(axes))
    refuse_stream(axes[dim], "slides a window over")
    return axes[:dim] + (dim_of(call.size[dim]),) + axes[dim + 1 :] + (dim_of(call.size[-1]),)


def cat(call: OpCall) -> Axes:
    parts = [a for a in call.tensors() if a != ((0,),)]
    rank = len(parts[0])
    dim = normal(call.args.get("dim", 0), rank)
    for a in parts:
        refuse_stream(a[dim], "joins along")
    rest = broadcast(*(a[:dim] + ((),) + a[dim + 1 :] for a in parts))
    return rest[:dim] + (dim_of(call.size[dim]),) + rest[dim + 1 :]


def stack(call: OpCall) -> Axes:
    parts = call.tensors()
    dim = normal(call.args.get("dim", 0), len(parts[0]) + 1)
    out = broadcast(*parts)
    return out[:dim] + (dim_of(call.size[dim]),) + out[dim:]


def batch_norm(call: OpCall) -> Axes:
    axes = call.axes("input")
    if call.args.get("training"):
        raise AxisError("takes statistics over rows and tokens (training mode)")
    refuse_stream(axes[1], "normalises as channels")
    return axes


def group_norm(call: OpCall) -> Axes:
    axes = call.axes("input")
    for a in axes[1:]:
        refuse_stream(a, "normalises over")
    return axes
