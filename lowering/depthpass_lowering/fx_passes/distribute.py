"""Loop distribution below visits: what of a token loop's graph needs no loop runs over all tokens at once, before it.

A node that depends on parameters and side inputs alone (rotary tables, ``1 + weight`` of a norm) computes the same in every
chunk. It leaves the loop, once for all blocks that ask for the same; where it carries the token axis, each chunk gets its
slice.

Nothing can move behind the loop. An op is in a serial region because its result closes a delay cycle, so every node of a
block that reaches the block's result lies on that cycle, and the others are dead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from depthpass.capture.nodes import graph_module
from depthpass_lowering.fx_passes.effects import writes

UNKNOWN = "unknown"
"""Entry ``axis`` of a node's meta whose token axis is not certain; None means that it carries none."""


@dataclass(frozen=True, eq=False)
class Distributed:
    """A token loop's graph in two.

    Attributes:
        before: ``(*known) -> values``, run once over all tokens; None = nothing moves.
        axes: token axis of each of its values; None = the same for every chunk.
        loop: takes what the graph took, then the values.
        moved: how many nodes left the loop.
    """

    before: fx.GraphModule | None
    axes: tuple[int | None, ...]
    loop: fx.GraphModule
    moved: int


def distribute_pass(gm: fx.GraphModule, known: list[fx.Node]) -> Distributed:
    """Move what depends on ``known`` inputs alone in front of the loop.

    Args:
        known: inputs of the graph that are there before the loop, with their token axis as ``axis`` in their meta.

    Numerics: exact.
    """
    twins: dict[object, fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}
    movable: set[fx.Node] = set()
    ready = set(known)
    for n in gm.graph.nodes:
        if not _moves(n, ready | movable):
            continue
        movable.add(n)
        # Blocks ask for the same tables: one of equal nodes is enough.
        args, kwargs = map_arg((n.args, n.kwargs), lambda a: first.get(a, a))
        first[n] = twins.setdefault((n.target, _frozen(args), _frozen(kwargs)), n)
    read = [n for n in dict.fromkeys(first[m] for m in gm.graph.nodes if m in movable) if _leaves(n, first, movable)]
    if not read:
        return Distributed(None, (), gm, 0)
    before, loop = fx.Graph(), fx.Graph()
    env: dict[fx.Node, fx.Node] = {n: before.node_copy(n) for n in known}
    for n in gm.graph.nodes:
        if (n in movable and first[n] is n) or n.op == "get_attr":
            env[n] = before.node_copy(n, lambda a: env[first.get(a, a)])
    before.output(tuple(env[n] for n in read))
    before.eliminate_dead_code()
    inside: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for n in placeholders:
        inside[n] = loop.node_copy(n)
    for n in read:
        value = loop.placeholder(f"known_{n.name}")
        value.meta = dict(n.meta)
        inside.update({m: value for m in movable if first[m] is n})
    for n in gm.graph.nodes:
        if n.op != "placeholder" and n not in movable:
            inside[n] = loop.node_copy(n, inside.__getitem__)
    axes = tuple(n.meta["axis"] for n in read)
    return Distributed(graph_module(gm, before), axes, graph_module(gm, loop), len(movable))


def _leaves(n: fx.Node, same: dict[fx.Node, fx.Node], movable: set[fx.Node]) -> bool:
    """Whether the loop reads a moved value."""
    return any(u not in movable for m in movable if same[m] is n for u in m.users)


def _moves(n: fx.Node, ready: set[fx.Node]) -> bool:
    """Whether a node computes a tensor from what is ready alone, and where its token axis is certain."""
    return (
        n.op == "call_function" and isinstance(n.meta.get("val"), Tensor) and n.meta.get("axis", UNKNOWN) != UNKNOWN
        and not writes(n)
        and bool(n.all_input_nodes) and all(a in ready or a.op == "get_attr" for a in n.all_input_nodes)
        and any(a in ready for a in n.all_input_nodes)
    )


def _frozen(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)


def token_axis(value: object, tokens: object) -> int | str | None:
    """The dimension of a captured value that is the token axis; None if it carries none, :data:`UNKNOWN` if not certain."""
    if not isinstance(value, Tensor) or not isinstance(tokens, torch.SymInt):
        return UNKNOWN
    symbol = tokens.node.expr
    axes = []
    for d, size in enumerate(value.shape):
        expr = size.node.expr if isinstance(size, torch.SymInt) else None
        if expr == symbol:
            axes.append(d)
        elif expr is not None and symbol in expr.free_symbols:
            return UNKNOWN
    return None if not axes else axes[0] if len(axes) == 1 else UNKNOWN
