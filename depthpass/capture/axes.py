"""Where the tokens are in a tensor: each dimension as a row-major product of factors.

A *factor* is the batch symbol, the token symbol, or a whole number. ``[B*S, 4, 8]`` made by flattening ``[B, S, 32]``
is ``((B, S), (4,), (8,))``: entry ``(b, s)`` of dimension 0 still belongs to token s of row b, which the plain sizes do
not say. Reshapes that would mix a token with a channel have no such form, which is how they are found.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

Factor = sympy.Symbol | int
Dim = tuple[Factor, ...]
"""Factors of one dimension, slowest first; neighbouring numbers are multiplied, size 1 is the empty tuple."""
Axes = tuple[Dim, ...]


class AxisError(Exception):
    """A rule cannot follow the tokens through an op; the text completes the sentence "<op> ..."."""


def dim_of(size: sympy.Expr) -> Dim:
    """The dimension of a size whose factors have an order that does not matter: one symbol times one number.

    Raises:
        AxisError: the size has several symbols or is no product.
    """
    number, rest = size.as_coeff_Mul()
    if rest == 1:
        return () if number == 1 else (int(number),)
    if not isinstance(rest, sympy.Symbol) or not number.is_Integer or number < 1:
        raise AxisError(f"has a dimension of size {size}, whose order of rows and tokens is not known")
    return (rest,) if number == 1 else (rest, int(number))


def has_stream(dim: Dim) -> bool:
    """Whether a dimension runs over rows or tokens."""
    return any(not isinstance(f, int) for f in dim)


def join(*dims: Dim) -> Dim:
    """One dimension that runs over several, the first slowest."""
    out: list[Factor] = []
    for factor in (f for d in dims for f in d):
        if isinstance(factor, int) and out and isinstance(out[-1], int):
            out[-1] *= factor
        else:
            out.append(factor)
    return tuple(f for f in out if f != 1)


def regroup(axes: Axes, sizes: Sequence[sympy.Expr]) -> Axes:
    """The dimensions of a row-major reshape to ``sizes``.

    Raises:
        AxisError: a new dimension would hold part of a token axis, or mix it with another.
    """
    left = list(join(*axes))
    if any(s == 0 for s in sizes) or 0 in left:
        return tuple(dim_of(s) for s in sizes)
    return tuple(_take(left, size, axes, sizes) for size in sizes)


def _take(left: list[Factor], size: sympy.Expr, axes: Axes, sizes: Sequence[sympy.Expr]) -> Dim:
    """Remove factors of one dimension of a given size from the front of ``left``."""
    taken: list[Factor] = []
    rest = size
    while rest != 1:
        count, symbols = rest.as_coeff_Mul()
        head = left.pop(0) if left else 1
        if isinstance(head, int) and head > 1 and count.is_Integer and count > 1:
            count = int(count)
            if count % head == 0:
                taken.append(head)
                rest = rest / head
                continue
            if head % count == 0 and symbols == 1:
                taken.append(count)
                left.insert(0, head // count)
                break
        elif not isinstance(head, int) and head in sympy.Mul.make_args(symbols):
            taken.append(head)
            rest = rest / head
            continue
        raise AxisError(
            f"reshapes {show(axes)} to {show_sizes(sizes)}, which tears tokens apart or mixes them with channels"
        )
    return join(tuple(taken))


def broadcast(*operands: Axes) -> Axes:
    """The dimensions of an elementwise result.

    Raises:
        AxisError: a token axis would meet another axis, or the result would run over pairs of tokens.
    """
    rank = max((len(a) for a in operands), default=0)
    padded = [((),) * (rank - len(a)) + a for a in operands]
    out = []
    for dims in zip(*padded):
        present = list(dict.fromkeys(d for d in dims if d != ()))
        if len(present) > 1:
            raise AxisError(f"pairs {' with '.join(map(show_dim, present))}, so that tokens meet other tokens or channels")
        out.append(present[0] if present else ())
    return single(tuple(out))


def single(axes: Axes) -> Axes:
    """The same axes, after a check that each token and row is named at most once.

    Raises:
        AxisError: the tensor would run over pairs of tokens or pairs of rows.
    """
    symbols = [f for d in axes for f in d if not isinstance(f, int)]
    twice = next((s for s in symbols if symbols.count(s) > 1), None)
    if twice is not None:
        raise AxisError(f"gives {show(axes)}, which runs over pairs of {show_dim((twice,))}")
    return axes


def normal(dim: int, rank: int) -> int:
    """A dimension index counted from the front."""
    return dim + rank if dim < 0 else dim


def show_dim(dim: Dim) -> str:
    return "*".join(str(f) for f in dim) or "1"


def show(axes: Axes) -> str:
    return f"[{', '.join(map(show_dim, axes))}]"


def show_sizes(sizes: Sequence[sympy.Expr]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
