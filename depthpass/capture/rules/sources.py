"""Rules of tensors that an op makes, and of the markers of the capture."""

from __future__ import annotations

from depthpass.capture.axes import Axes, AxisError, dim_of, has_stream, show, single
from depthpass.capture.rules.call import BATCH, TOKENS, OpCall, constant_dim, refuse_stream


def create(call: OpCall) -> Axes:
    return single(tuple(constant_dim(s) for s in call.size))


def arange(call: OpCall) -> Axes:
    size = call.size[0]
    if not size.free_symbols:
        return (dim_of(size),)
    regular = call.args.get("start", 0) == 0 and call.args.get("step", 1) == 1
    if size != TOKENS or not regular or call.nested:
        raise AxisError("numbers the tokens of the call other than from 0 in steps of 1 at the top level of the model")
    return ((TOKENS,),)




def attend(call: OpCall) -> Axes:
    for name in ("q", "k", "v"):
        axes = call.axes(name)
        rows = len(axes) == 4 and (axes[0] == (BATCH,) or not has_stream(axes[0]))
        if not rows or axes[2] != (TOKENS,) or has_stream(axes[1] + axes[3]):
            raise AxisError(f"gets {name} as {show(axes)} instead of [batch, heads, tokens, dim]")
    for a in call.maybe("sinks") or ():
        refuse_stream(a, "gets sinks that depend on")
    q, v = call.axes("q"), call.axes("v")
    return (q[0], q[2], q[1], v[3])


def experts(call: OpCall) -> Axes:
    hidden = call.axes("hidden")
    for name in ("index", "weights"):
        axes = call.axes(name)
        if axes[: len(hidden) - 1] != hidden[:-1] or any(map(has_stream, axes[len(hidden) - 1 :])):
            raise AxisError(f"gets {name} {show(axes)} for tokens {show(hidden)}")
    refuse_stream(hidden[-1], "takes as channels")
    return hidden
