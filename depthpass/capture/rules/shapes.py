"""Rules of elementwise ops and views: the same entries, in another shape or several times."""

from __future__ import annotations

import sympy

from depthpass.capture.axes import Axes, AxisError, broadcast, dim_of, join, normal, regroup, single
from depthpass.capture.rules.call import OpCall, Result, constant_dim, dims_of, refuse_stream, with_dim


def elementwise(call: OpCall) -> Result:
    out = broadcast(*call.tensors())
    return out if len(call.sizes) == 1 else (out,) * len(call.sizes)


def keep(call: OpCall) -> Axes:
    return call.tensors()[0]


def reshape(call: OpCall) -> Axes:
    return regroup(call.tensors()[0], call.size)


def squeeze(call: OpCall) -> Axes:
    axes = call.axes("self")
    for d in dims_of(call, len(axes)):
        refuse_stream(axes[d], "would drop, when there is only one, the dimension of")
    return reshape(call)


def view(call: OpCall) -> Axes:
    """``view`` to a shape, or to a dtype of the same width."""
    if "dtype" in call.args and call.tensors()[0] and len(call.size) != len(call.tensors()[0]):
        raise AxisError("reinterprets memory as another number of dimensions")
    return call.tensors()[0] if "dtype" in call.args else reshape(call)


def transpose(call: OpCall) -> Axes:
    axes = list(call.axes("self"))
    names = [n for n in ("dim0", "dim1", "axis0", "axis1") if n in call.args]
    a, b = (normal(call.args[n], len(axes)) for n in names) if names else (len(axes) - 1, len(axes) - 2)
    if len(axes) > 1:
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def permute(call: OpCall) -> Axes:
    axes = call.axes("self")
    return tuple(axes[normal(d, len(axes))] for d in call.args["dims"])


def movedim(call: OpCall) -> Axes:
    axes = call.axes("self")
    listed = [v if isinstance(v, list | tuple) else [v] for v in (call.args["source"], call.args["destination"])]
    source, target = ([normal(d, len(axes)) for d in v] for v in listed)
    rest = iter([d for d in range(len(axes)) if d not in source])
    return tuple(axes[source[target.index(d)] if d in target else next(rest)] for d in range(len(axes)))


def reverse(call: OpCall) -> Axes:
    return tuple(reversed(call.axes("self")))


def as_complex(call: OpCall) -> Axes:
    return call.axes("self")[:-1]


def as_real(call: OpCall) -> Axes:
    return call.axes("self") + ((2,),)


def expand(call: OpCall) -> Axes:
    axes = call.tensors()[0]
    axes = ((),) * (len(call.size) - len(axes)) + axes
    return single(tuple(constant_dim(s) if a == () else a for a, s in zip(axes, call.size)))


def repeat(call: OpCall) -> Axes:
    axes = call.axes("self")
    axes = ((),) * (len(call.size) - len(axes)) + axes
    sizes = [sympy.Mul(*a) for a in axes]
    return single(tuple(join(constant_dim(sympy.cancel(s / n)), a) for a, s, n in zip(axes, call.size, sizes)))


def repeat_interleave(call: OpCall) -> Axes:
    axes = call.axes("self")
    if not isinstance(call.args.get("repeats"), int):
        raise AxisError("repeats by a number that depends on data or on the number of tokens")
    times = dim_of(sympy.Integer(call.args["repeats"]))
    if call.args.get("dim") is None:
        return (join(*axes, times),)
    dim = normal(call.args["dim"], len(axes))
    return with_dim(axes, dim, join(axes[dim], times))
