"""What a rule gets: an op call with the axes of its arguments, and what most rules ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from depthpass.capture.axes import Axes, AxisError, Dim, dim_of, has_stream, join, normal, single

BATCH = sympy.Symbol("batch", integer=True, positive=True)
TOKENS = sympy.Symbol("tokens", integer=True, positive=True)

Result = Axes | tuple[Axes, ...]


@dataclass(frozen=True)
class OpCall:
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


Rule = Callable[[OpCall], Result]


def flatten(values: Iterable[object]) -> Iterator[object]:
    """The leaves of nested lists of arguments."""
    for v in values:
        if isinstance(v, list | tuple):
            yield from flatten(v)
        else:
            yield v


def refuse_stream(dim: Dim, doing: str) -> None:
    """Raise AxisError when an op that is ``doing`` something to a dimension would do it to rows or tokens."""
    if has_stream(dim):
        over = "tokens" if TOKENS in dim else "rows of the batch"
        raise AxisError(f"{doing} the {over}")


def dims_of(call: OpCall, rank: int) -> list[int]:
    """The dimensions named by the argument ``dim`` (all of them when there is none)."""
    value = call.args.get("dim", call.args.get("dims"))
    if value is None or value == []:
        return list(range(rank))
    return [normal(d, rank) for d in (value if isinstance(value, list | tuple) else [value])]


def with_dim(axes: Axes, dim: int, new: Dim) -> Axes:
    return single(axes[:dim] + (new,) + axes[dim + 1 :])


def constant_dim(size: sympy.Expr) -> Dim:
    """A dimension of a constant: every order of rows and tokens is true of it, so take rows first."""
    out: list = []
    for symbol in (BATCH, TOKENS):
        if symbol in size.free_symbols:
            out.append(symbol)
            size = size / symbol
    return join(tuple(out), dim_of(size))
