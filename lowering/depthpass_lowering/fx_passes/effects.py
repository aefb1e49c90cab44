"""What passes ask of nodes: what an op does besides returning values, and what values are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from depthpass.capture import calls


def writes(node: fx.Node) -> bool:
    """Whether an op writes into an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def keeps(node: fx.Node) -> bool:
    """Whether an op matters even where nothing reads its result: attention puts its keys into a slot that others read."""
    return node.target is calls.attend or node.is_impure()


def reached(ends: Iterable[fx.Node], before: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The ends, what comes before them, and so on."""
    nodes: set[fx.Node] = set()
    todo = list(ends)
    while todo:
        n = todo.pop()
        if n not in nodes:
            nodes.add(n)
            todo += before(n)
    return nodes
