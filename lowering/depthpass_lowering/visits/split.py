"""A block's graph in two: keys and values of every token, and the rest for the tokens that ask."""

from __future__ import annotations

import operator
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from depthpass.capture import calls
from depthpass.errors import LoweringError


@dataclass(frozen=True, eq=False)
class Split:
    """A block's graph in two; what both need (the first norm, a fused projection) is computed once, by the first.

    Attributes:
        keys: ``(visit, hidden, *sides, *params)`` of every token -> keys and values of each attention call, then what the
            second graph reads besides.
        queries: ``(visit, hidden, *sides, *params, *read)`` of the asking tokens -> the block's result. Its attention calls
            pass None for keys and values: the visit knows them.
        axes: token axis of each value that the second graph reads of the first.
    """

    keys: fx.GraphModule
    queries: fx.GraphModule
    axes: tuple[int, ...]


_SPLIT: weakref.WeakKeyDictionary[fx.GraphModule, Split] = weakref.WeakKeyDictionary()


def split_graph(root: fx.GraphModule, index: int) -> Split:
    """The two graphs of block ``index``'s graph, made once per graph.

    Raises:
        LoweringError: keys that depend on an earlier attention call of the same block.
    """
    if root not in _SPLIT:
        _SPLIT[root] = _split(root, index)
    return _SPLIT[root]


def _split(root: fx.GraphModule, index: int) -> Split:
    nodes = list(root.graph.nodes)
    attends = sorted((n for n in nodes if n.target is calls.attend), key=lambda n: n.args[1])
    made = [a for n in attends for a in n.args[3:5]]
    first = _needed(made, frozenset())
    if any(n in first for n in attends):
        raise LoweringError(
            f"block {index}: its keys depend on an earlier attention call of the same block, so they cannot be computed "
            "without the queries of every token. Use keys='routed', or leave this block out."
        )
    read = _border(nodes, first)
    keys, queries = fx.Graph(), fx.Graph()
    env: dict[fx.Node, Any] = {}
    for n in nodes:
        if n.op == "placeholder" or n in first or n in read:
            env[n] = keys.node_copy(n, env.__getitem__)
    keys.output(tuple(env[a] for a in (*made, *read)))
    result = nodes[-1].args[0]
    results = result if isinstance(result, tuple | list) else [result]
    second = _needed(results, frozenset(read), {n: n.args[3:5] for n in attends})
    env = {n: queries.node_copy(n) for n in nodes if n.op == "placeholder"}
    for n in read:
        env[n] = queries.placeholder(f"read_{n.name}")
        env[n].meta = dict(n.meta)
    for n in nodes:
        if n in second and n not in env:
            # Keys and values have no node here: None stands for them.
            env[n] = queries.node_copy(n, env.get if n in attends else env.__getitem__)
    queries.output(fx.node.map_arg(result, env.__getitem__))
    return Split(fx.GraphModule(root, keys), fx.GraphModule(root, queries), tuple(_axis(nodes, n) for n in read))


def _needed(ends: list[fx.Node], stop: frozenset[fx.Node], drop: dict[fx.Node, tuple] | None = None) -> set[fx.Node]:
    """What values are computed from, up to ``stop``; of a node in ``drop`` some arguments are left out."""
    found: set[fx.Node] = set()
    todo = list(ends)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            if n not in stop:
                left_out = (drop or {}).get(n, ())
                todo += [a for a in n.all_input_nodes if a not in left_out]
    return found


def _border(nodes: list[fx.Node], first: set[fx.Node]) -> list[fx.Node]:
    """Values of the first part that the second reads, as far as they come from the hidden stream."""
    hidden = next(n for n in nodes if n.op == "placeholder" and n.name == "hidden")
    from_hidden = {hidden}
    for n in nodes:
        if any(a in from_hidden for a in n.all_input_nodes) and isinstance(n.meta.get("val"), Tensor | tuple | list):
            from_hidden.add(n)
    inside = set(first)
    # Parts of a tuple belong where the tuple is made.
    inside |= {n for n in nodes if n.target is operator.getitem and n.args[0] in inside}
    found = []
    for n in nodes:
        if n in inside and n in from_hidden and n.op != "placeholder" and isinstance(n.meta["val"], Tensor):
            readers = [u for u in n.users if u not in inside and u.target is not calls.attend]
            asks = [u for u in n.users if u.target is calls.attend and u.args[2] is n]
            if (readers or asks) and _axis(nodes, n) is not None:
                found.append(n)
    return found


def _axis(nodes: list[fx.Node], n: fx.Node) -> int | None:
    """The one dimension of a value that is the token axis; None when that is not certain."""
    hidden = next(h for h in nodes if h.op == "placeholder" and h.name == "hidden").meta["val"]
    batch, tokens = hidden.shape[:2]
    shape = n.meta["val"].shape
    found = [d for d, s in enumerate(shape) if d and _same(s, tokens)]
    return found[0] if len(found) == 1 and _same(shape[0], batch) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same symbol, without asking for a guard."""
    left, right = (getattr(getattr(x, "node", None), "expr", x) for x in (a, b))
    return type(left) is type(right) and left == right
