"""Find the residual branches of a block's graph and let the running visit scale what each reads and gate what it adds.

A block is read as a chain of sums from its input to its output, ``x -> x + a -> x + a + m``, or ``x -> x + (a + m)``
where both branches read the same stream. Each summand is a branch; the one with the attention call is the attention
branch, the other one the MLP branch. What a branch *reads* is the last value on every path from the stream to its
linear maps: the norm's output in a pre-norm block, the stream itself in a block that norms its branches' results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import networkx as nx
import torch
from torch import fx

from depthpass.capture import calls
from depthpass.capture.captured import Template
from depthpass.capture.nodes import graph_module
from depthpass.errors import LoweringError
from depthpass_lowering.fx_passes.effects import reached
from depthpass_lowering.memo import Once

aten = torch.ops.aten

_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_PRODUCTS = (
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default, calls.attend,
    calls.submodule,
)
_CARRIERS = (
    aten.to.dtype, aten.view.default, aten.reshape.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
)
"""Ops that hand a stream on unchanged. (A cast that changes nothing is no copy, so the sum may read its result.)"""


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        source: the stream that it starts from.
        read: what its linear maps read.
        readers: its nodes that use ``read``.
        result: what it adds.
        adder: the sum that takes ``result``.
    """

    source: fx.Node
    read: fx.Node
    readers: tuple[fx.Node, ...]
    result: fx.Node
    adder: fx.Node


@Once
def modulated(template: Template) -> fx.GraphModule:
    """The template's graph with its branches modulated by the visit; raises as :func:`modulate_pass`."""
    return modulate_pass(template.graph)


def modulate_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """Insert ``visit.modulate(place, value)`` at the four places ``read_attention``, ``gate_attention``, ``read_mlp``
    and ``gate_mlp``.

    Numerics: exact where the visit's factors are 1.

    Raises:
        LoweringError: saying what of the structure was expected and not found.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    if not isinstance(result, fx.Node):
        raise LoweringError("expected a graph with one result.")
    graph.output(result)
    visit = next(n for n in graph.nodes if n.op == "placeholder")
    for name, branch in zip(("attention", "mlp"), branches(graph)):
        for place, value, users in (
            (f"read_{name}", branch.read, branch.readers), (f"gate_{name}", branch.result, (branch.adder,)),
        ):
            with graph.inserting_after(value):
                scaled = graph.call_function(calls.modulate, (visit, place, value))
            scaled.meta = dict(value.meta)
            for user in users:
                user.replace_input_with(value, scaled)
    return graph_module(gm, graph)


def branches(graph: fx.Graph) -> tuple[Branch, Branch]:
    """The attention branch and the MLP branch of a block's graph.

    Raises:
        LoweringError: saying what was expected and not found.
    """
    hidden = [n for n in graph.nodes if n.op == "placeholder"][1]
    data = _data(graph, hidden)
    end = next(n for n in graph.nodes if n.op == "output").args[0]
    chain = _chain(end, hidden, data)
    if not chain:
        raise LoweringError("expected its result to be its input plus residual branches, got "
                            f"{_name(end)} (a norm after the sum, or no residual stream).")
    streams = {hidden, *(total for total, _ in chain)}
    summands: list[tuple[fx.Node, fx.Node]] = []
    for total, summand in chain:
        parts = _parts(summand, streams, data)
        summands += [(part, total if part is summand else summand) for part in parts]
    attention = [pair for pair in summands if _attends(pair[0], streams, data)]
    rest = [pair for pair in summands if pair not in attention]
    if len(attention) != 1 or len(rest) != 1:
        raise LoweringError(
            f"expected one residual branch with attention and one without, got {len(attention)} and {len(rest)}."
        )
    first, second = (_branch(*pair, streams, data) for pair in (*attention, *rest))
    if set(first.readers) & set(second.readers):
        raise LoweringError("expected its two branches to share nothing but what they read.")
    return first, second


def _data(graph: fx.Graph, hidden: fx.Node) -> set[fx.Node]:
    """Values that are computed from the hidden stream, sizes left out."""
    data = {hidden}
    for node in graph.nodes:
        sized = node.target is aten.sym_size.int
        if node.op == "call_function" and not sized and any(a in data for a in node.all_input_nodes):
            data.add(node)
    return data


def _chain(node: object, hidden: fx.Node, data: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]] | None:
    """The sums from the block's input to ``node`` with what each adds to the stream; None when it is no such sum."""
    while isinstance(node, fx.Node) and node.target in _CARRIERS:
        node = node.args[0]
    if node is hidden or not isinstance(node, fx.Node):
        return [] if node is hidden else None
    for stream, summand in _summands(node, data):
        before = _chain(stream, hidden, data)
        if before is not None:
            return [*before, (node, summand)]
    return None


