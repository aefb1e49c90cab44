"""One rule per op family: where the tokens of an op's result are, or why they cannot be followed.

A rule gets a :class:`Call` and returns the :data:`~depthpass.capture.axes.Axes` of the result (a tuple of them for
several results); it raises :class:`~depthpass.capture.axes.AxisError` with the rest of a sentence that starts with the
op's name. :data:`RULES` is the table; ops tagged ``pointwise`` by torch need no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from depthpass.capture.axes import (
    Axes,
    AxisError,
    Dim,
    broadcast,
    dim_of,
    has_stream,
    join,
    normal,
    regroup,
    show,
    show_dim,
    single,
)

BATCH = sympy.Symbol("batch", integer=True, positive=True)
TOKENS = sympy.Symbol("tokens", integer=True, positive=True)

Result = Axes | tuple[Axes, ...]


@dataclass(frozen=True)
class Call:
    """An op call as rules see it.

    Attributes:
        node: the call.
        args: arguments by the name the op's schema gives them, defaults filled in; tensors are still nodes.
        known: axes of each tensor argument.
        sizes: shape of each result over :data:`BATCH` and :data:`TOKENS`.
        nested: inside the graph of a higher-order op.
    """

    node: fx.Node
    args: dict[str, Any]
    known: dict[fx.Node, Any]
    sizes: tuple[tuple[sympy.Expr, ...], ...]
    nested: bool

    def axes(self, name: str) -> Axes:
        return self.known[self.args[name]]

    def maybe(self, name: str) -> Axes | None:
        value = self.args.get(name)
        return self.known[value] if isinstance(value, fx.Node) and value in self.known else None

    def tensors(self) -> list[Axes]:
        """Axes of all tensor arguments in the order of the schema."""
        return [self.known[a] for a in flatten(self.args.values()) if isinstance(a, fx.Node) and a in self.known]

    @property
    def size(self) -> tuple[sympy.Expr, ...]:
        """Shape of the (first) result."""
        return self.sizes[0]


Rule = Callable[[Call], Result]


def flatten(values: Iterable[object]) -> Iterator[object]:
    """The leaves of nested lists of arguments."""
    for v in values:
        if isinstance(v, list | tuple):
            yield from flatten(v)
        else:
            yield v


def _plain(dim: Dim, doing: str) -> None:
    if has_stream(dim):
        over = "tokens" if TOKENS in dim else "rows of the batch"
        raise AxisError(f"{doing} the {over}")


def _dims(call: Call, rank: int) -> list[int]:
    """The dimensions named by the argument ``dim`` (all of them when there is none)."""
    value = call.args.get("dim", call.args.get("dims"))
    if value is None or value == []:
        return list(range(rank))
    return [normal(d, rank) for d in (value if isinstance(value, list | tuple) else [value])]


def _set(axes: Axes, dim: int, new: Dim) -> Axes:
    return single(axes[:dim] + (new,) + axes[dim + 1 :])


def _fill(size: sympy.Expr) -> Dim:
    """A dimension of a constant: every order of rows and tokens is true of it, so take rows first."""
    out: list = []
    for symbol in (BATCH, TOKENS):
        if symbol in size.free_symbols:
            out.append(symbol)
            size = size / symbol
    return join(tuple(out), dim_of(size))


# Elementwise and views -------------------------------------------------------------------------------------------


def elementwise(call: Call) -> Result:
    out = broadcast(*call.tensors())
    return out if len(call.sizes) == 1 else (out,) * len(call.sizes)


def keep(call: Call) -> Axes:
    return call.tensors()[0]


def reshape(call: Call) -> Axes:
    return regroup(call.tensors()[0], call.size)


def squeeze(call: Call) -> Axes:
    axes = call.axes("self")
    for d in _dims(call, len(axes)):
        _plain(axes[d], "would drop, when there is only one, the dimension of")
    return reshape(call)


def view(call: Call) -> Axes:
    """``view`` to a shape, or to a dtype of the same width."""
    if "dtype" in call.args and call.tensors()[0] and len(call.size) != len(call.tensors()[0]):
        raise AxisError("reinterprets memory as another number of dimensions")
    return call.tensors()[0] if "dtype" in call.args else reshape(call)


def transpose(call: Call) -> Axes:
    axes = list(call.axes("self"))
    names = [n for n in ("dim0", "dim1", "axis0", "axis1") if n in call.args]
    a, b = (normal(call.args[n], len(axes)) for n in names) if names else (len(axes) - 1, len(axes) - 2)
    if len(axes) > 1:
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def permute(call: Call) -> Axes:
    axes = call.axes("self")
    return tuple(axes[normal(d, len(axes))] for d in call.args["dims"])


def movedim(call: Call) -> Axes:
    axes = call.axes("self")
    listed = [v if isinstance(v, list | tuple) else [v] for v in (call.args["source"], call.args["destination"])]
    source, target = ([normal(d, len(axes)) for d in v] for v in listed)
    rest = iter([d for d in range(len(axes)) if d not in source])
    return tuple(axes[source[target.index(d)] if d in target else next(rest)] for d in range(len(axes)))


def reverse(call: Call) -> Axes:
    return tuple(reversed(call.axes("self")))


def as_complex(call: Call) -> Axes:
    return call.axes("self")[:-1]


def as_real(call: Call) -> Axes:
    return call.axes("self") + ((2,),)


def expand(call: Call) -> Axes:
    axes = call.tensors()[0]
    axes = ((),) * (len(call.size) - len(axes)) + axes
    return single(tuple(_fill(s) if a == () else a for a, s in zip(axes, call.size)))


def repeat(call: Call) -> Axes:
    axes = call.axes("self")
    axes = ((),) * (len(call.size) - len(axes)) + axes
    sizes = [sympy.Mul(*a) for a in axes]
    return single(tuple(join(_fill(sympy.cancel(s / n)), a) for a, s, n in zip(axes, call.size, sizes)))


def repeat_interleave(call: Call) -> Axes:
    axes = call.axes("self")
    if not isinstance(call.args.get("repeats"), int):
        raise AxisError("repeats by a number that depends on data or on the number of tokens")
    times = dim_of(sympy.Integer(call.args["repeats"]))
    if call.args.get("dim") is None:
        return (join(*axes, times),)
    dim = normal(call.args["dim"], len(axes))
    return _set(axes, dim, join(axes[dim], times))


# One dimension at a time -----------------------------------------------------------------------------------------


def along(doing: str) -> Rule:
    """Ops that combine entries along a dimension and keep it (possibly with another length)."""

    def rule(call: Call) -> Result:
        axes = call.tensors()[0]
        for d in _dims(call, len(axes)):
            _plain(axes[d], doing)
        results = tuple(
            tuple(a if has_stream(a) else dim_of(s) for a, s in zip(axes, size)) for size in call.sizes
        )
        return results[0] if len(results) == 1 else results

    return rule


def last(doing: str, count: Callable[[Call], int]) -> Rule:
    """Ops over the last dimensions: norms, triangles, pooling."""

    def rule(call: Call) -> Result:
        axes = call.tensors()[0]
        n = count(call)
        for a in axes[len(axes) - n :]:
            _plain(a, doing)
        for name in ("weight", "bias"):
            for a in call.maybe(name) or ():
                _plain(a, "takes weights over")
        return axes[: len(axes) - n] + tuple(dim_of(s) for s in call.size[len(axes) - n :])

    return rule


def reduce(call: Call) -> Result:
    if "other" in call.args:
        return elementwise(call)
    axes = call.tensors()[0]
    dims = _dims(call, len(axes))
    for d in dims:
        _plain(axes[d], "reduces over")
    kept = call.args.get("keepdim", False)
    out = tuple(() if i in dims else a for i, a in enumerate(axes) if kept or i not in dims)
    return out if len(call.sizes) == 1 else (out,) * len(call.sizes)


def pieces(call: Call) -> tuple[Axes, ...]:
    """``split``, ``chunk``: several results."""
    axes = call.axes("self")
    dim = normal(call.args.get("dim", 0), len(axes))
    if len(call.sizes) > 1:
        _plain(axes[dim], "splits")
    return tuple(axes[:dim] + ((axes[dim] if has_stream(axes[dim]) else dim_of(s[dim])),) + axes[dim + 1 :]
                 for s in call.sizes)


def unbind(call: Call) -> tuple[Axes, ...]:
    axes = call.axes("self")
    dim = normal(call.args.get("dim", 0), len(axes))
    _plain(axes[dim], "takes apart")
    return (axes[:dim] + axes[dim + 1 :],) * len(call.sizes)


def select(call: Call) -> Axes:
    axes = call.axes("self")
    dim = normal(call.args["dim"], len(axes))
    _plain(axes[dim], "picks one of")
    return axes[:dim] + axes[dim + 1 :]


def slice_(call: Call) -> Axes:
    axes = call.axes("self")
    dim = normal(call.args.get("dim", 0), len(axes))
    whole = call.args.get("start") in (None, 0) and call.args.get("step", 1) == 1
    if has_stream(axes[dim]):
        if not whole or sympy.Mul(*axes[dim]) != call.size[dim]:
            _plain(axes[dim], "shifts or picks")
        return axes
    if call.size[dim].free_symbols:
        raise AxisError("takes the first entries of a table, one per token of the call, instead of looking positions up")
    return axes[:dim] + (dim_of(call.size[dim]),) + axes[dim + 1 :]


def pad(call: Call) -> Axes:
    axes, amounts = call.axes("self"), call.args["pad"]
    out = list(axes)
    for i in range(len(amounts) // 2):
        dim = len(axes) - 1 - i
        if any(not isinstance(a, int) or a != 0 for a in amounts[2 * i : 2 * i + 2]):
            _plain(axes[dim], "pads")
            out[dim] = dim_of(call.size[dim])
    return tuple(out)


def unfold(call: Call) -> Axes:
    axes = call.axes("self")
    dim = normal(call.args["dimension"], len(axes))
    _plain(axes[dim], "slides a window over")
    return axes[:dim] + (dim_of(call.size[dim]),) + axes[dim + 1 :] + (dim_of(call.size[-1]),)


def cat(call: Call) -> Axes:
    parts = [a for a in call.tensors() if a != ((0,),)]
    rank = len(parts[0])
    dim = normal(call.args.get("dim", 0), rank)
    for a in parts:
        _plain(a[dim], "joins along")
    rest = broadcast(*(a[:dim] + ((),) + a[dim + 1 :] for a in parts))
    return rest[:dim] + (dim_of(call.size[dim]),) + rest[dim + 1 :]


def stack(call: Call) -> Axes:
    parts = call.tensors()
    dim = normal(call.args.get("dim", 0), len(parts[0]) + 1)
    out = broadcast(*parts)
    return out[:dim] + (dim_of(call.size[dim]),) + out[dim:]


# Look-ups --------------------------------------------------------------------------------------------------------


def embedding(call: Call) -> Axes:
    weight = call.axes("weight")
    for a in weight:
        _plain(a, "looks up a table made of")
    return call.axes("indices") + weight[1:]


def index_select(call: Call) -> Axes:
    axes, index = call.axes("self"), call.axes("index")
    dim = normal(call.args["dim"], len(axes))
    _plain(axes[dim], "picks by index among")
    return _set(axes, dim, index[0] if index else ())


def index(call: Call) -> Axes:
    axes = call.axes("self")
    given = list(call.args["indices"])
    dims = [d for d, i in enumerate(given) if i is not None]
    for d in dims:
        if given[d].meta["val"].dtype in (torch.bool, torch.uint8):
            raise AxisError("keeps the entries where a mask is true, a number that depends on data")
        _plain(axes[d], "picks by index among")
    looked_up = broadcast(*(call.known[given[d]] for d in dims))
    rest = tuple(a for d, a in enumerate(axes) if d not in dims)
    at = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return single(rest[:at] + looked_up + rest[at:])


def _same_places(axes: Axes, index: Axes, dim: int) -> None:
    for d, (a, i) in enumerate(zip(axes, index)):
        if d != dim and a != i and (has_stream(a) or has_stream(i)):
            raise AxisError(f"lines up {show_dim(a)} with {show_dim(i)}, so that tokens meet other tokens")


def gather(call: Call) -> Axes:
    axes, at = call.axes("self"), call.axes("index")
    if not axes:
        return at
    dim = normal(call.args["dim"], len(axes))
    _plain(axes[dim], "gathers from")
    _same_places(axes, at, dim)
    return single(at)


def scatter(call: Call) -> Axes:
    axes, at, source = call.axes("self"), call.axes("index"), call.maybe("src")
    dim = normal(call.args["dim"], len(axes))
    for a in (axes, at, *([source] if source else [])):
        _plain(a[dim], "scatters among")
    _same_places(axes, at, dim)
    if source:
        _same_places(at, source, dim)
    return axes


def put_back(call: Call) -> Axes:
    """``slice_scatter``, ``select_scatter``: a tensor with part of it replaced."""
    axes, source = call.axes("self"), call.axes("src")
    dim = normal(call.args["dim"], len(axes))
    _plain(axes[dim], "writes some of")
    if len(source) < len(axes):
        source = source[:dim] + ((),) + source[dim:]
    _same_places(axes, source, dim)
    return axes


def one_hot(call: Call) -> Axes:
    return call.axes("self") + (dim_of(call.size[-1]),)


def bucketize(call: Call) -> Axes:
    table = call.maybe("boundaries") or call.maybe("sorted_sequence") or ()
    for a in table:
        _plain(a, "compares with a table made of")
    return call.maybe("input") or call.axes("self")


# Products --------------------------------------------------------------------------------------------------------


def _product(out: Axes) -> Axes:
    try:
        return single(out)
    except AxisError:
        raise AxisError(
            f"multiplies tokens with tokens, giving {show(out)}: attention that does not go through transformers' "
            "AttentionInterface"
        ) from None


def _contract(a: Dim, b: Dim) -> None:
    for dim in (a, b):
        _plain(dim, "sums over")


def matmul(a: Axes, b: Axes) -> Axes:
    if len(a) == 1 or len(b) == 1:
        left, right = a if len(a) > 1 else ((),) + a, b if len(b) > 1 else b + ((),)
        out = matmul(left, right)
        out = out if len(a) > 1 else out[:-2] + out[-1:]
        return out if len(b) > 1 else out[:-1]
    _contract(a[-1], b[-2])
    return _product(broadcast(a[:-2], b[:-2]) + (a[-2], b[-1]))


def product(call: Call) -> Axes:
    return matmul(*call.tensors()[:2])


def linear(call: Call) -> Axes:
    x, weight = call.axes("input"), call.axes("weight")
    _contract(x[-1], weight[-1])
    out = _product(x[:-1] + weight[:-1])
    bias = call.maybe("bias")
    return broadcast(out, bias) if bias else out


def add_product(call: Call) -> Axes:
    """``addmm``, ``baddbmm``, ``addmv``."""
    names = [n for n in ("mat1", "batch1", "mat") if n in call.args]
    other = [n for n in ("mat2", "batch2", "vec") if n in call.args]
    return broadcast(call.axes("self"), matmul(call.axes(names[0]), call.axes(other[0])))


def outer(call: Call) -> Axes:
    a, b = call.tensors()
    return _product(a + b)


def einsum(call: Call) -> Axes:
    equation = call.args["equation"].replace(" ", "")
    operands = [call.known[n] for n in call.args["tensors"]]
    if "." in equation or "->" not in equation:
        raise AxisError(f"has an equation {equation!r} with an ellipsis or an implied result, which is not followed")
    left, out = equation.split("->")
    letters: dict[str, list[Axes]] = {}
    for names, axes in zip(left.split(","), operands):
        if len(set(names)) != len(names):
            raise AxisError(f"takes a diagonal ({equation!r})")
        for name, dim in zip(names, axes):
            letters.setdefault(name, []).append((dim,))
    dims = {name: broadcast(*found)[0] for name, found in letters.items()}
    for name, dim in dims.items():
        if name not in out:
            _plain(dim, "sums over")
    return _product(tuple(dims[name] for name in out))


def convolution(call: Call) -> Axes:
    axes, weight = call.axes("input"), call.axes("weight")
    spatial = len(weight) - 2
    for a in weight:
        _plain(a, "convolves with weights over")
    begin = len(axes) - spatial
    _plain(axes[begin - 1], "takes as channels")
    pointwise = all(w == () for w in weight[2:])
    steady = {*flatten([call.args.get("stride", 1)])} == {1} and {*flatten([call.args.get("padding", 0)])} <= {0, "valid"}
    for a in axes[begin:]:
        if not (pointwise and steady):
            _plain(a, "convolves over")
    sizes = call.size[begin:]
    tail = tuple(a if has_stream(a) else dim_of(s) for a, s in zip(axes[begin:], sizes))
    return axes[: begin - 1] + (dim_of(call.size[begin - 1]),) + tail


def batch_norm(call: Call) -> Axes:
    axes = call.axes("input")
    if call.args.get("training"):
        raise AxisError("takes statistics over rows and tokens (training mode)")
    _plain(axes[1], "normalises as channels")
    return axes


def group_norm(call: Call) -> Axes:
    axes = call.axes("input")
    for a in axes[1:]:
        _plain(a, "normalises over")
    return axes


def own_attention(call: Call) -> Axes:
    raise AxisError("attends over the tokens by itself instead of going through transformers' AttentionInterface")


# New tensors -----------------------------------------------------------------------------------------------------


def create(call: Call) -> Axes:
    return single(tuple(_fill(s) for s in call.size))


def arange(call: Call) -> Axes:
    size = call.size[0]
    if not size.free_symbols:
        return (dim_of(size),)
    regular = call.args.get("start", 0) == 0 and call.args.get("step", 1) == 1
    if size != TOKENS or not regular or call.nested:
        raise AxisError("numbers the tokens of the call other than from 0 in steps of 1 at the top level of the model")
    return ((TOKENS,),)


# depthpass' own markers ------------------------------------------------------------------------------------------


def attend(call: Call) -> Axes:
    for name in ("q", "k", "v"):
        axes = call.axes(name)
        rows = len(axes) == 4 and (axes[0] == (BATCH,) or not has_stream(axes[0]))
        if not rows or axes[2] != (TOKENS,) or has_stream(axes[1] + axes[3]):
            raise AxisError(f"gets {name} as {show(axes)} instead of [batch, heads, tokens, dim]")
    for a in call.maybe("sinks") or ():
        _plain(a, "gets sinks that depend on")
    q, v = call.axes("q"), call.axes("v")
    return (q[0], q[2], q[1], v[3])


def experts(call: Call) -> Axes:
    hidden = call.axes("hidden")
    for name in ("index", "weights"):
        axes = call.axes(name)
        if axes[: len(hidden) - 1] != hidden[:-1] or any(map(has_stream, axes[len(hidden) - 1 :])):
            raise AxisError(f"gets {name} {show(axes)} for tokens {show(hidden)}")
    _plain(hidden[-1], "takes as channels")
    return hidden


_pool = {n: last("pools over", lambda _, k=n: k) for n in (1, 2)}

_TABLE: dict[str, Rule] = {
    # Casts, copies and tensors shaped like another.
    "to type_as _to_copy contiguous alias detach clone lift_fresh lift_fresh_copy dropout alpha_dropout bernoulli real "
    "imag conj resolve_conj resolve_neg zero zeros_like ones_like full_like empty_like rand_like randn_like": keep,
    # Elementwise ops that torch does not tag, or did not in 2.11.
    "where masked_fill multiply subtract divide true_divide floor_divide rsub complex polar fill copy log_sigmoid "
    "special_expit ldexp native_dropout leaky_relu": elementwise,
    # Same entries in the same order.
    "reshape _unsafe_view view_as reshape_as flatten unflatten unsqueeze ravel": reshape,
    "squeeze": squeeze,
    "view": view,
    "transpose swapaxes swapdims t mT matrix_H adjoint": transpose,
    "permute": permute,
    "movedim moveaxis": movedim,
    "numpy_T": reverse,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    # Copies along an axis.
    "expand expand_as broadcast_to": expand,
    "repeat tile": repeat,
    "repeat_interleave": repeat_interleave,
    # One dimension that must not run over tokens.
    "sum mean prod amax amin max min any all std var std_mean var_mean logsumexp norm linalg_vector_norm argmax argmin "
    "nansum nanmean count_nonzero median aminmax": reduce,
    "softmax _softmax log_softmax _log_softmax _safe_softmax": along("takes a softmax over"),
    "cumsum cumprod cummax cummin logcumsumexp": along("accumulates along"),
    "sort argsort topk kthvalue msort": along("ranks"),
    "flip fliplr flipud": along("reverses"),
    "roll": along("rotates"),
    "diff": along("takes differences along"),
    "glu": along("splits"),
    "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes": pieces,
    "unbind": unbind,
    "select": select,
    "slice narrow": slice_,
    "pad constant_pad_nd": pad,
    "unfold": unfold,
    "cat concat concatenate": cat,
    "stack": stack,
    "tril triu": last("takes a triangle of", lambda _: 2),
    "layer_norm rms_norm": last("normalises over", lambda call: len(call.args["normalized_shape"])),
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d": _pool[1],
    "avg_pool2d max_pool2d adaptive_avg_pool2d": _pool[2],
    # Look-ups.
    "embedding": embedding,
    "index_select": index_select,
    "index": index,
    "gather": gather,
    "scatter scatter_add scatter_reduce": scatter,
    "slice_scatter select_scatter": put_back,
    "one_hot": one_hot,
    "bucketize searchsorted": bucketize,
    # Products.
    "linear": linear,
    "matmul mm bmm mv dot vdot": product,
    "addmm baddbmm addmv": add_product,
    "outer ger": outer,
    "einsum": einsum,
    "conv1d conv2d conv3d convolution": convolution,
    "scaled_dot_product_attention": own_attention,
    # New tensors.
    "zeros ones full empty rand randn randint new_zeros new_ones new_full new_empty scalar_tensor": create,
    "arange": arange,
}

RULES: dict[str, Rule] = {f"aten::{name}": rule for names, rule in _TABLE.items() for name in names.split()} | {
    "depthpass::attend": attend, "depthpass::experts": experts, "depthpass::mask": keep,
    "depthpass::enter": keep, "depthpass::leave": keep, "depthpass::final": keep,
}

SIZE_ARGUMENTS = frozenset({"size", "shape", "sizes", "end", "length", "repeats", "split_size", "split_sizes"})
"""Arguments through which an op may be told the number of tokens; as any other argument it would be used as a value."""
