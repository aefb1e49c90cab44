"""A block's graph in two halves: the stream behind its attention, and what its feed-forward branch adds to a stream."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import fx

from depthpass.capture.model import Template
from depthpass.errors import LoweringError
from depthpass_lowering.fx_passes.modulate import Branch, branches


@dataclass(frozen=True, eq=False)
class Halves:
    """Attributes:
        attention: ``(visit, hidden, *sides, *params)`` -> the block's input plus what its attention adds.
        ffn: ``(visit, hidden, read, *params)`` -> ``hidden`` plus what the feed-forward branch makes of ``read``.
        beside: whether that branch reads the block's input.
    """

    attention: fx.GraphModule
    ffn: fx.GraphModule
    beside: bool


_MADE: weakref.WeakKeyDictionary[Template, Halves] = weakref.WeakKeyDictionary()


def halves(template: Template, index: int) -> Halves:
    """The halves of a template, made once.

    Args:
        index: of a block with this template, for the message.

    Raises:
        LoweringError: the block is not a chain of residual branches, attention first or beside the other one.
    """
    if template not in _MADE:
        try:
            _MADE[template] = _halves(template.graph, len(template.params))
        except LoweringError as error:
            raise LoweringError(
                f"block {index} cannot be cut between its attention and its feed-forward network: {error} Leave this block out."
            ) from None
    return _MADE[template]


def _halves(gm: fx.GraphModule, params: int) -> Halves:
    attention, mlp = branches(gm.graph)
    if mlp.adder in _ancestors([attention.result]):
        raise LoweringError("expected its attention in front of its feed-forward network or beside it, got it behind.")
    return Halves(_attention(gm, mlp), _ffn(gm, mlp, params), mlp.source.op == "placeholder")


def _attention(gm: fx.GraphModule, mlp: Branch) -> fx.GraphModule:
    """The graph with the sum that takes the branch replaced by its other summand."""
    (other,) = (a for a in mlp.adder.args if a is not mlp.result)
    graph, copies = fx.Graph(), {}
    result = graph.graph_copy(gm.graph, copies)
    graph.output(result)
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    copies[mlp.adder].replace_all_uses_with(copies[other])
    graph.eliminate_dead_code()
    return _made(gm, graph)


def _ffn(gm: fx.GraphModule, mlp: Branch, params: int) -> fx.GraphModule:
    graph, nodes = fx.Graph(), list(gm.graph.nodes)
    given = [n for n in nodes if n.op == "placeholder"]
    visit, hidden = graph.placeholder("visit"), graph.placeholder("hidden")
    read = graph.placeholder("read")
    for made in (hidden, read):
        made.meta = dict(given[1].meta)
    env = {given[0]: visit, given[1]: hidden}
    for n in given[len(given) - params :]:
        env[n] = graph.node_copy(n)
        env[n].meta = dict(n.meta)
    env[mlp.source] = read
    inside = _ancestors([mlp.result], mlp.source)
    if lost := [n for n in given if n in inside and n not in env]:
        raise LoweringError(f"expected a feed-forward network that reads no table of its tokens, got one that reads %{lost[0]}.")
    for n in nodes:
        if n in inside and n not in env:
            env[n] = graph.node_copy(n, env.__getitem__)
            env[n].meta = dict(n.meta)
    total = graph.call_function(torch.ops.aten.add.Tensor, (hidden, _shaped(graph, env[mlp.result], hidden)))
    total.meta = dict(given[1].meta)
    graph.output(total)
    return _made(gm, graph)


def _shaped(graph: fx.Graph, x: fx.Node, like: fx.Node) -> fx.Node:
    """A stream ``[batch, tokens, width]``, also where the block has made it flat (opt)."""
    if x.meta["val"].dim() == like.meta["val"].dim():
        return x
    sizes = [graph.call_function(torch.ops.aten.sym_size.int, (like, d)) for d in (0, 1)]
    for d, size in enumerate(sizes):
        size.meta = {"val": like.meta["val"].shape[d]}
    made = graph.call_function(torch.ops.aten.reshape.default, (x, [*sizes, x.meta["val"].shape[-1]]))
    made.meta = dict(like.meta)
    return made


def _ancestors(ends: list[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
    """What values are computed from, themselves included, not beyond ``stop``."""
    found: set[fx.Node] = set()
    todo = list(ends)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo += [] if n is stop else n.all_input_nodes
    return found


def _made(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    made = fx.GraphModule(gm, graph)
    made.graph.lint()
    return made
