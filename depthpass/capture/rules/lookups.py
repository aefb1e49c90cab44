"""Rules of look-ups: what is picked by index, and from what."""

from __future__ import annotations

import torch

from depthpass.capture.axes import Axes, AxisError, broadcast, dim_of, has_stream, normal, show_dim, single
from depthpass.capture.rules.call import OpCall, refuse_stream, with_dim


def embedding(call: OpCall) -> Axes:
    weight = call.axes("weight")
    for a in weight:
        refuse_stream(a, "looks up a table made of")
    return call.axes("indices") + weight[1:]


def index_select(call: OpCall) -> Axes:
    axes, index = call.axes("self"), call.axes("index")
    dim = normal(call.args["dim"], len(axes))
    refuse_stream(axes[dim], "picks by index among")
    return with_dim(axes, dim, index[0] if index else ())


def index(call: OpCall) -> Axes:
    axes = call.axes("self")
    given = list(call.args["indices"])
    dims = [d for d, i in enumerate(given) if i is not None]
    for d in dims:
        if given[d].meta["val"].dtype in (torch.bool, torch.uint8):
            raise AxisError("keeps the entries where a mask is true, a number that depends on data")
        refuse_stream(axes[d], "picks by index among")
    looked_up = broadcast(*(call.known[given[d]] for d in dims))
    rest = tuple(a for d, a in enumerate(axes) if d not in dims)
    at = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return single(rest[:at] + looked_up + rest[at:])


def _same_places(axes: Axes, index: Axes, dim: int) -> None:
    for d, (a, i) in enumerate(zip(axes, index)):
        if d != dim and a != i and (has_stream(a) or has_stream(i)):
            raise AxisError(f"lines up {show_dim(a)} with {show_dim(i)}, so that tokens meet other tokens")


def gather(call: OpCall) -> Axes:
    axes, at = call.axes("self"), call.axes("index")
    if not axes:
        return at
    dim = normal(call.args["dim"], len(axes))
    refuse_stream(axes[dim], "gathers from")
    _same_places(axes, at, dim)
    return single(at)


def scatter(call: OpCall) -> Axes:
    axes, at, source = call.axes("self"), call.axes("index"), call.maybe("src")
    dim = normal(call.args["dim"], len(axes))
    for a in (axes, at, *([source] if source else [])):
        refuse_stream(a[dim], "scatters among")
    _same_places(axes, at, dim)
    if source:
        _same_places(at, source, dim)
    return axes


def put_back(call: OpCall) -> Axes:
    """``slice_scatter``, ``select_scatter``: a tensor with part of it replaced."""
    axes, source = call.axes("self"), call.axes("src")
    dim = normal(call.args["dim"], len(axes))
    refuse_stream(axes[dim], "writes some of")
    if len(source) < len(axes):
        source = source[:dim] + ((),) + source[dim:]
    _same_places(axes, source, dim)
    return axes


def one_hot(call: OpCall) -> Axes:
    return call.axes("self") + (dim_of(call.size[-1]),)


def bucketize(call: OpCall) -> Axes:
    table = call.maybe("boundaries") or call.maybe("sorted_sequence") or ()
    for a in table:
        refuse_stream(a, "compares with a table made of")
    return call.maybe("input") or call.axes("self")
