"""A block's graph cut in two, once per template: ``keys``, and ``attend`` with ``finish``.

Each part works out what it needs from its own stream, so that keys may come from another stream than queries, or queries from
some of the tokens. Attention and what follows it are one graph: nothing else reads what is between them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import fx

from depthpass.capture import calls
from depthpass.capture.model import Template
from depthpass.errors import LoweringError
from depthpass.ir.program import Op, writes_slot
from depthpass.lowered.ops import BlockFacts, of_one_stream
from depthpass_lowering.host import Host


@dataclass(frozen=True, eq=False)
class Cut:
    """A block's graph in two.

    Attributes:
        keys: ``(visit, hidden, *sides, *params)`` -> keys and values of each attention call.
        rest: ``(visit, hidden, *sides, *params)`` -> the block's result. Its attention calls pass None for keys and values:
            the visit knows them.
    """

    keys: fx.GraphModule
    rest: fx.GraphModule


_CUT: weakref.WeakKeyDictionary[fx.GraphModule, Cut] = weakref.WeakKeyDictionary()
_FACTS: weakref.WeakKeyDictionary[Template, tuple[dict[str, tuple[int, ...]], str | None]] = weakref.WeakKeyDictionary()


def graphs_of(visit: Op, graph: fx.GraphModule) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """What a visit runs of its block's graph: the graph of its keys, and that of its queries and the rest.

    The first is None where the second computes the keys as well (the graph runs whole), or where the visit has none.

    Raises:
        LoweringError: the visit needs the parts of a block that runs as a whole only.
    """
    if of_one_stream(visit):
        return None, graph
    writes = writes_slot(visit) is not None
    if (reason := uncut(graph)) is not None:
        if not writes:
            return None, graph  # its keys are computed for nobody
        raise LoweringError(f"block {visit['index']}: {reason}, so they cannot be computed without the queries of every token. "
                            "Use keys='routed', or leave this block out.")
    if graph not in _CUT:
        _CUT[graph] = _cut(graph)
    return _CUT[graph].keys if writes else None, _CUT[graph].rest


def uncut(graph: fx.GraphModule) -> str | None:
    """Why a block's graph can only run as a whole, or None."""
    attends = [n for n in graph.graph.nodes if n.target is calls.attend]
    needed = _needed([a for n in attends for a in n.args[3:5]])
    return "its keys depend on an earlier attention call of the same block" if any(n in needed for n in attends) else None


def block_facts(host: Host, index: int) -> BlockFacts:
    """What lowering has to know of a block of a host."""
    template, numbers = host.captured.blocks[index].template, host.sides_of(index)
    if template not in _FACTS:
        _FACTS[template] = _sides(template), uncut(template.graph)
    sides, reason = _FACTS[template]
    return BlockFacts({part: tuple(numbers[i] for i in places) for part, places in sides.items()}, reason)


def _sides(template: Template) -> dict[str, tuple[int, ...]]:
    """Places of the side inputs that each part of a block reads."""
    nodes = list(template.graph.graph.nodes)
    attends = [n for n in nodes if n.target is calls.attend]
    tables = [n for n in nodes if n.op == "placeholder"][2 : 2 + template.sides]
    parts = {
        "keys": _needed([a for n in attends for a in n.args[3:5]]),
        "attend": _needed([a for n in attends for a in n.all_input_nodes if a not in n.args[3:5]], stop=set(attends)),
        "finish": _needed(list(nodes[-1].all_input_nodes), stop=set(attends)),
    }
    return {part: tuple(i for i, t in enumerate(tables) if t in needed) for part, needed in parts.items()}


def _cut(root: fx.GraphModule) -> Cut:
    nodes = list(root.graph.nodes)
    attends = sorted((n for n in nodes if n.target is calls.attend), key=lambda n: n.args[1])
    made = [a for n in attends for a in n.args[3:5]]
    keys, rest = fx.Graph(), fx.Graph()
    first = _needed(made)
    env: dict[fx.Node, Any] = {}
    for n in nodes:
        if n.op == "placeholder" or n in first:
            env[n] = keys.node_copy(n, env.__getitem__)
    keys.output(tuple(env[a] for a in made))
    second = _needed(list(nodes[-1].all_input_nodes), drop={n: n.args[3:5] for n in attends})
    env = {}
    for n in nodes:
        if n.op == "placeholder" or n in second:
            # Keys and values have no node here, or nobody's: None stands for them.
            env[n] = rest.node_copy(n, lambda a, n=n: None if n in attends and a in n.args[3:5] else env[a])
    rest.output(fx.node.map_arg(nodes[-1].args[0], env.__getitem__))
    return Cut(fx.GraphModule(root, keys), fx.GraphModule(root, rest))


def _needed(ends: list[Any], stop: set[fx.Node] | None = None, drop: dict[fx.Node, Any] | None = None) -> set[fx.Node]:
    """What values are computed from, up to ``stop``; of a node in ``drop`` some arguments are left out."""
    found: set[fx.Node] = set()
    todo = list(ends)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            if not stop or n not in stop:
                left_out = (drop or {}).get(n, ())
                todo += [a for a in n.all_input_nodes if a not in left_out]
    return found
