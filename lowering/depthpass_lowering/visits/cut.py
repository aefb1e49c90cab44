"""A block's graph cut in two, once per template: ``keys``, and ``attend`` with ``finish``.

Keys may then come from another stream than queries, or queries from some of the tokens. Attention and what follows it are one
graph: nothing else reads what is between them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from depthpass.capture import calls
from depthpass.capture.captured import Template
from depthpass.capture.nodes import graph_module
from depthpass.errors import LoweringError
from depthpass.ir.program import Op, writes_slot
from depthpass.ir.structural_ops import asks
from depthpass.lowered.ops import UNKNOWN, BlockFacts, of_one_stream
from depthpass_lowering.fx_passes.effects import reached
from depthpass_lowering.host import Host
from depthpass_lowering.memo import Once


@dataclass(frozen=True, eq=False)
class Cut:
    """What a visit runs of its block's graph.

    Attributes:
        keys: ``(visit, hidden, *side_inputs, *params)`` -> keys and values of each attention call, then what the rest reads
            besides; None = the rest computes them as well, or there are none.
        rest: ``(visit, hidden, *side_inputs, *params, *read)`` -> the block's result. Behind ``keys`` its attention calls pass
            None for keys and values: the visit knows them.
        axes: token axis of each value that the rest reads of the first.
    """

    keys: fx.GraphModule | None
    rest: fx.GraphModule
    axes: tuple[int, ...] = ()


def cut_for(visit: Op, graph: fx.GraphModule) -> Cut:
    """What a visit runs of its block's graph.

    Raises:
        LoweringError: the visit needs the parts of a block that runs as a whole only.
    """
    if of_one_stream(visit):
        return Cut(None, graph)
    writes = writes_slot(visit) is not None
    if (reason := uncut(graph)) is not None:
        if not writes:
            return Cut(None, graph)  # its keys are computed for nobody
        raise LoweringError(f"block {visit['index']}: {reason}, so they cannot be computed without the queries of every token. "
                            "Use keys='routed', or leave this block out.")
    # Some tokens' queries read what the keys of all tokens were made from; those of another stream have their own.
    both = _cut(graph, asks(visit))
    return both if writes else Cut(None, both.rest)


@Once
def uncut(graph: fx.GraphModule) -> str | None:
    """Why a block's graph can only run as a whole, or None."""
    attends = [n for n in graph.graph.nodes if n.target is calls.attend]
    needed = _needed([a for n in attends for a in n.args[3:5]])
    return "its keys depend on an earlier attention call of the same block" if any(n in needed for n in attends) else None


def block_facts(host: Host, index: int) -> BlockFacts:
    """What lowering has to know of a block of a host."""
    if host.captured is None:  # blocks that are functions, as those of constructions are
        return UNKNOWN
    template, numbers = host.captured.blocks[index].template, host.side_inputs_of(index)
    return BlockFacts(
        {part: tuple(numbers[i] for i in places) for part, places in _sides(template).items()}, uncut(template.graph)
    )


@Once
def _sides(template: Template) -> dict[str, tuple[int, ...]]:
    """Places of the side inputs that each part of a block reads."""
    nodes = list(template.graph.graph.nodes)
    attends = [n for n in nodes if n.target is calls.attend]
    tables = [n for n in nodes if n.op == "placeholder"][2 : 2 + template.side_inputs]
    parts = {
        "keys": _needed([a for n in attends for a in n.args[3:5]]),
        "attend": _needed([a for n in attends for a in n.all_input_nodes if a not in n.args[3:5]], stop=set(attends)),
        "finish": _needed(list(nodes[-1].all_input_nodes), stop=set(attends)),
    }
    return {part: tuple(i for i, t in enumerate(tables) if t in needed) for part, needed in parts.items()}


@Once
def _cut(root: fx.GraphModule, shared: bool) -> Cut:
    nodes = list(root.graph.nodes)
    attends = sorted((n for n in nodes if n.target is calls.attend), key=lambda n: n.args[1])
    keys_values = [a for n in attends for a in n.args[3:5]]
    keys, rest = fx.Graph(), fx.Graph()
    first = _needed(keys_values)
    read = _border(nodes, first) if shared else []
    env: dict[fx.Node, Any] = {}
    for n in nodes:
        if n.op == "placeholder" or n in first or n in read:
            env[n] = keys.node_copy(n, env.__getitem__)
    keys.output(tuple(env[a] for a in (*keys_values, *read)))
    second = _needed(list(nodes[-1].all_input_nodes), set(read), {n: n.args[3:5] for n in attends})
    env = {n: rest.node_copy(n) for n in nodes if n.op == "placeholder"}
    for n in read:
        env[n] = rest.placeholder(f"read_{n.name}")
        env[n].meta = dict(n.meta)
    for n in nodes:
        if n in second and n not in env:
            # Keys and values have no node here, or one that others read: None stands for them.
            env[n] = rest.node_copy(n, lambda a, n=n: None if n in attends and a in n.args[3:5] else env[a])
    rest.output(map_arg(nodes[-1].args[0], env.__getitem__))
    axes = tuple(axis for n in read if (axis := _axis(nodes, n)) is not None)
    return Cut(graph_module(root, keys), graph_module(root, rest), axes)


def _needed(ends: list[Any], stop: set[fx.Node] | None = None, drop: dict[fx.Node, Any] | None = None) -> set[fx.Node]:
    """What values are computed from, up to ``stop``; of a node in ``drop`` some arguments are left out."""
    return reached(ends, lambda n: () if stop and n in stop else [
        a for a in n.all_input_nodes if a not in (drop or {}).get(n, ())])


def _border(nodes: list[fx.Node], first: set[fx.Node]) -> list[fx.Node]:
    """What the second part reads of the first (its norm, a fused projection), as far as it comes from the stream."""
    hidden = next(n for n in nodes if n.op == "placeholder" and n.name == "hidden")
    from_hidden = {hidden}
    for n in nodes:
        if any(a in from_hidden for a in n.all_input_nodes) and isinstance(n.meta.get("val"), Tensor | tuple | list):
            from_hidden.add(n)
    inside = set(first)
    # Parts of a tuple belong where the tuple is made.
    inside |= {n for n in nodes if n.target is operator.getitem and n.args[0] in inside}
    border = []
    for n in nodes:
        if n in inside and n in from_hidden and n.op != "placeholder" and isinstance(n.meta["val"], Tensor):
            read = any(u not in inside and (u.target is not calls.attend or u.args[2] is n) for u in n.users)
            if read and _axis(nodes, n) is not None:
                border.append(n)
    return border


def _axis(nodes: list[fx.Node], n: fx.Node) -> int | None:
    """The one dimension of a value that is the token axis; None when that is not certain."""
    hidden = next(h for h in nodes if h.op == "placeholder" and h.name == "hidden").meta["val"]
    batch, tokens = hidden.shape[:2]
    shape = n.meta["val"].shape
    axes = [d for d, s in enumerate(shape) if d and _same(s, tokens)]
    return axes[0] if len(axes) == 1 and _same(shape[0], batch) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same symbol, without asking for a guard."""
    left, right = (getattr(getattr(x, "node", None), "expr", x) for x in (a, b))
    return type(left) is type(right) and left == right