def _summands(node: fx.Node, data: set[fx.Node]) -> Sequence[tuple[fx.Node, fx.Node]]:
    """Both orders of the two operands of a plain sum of streams."""
    if node.target not in _ADDS or node.kwargs or len(node.args) != 2:
        return ()
    a, b = cast("tuple[fx.Node, fx.Node]", node.args)
    return ((a, b), (b, a)) if a in data and b in data else ()


def _parts(summand: fx.Node, streams: set[fx.Node], data: set[fx.Node]) -> tuple[fx.Node, ...]:
    """A summand, or its two halves when exactly one of them has an attention call (parallel branches)."""
    for a, b in _summands(summand, data)[:1]:
        if _attends(a, streams, data) != _attends(b, streams, data):
            return (a, b)
    return (summand,)


def _region(result: fx.Node, streams: set[fx.Node], data: set[fx.Node]) -> set[fx.Node]:
    """The values a branch's result is computed from, back to the streams (included)."""
    return reached([result], lambda n: () if n in streams else [a for a in n.all_input_nodes if a in data])


def _attends(result: fx.Node, streams: set[fx.Node], data: set[fx.Node]) -> bool:
    return any(n.target is calls.attend for n in _region(result, streams, data))


def _branch(result: fx.Node, adder: fx.Node, streams: set[fx.Node], data: set[fx.Node]) -> Branch:
    region = _region(result, streams, data)
    sources = region & streams
    if len(sources) != 1:
        raise LoweringError(f"expected the branch {_name(result)} to read one stream, got {len(sources)}.")
    (source,) = sources
    edges = [(a, n) for n in region - streams for a in n.all_input_nodes if a in region]
    dominator = dict(nx.immediate_dominators(nx.DiGraph(edges), source))
    read = _last_common(
        [_dominators(a, source, dominator) for n in _first_products(source, region) for a in n.all_input_nodes
         if a in region]
    )
    width = _width(source)
    read = [n for n in read if _width(n) == width]
    if not read:
        raise LoweringError(f"expected linear maps in the branch {_name(result)}, found none.")
    readers = tuple(n for n in region - streams if read[-1] in n.all_input_nodes)
    return Branch(source, read[-1], readers, result, adder)


def _first_products(source: fx.Node, region: set[fx.Node]) -> list[fx.Node]:
    """Products of the region that no other product comes before."""
    first, seen, open_ = [], set(), [source]
    while open_:
        for user in open_.pop().users:
            if user in region and user not in seen:
                seen.add(user)
                (first if user.target in _PRODUCTS else open_).append(user)
    return first


def _dominators(node: fx.Node, source: fx.Node, immediate: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Values on every path from the source to a node, the source first, the node last."""
    path = [node]
    while path[-1] is not source:
        path.append(immediate[path[-1]])
    return path[::-1]


def _last_common(paths: Iterable[list[fx.Node]]) -> list[fx.Node]:
    """The common beginning of paths."""
    common: list[fx.Node] = []
    for step in zip(*paths):
        if any(n is not step[0] for n in step):
            break
        common.append(step[0])
    return common


def _width(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() else None


def _name(node: object) -> str:
    return f"%{node.name}" if isinstance(node, fx.Node) else repr(node)
