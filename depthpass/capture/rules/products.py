"""Rules of products: what is summed over, and what meets what."""

from __future__ import annotations

from collections.abc import Sequence

from depthpass.capture.axes import Axes, AxisError, Dim, broadcast, dim_of, has_stream, show, single
from depthpass.capture.rules.call import OpCall, flatten, refuse_stream


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
        refuse_stream(dim, "sums over")


def matmul(a: Axes, b: Axes) -> Axes:
    if len(a) == 1 or len(b) == 1:
        left, right = a if len(a) > 1 else ((),) + a, b if len(b) > 1 else b + ((),)
        out = matmul(left, right)
        out = out if len(a) > 1 else out[:-2] + out[-1:]
        return out if len(b) > 1 else out[:-1]
    _contract(a[-1], b[-2])
    return _product(broadcast(a[:-2], b[:-2]) + (a[-2], b[-1]))


def product(call: OpCall) -> Axes:
    return matmul(*call.tensors()[:2])


def linear(call: OpCall) -> Axes:
    x, weight = call.axes("input"), call.axes("weight")
    _contract(x[-1], weight[-1])
    out = _product(x[:-1] + weight[:-1])
    bias = call.maybe("bias")
    return broadcast(out, bias) if bias else out


def add_product(call: OpCall) -> Axes:
    """``addmm``, ``baddbmm``, ``addmv``."""
    names = [n for n in ("mat1", "batch1", "mat") if n in call.args]
    other = [n for n in ("mat2", "batch2", "vec") if n in call.args]
    return broadcast(call.axes("self"), matmul(call.axes(names[0]), call.axes(other[0])))


def outer(call: OpCall) -> Axes:
    a, b = call.tensors()
    return _product(a + b)


def einsum(call: OpCall) -> Axes:
    operands = [call.known[n] for n in call.args["tensors"]]
    left, out = _spelled(call.args["equation"], [len(axes) for axes in operands])
    letters: dict[str, list[Axes]] = {}
    for names, axes in zip(left, operands, strict=True):
        if len(set(names)) != len(names):
            raise AxisError(f"takes a diagonal ({call.args['equation']!r})")
        for name, dim in zip(names, axes, strict=True):
            letters.setdefault(name, []).append((dim,))
    dims = {name: broadcast(*sizes)[0] for name, sizes in letters.items()}
    for name, dim in dims.items():
        if name not in out:
            refuse_stream(dim, "sums over")
    return _product(tuple(dims[name] for name in out))


def _spelled(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """A name for every dimension of every operand and of the result.

    Dimensions under an ellipsis are called ``...1``, ``...2`` and so on from the last to the first: they line up on the right.
    Without an arrow the result has them first, and then every letter that stands there once, in alphabetical order.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    texts = left.split(",")
    hidden = [rank - len(text.replace("...", "")) if "..." in text else 0 for text, rank in zip(texts, ranks, strict=True)]

    def names(text: str, count: int) -> list[str]:
        before, dots, after = text.partition("...")
        return [*before, *(f"...{i}" for i in range(count if dots else 0, 0, -1)), *after]

    operands = [names(text, count) for text, count in zip(texts, hidden, strict=True)]
    if not arrow:
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(left) - set(".,") if left.count(c) == 1))
    return operands, names(right, max(hidden))


def convolution(call: OpCall) -> Axes:
    axes, weight = call.axes("input"), call.axes("weight")
    spatial = len(weight) - 2
    for a in weight:
        refuse_stream(a, "convolves with weights over")
    begin = len(axes) - spatial
    refuse_stream(axes[begin - 1], "takes as channels")
    pointwise = all(w == () for w in weight[2:])
    steady = {*flatten([call.args.get("stride", 1)])} == {1} and {*flatten([call.args.get("padding", 0)])} <= {0, "valid"}
    for a in axes[begin:]:
        if not (pointwise and steady):
            refuse_stream(a, "convolves over")
    sizes = call.size[begin:]
    tail = tuple(a if has_stream(a) else dim_of(s) for a, s in zip(axes[begin:], sizes))
    return axes[: begin - 1] + (dim_of(call.size[begin - 1]),) + tail


def own_attention(call: OpCall) -> Axes:
    raise AxisError("attends over the tokens by itself instead of going through transformers' AttentionInterface")
