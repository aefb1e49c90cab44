"""Find the ports of the blocks in a graph without markers, from the module each op belongs to and from the data flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from depthpass.capture.nodes import module_paths
from depthpass.errors import UnsupportedModelError

_OPS = torch.ops.depthpass
CACHE = (
    "expected a graph without a KV cache: call the compiled model with use_cache=False (or set model.config.use_cache = "
    "False). For generation use dp.transform(model, spec), whose generate() keeps a cache of its own."
)
_BREAK = (
    "a graph break cut the model into pieces, or it was not called as a whole; find the cause with torch.compile(..., "
    "fullgraph=True) or TORCH_LOGS=graph_breaks, and compile the model itself"
)


@dataclass(frozen=True)
class Ports:
    """Where the hidden stream enters and leaves blocks.

    Attributes:
        members: nodes of each block.
        entries: the hidden stream before each block; entry i + 1 is what block i computes.
        last: what the last block computes.
        final: what the module that owns the blocks returns (after the final norm).
        inside: nodes between ``last`` and ``final``.
    """

    members: tuple[frozenset[fx.Node], ...]
    entries: tuple[fx.Node, ...]
    last: fx.Node
    final: fx.Node
    inside: frozenset[fx.Node]


def mark_ports(graph: fx.Graph, layers: str, count: int, width: int) -> None:
    """Insert the ops ``enter``, ``leave`` and ``final`` into a graph whose module paths start at the model.

    Raises:
        UnsupportedModelError: blocks are missing, a KV cache flows in or out, or more than the hidden stream flows from
            block to block.
    """
    ports = _find(graph, layers, count, width)
    value = ports.entries[0]
    for i, members in enumerate(ports.members):
        entered = _insert(graph, value, _OPS.enter.default, i)
        value.replace_all_uses_with(entered, delete_user_cb=lambda u, m=members, e=entered: u in m and u is not e)
        out = ports.entries[i + 1] if i + 1 < count else ports.last
        left = _insert(graph, out, _OPS.leave.default, i)
        out.replace_all_uses_with(left, delete_user_cb=lambda u, m=members, e=left: u not in m and u is not e)
        value = left
    final = value if ports.final is ports.last else ports.final
    marked = _insert(graph, final, _OPS.final.default)
    final.replace_all_uses_with(
        marked, delete_user_cb=lambda u: u not in ports.inside and u is not marked
    )


def _insert(graph: fx.Graph, value: fx.Node, op, *args: int) -> fx.Node:
    after = value
    while after.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        node = graph.call_function(op, (value, *args))
    node.meta["val"] = value.meta["val"]
    return node


def _find(graph: fx.Graph, layers: str, count: int, width: int) -> Ports:
    members: list[set[fx.Node]] = [set() for _ in range(count)]
    for node in graph.nodes:
        if (i := block_of(node, layers)) is not None and not _is_size(node):
            if i >= count:
                raise UnsupportedModelError(f"the graph runs block {i} of {layers}, which has {count} blocks.")
            members[i].add(node)
    if missing := [i for i in range(count) if not members[i]]:
        have = [i for i in range(count) if members[i]]
        raise UnsupportedModelError(
            f"expected all {count} blocks of {layers} in one graph, got {f'blocks {have}' if have else 'none of them'} "
            f"({len(missing)} missing): {_BREAK}."
        )
    first = _first_entry(members, width)
    stream = _descendants(graph, first)
    _refuse_cache(graph, members, stream)
    entries = [first]
    for i in range(1, count):
        carriers = {a for n in members[i] for a in n.all_input_nodes if a in stream and a not in members[i]}
        outside = sorted(a.name for a in carriers if a not in members[i - 1])
        if len(carriers) != 1 or outside:
            names = ", ".join(sorted(a.name for a in carriers)) or "nothing"
            raise UnsupportedModelError(
                f"block {i} of {layers} reads {names}; expected one value, which block {i - 1} computes: only the hidden "
                "stream may flow from block to block, and every block runs once."
            )
        entries.append(carriers.pop())
    lasts = [n for n in members[-1] & stream if any(u not in members[-1] for u in n.users)]
    if len(lasts) != 1:
        raise UnsupportedModelError(
            f"block {count - 1} of {layers} hands out {', '.join(sorted(n.name for n in lasts)) or 'nothing'}; expected "
            "the hidden stream only."
        )
    return _with_final(graph, layers, tuple(map(frozenset, members)), tuple(entries), lasts[0])


def _with_final(graph: fx.Graph, layers: str, members, entries, last: fx.Node) -> Ports:
    """Split what follows the blocks at the module that owns them: its own ops are the final norm, the rest the head."""
    owner = layers.rpartition(".")[0]
    after = _descendants(graph, last) - members[-1]
    inside = frozenset(n for n in after if n.op != "output" and _belongs(n, owner))
    ends = [n for n in (last, *inside) if any(u not in inside and u not in members[-1] for u in n.users)]
    if len(ends) != 1:
        raise UnsupportedModelError(
            f"{owner or 'the model'} hands out {', '.join(sorted(n.name for n in ends)) or 'nothing'}; expected its last "
            "hidden state only (output_hidden_states and output_attentions are not supported)."
        )
    return Ports(members, entries, last, ends[0], inside)


def _first_entry(members: list[set[fx.Node]], width: int) -> fx.Node:
    """The hidden stream that enters block 0: the one value of its shape that block 0 alone reads."""
    outside = {a for n in members[0] for a in n.all_input_nodes if a not in members[0]}
    later = {a for m in members[1:] for n in m for a in n.all_input_nodes}
    entries = [
        a for a in outside - later
        if isinstance(v := a.meta.get("val"), torch.Tensor) and v.dim() == 3 and v.shape[2] == width
        and v.is_floating_point() and not a.meta.get("parameter")
    ]
    if len(entries) != 1:
        raise UnsupportedModelError(
            f"expected one value of shape [batch, tokens, {width}] that only block 0 reads, the hidden stream; got "
            f"{', '.join(sorted(a.name for a in entries)) or 'none'}."
        )
    return entries[0]


def _refuse_cache(graph: fx.Graph, members: list[set[fx.Node]], stream: set[fx.Node]) -> None:
    """Keys and values that are results of the graph, or that come from outside, are a cache."""
    output = next(n for n in graph.nodes if n.op == "output")
    everywhere = set().union(*members)
    for value in output.all_input_nodes:
        if value in everywhere and value in stream and not _is_size(value):
            shape = tuple(value.meta["val"].shape)
            if len(shape) == 4:
                raise UnsupportedModelError(f"the graph returns keys and values ({value.name}, shape {shape}): {CACHE}")
            raise UnsupportedModelError(
                f"the graph returns {value.name} of shape {shape} from inside a block; expected the hidden stream only to "
                "leave a block (output_hidden_states, output_attentions and output_router_logits are not supported)."
            )
    for node in everywhere:
        for value in node.all_input_nodes:
            given = value.meta.get("val")
            if value.op == "placeholder" and isinstance(given, torch.Tensor) and given.dim() == 4 and (
                given.is_floating_point() and not value.meta.get("parameter")
            ) and "attention" not in str(node.target):
                raise UnsupportedModelError(f"the graph reads keys and values from its arguments ({value.name}): {CACHE}")


def block_of(node: fx.Node, layers: str) -> int | None:
    """Index of the block a node belongs to, by its module path."""
    for path in module_paths(node):
        rest = path[len(layers) + 1 :] if path.startswith(layers + ".") else ""
        if rest.split(".")[0].isdigit():
            return int(rest.split(".")[0])
    return None


def _belongs(node: fx.Node, owner: str) -> bool:
    paths = module_paths(node)
    return not owner or any(p == owner or p.startswith(owner + ".") for p in paths)


def _descendants(graph: fx.Graph, source: fx.Node) -> set[fx.Node]:
    nodes = {source}
    for node in graph.nodes:
        if not nodes.isdisjoint(node.all_input_nodes) and not _is_size(node):
            nodes.add(node)
    return nodes


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)
