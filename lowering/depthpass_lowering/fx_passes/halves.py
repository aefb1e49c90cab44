"""A block's graph in two halves: the stream behind its attention, and what its feed-forward branch adds to a stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from depthpass.capture.captured import Template
from depthpass.capture.nodes import graph_module
from depthpass.errors import LoweringError
from depthpass_lowering.fx_passes.effects import reached
from depthpass_lowering.fx_passes.modulate import Branch, branches
from depthpass_lowering.memo import Once


@dataclass(frozen=True, eq=False)
class Halves:
    """Attributes:
        attention: ``(visit, hidden, *side_inputs, *params)`` -> the block's input plus what its attention adds.
        ffn: ``(visit, hidden, read, *params)`` -> ``hidden`` plus what the feed-forward branch makes of ``read``.
        beside: whether that branch reads the block's input.
    """

    attention: fx.GraphModule
    ffn: fx.GraphModule
    beside: bool


@Once
def halves(template: Template) -> Halves:
    """The halves of a template.

    Raises:
        LoweringError: the block is not a chain of residual branches, attention first or beside the other one.
    """
    gm = template.graph
    attention, mlp = branches(gm.graph)
    if mlp.adder in reached([attention.result], lambda n: n.all_input_nodes):
        raise LoweringError("expected its attention in front of its feed-forward network or beside it, got it behind.")
    return Halves(_attention(gm, mlp), _ffn(gm, mlp, len(template.params)), mlp.source.op == "placeholder")


def _attention(gm: fx.GraphModule, mlp: Branch) -> fx.GraphModule:
    """The graph with the sum that takes the branch replaced by its other summand."""
    (other,) = (a for a in mlp.adder.args if a is not mlp.result)
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(gm.graph, copies))
    copies[mlp.adder].replace_all_uses_with(copies[other])
    graph.eliminate_dead_code()
    return graph_module(gm, graph)


def _ffn(gm: fx.GraphModule, mlp: Branch, params: int) -> fx.GraphModule:
    graph, nodes = fx.Graph(), list(gm.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    visit, hidden = graph.placeholder("visit"), graph.placeholder("hidden")
    read = graph.placeholder("read")
    for stream in (hidden, read):
        stream.meta = dict(inputs[1].meta)
    env = {inputs[0]: visit, inputs[1]: hidden}
    env |= {n: graph.node_copy(n) for n in inputs[len(inputs) - params :]} | {mlp.source: read}
    inside = reached([mlp.result], lambda n: () if n is mlp.source else n.all_input_nodes)
    if lost := [n for n in inputs if n in inside and n not in env]:
        raise LoweringError(f"expected a feed-forward network that reads no table of its tokens, got one that reads %{lost[0]}.")
    for n in nodes:
        if n in inside and n not in env:
            env[n] = graph.node_copy(n, env.__getitem__)
    total = graph.call_function(torch.ops.aten.add.Tensor, (hidden, _shaped(graph, env[mlp.result], hidden)))
    total.meta = dict(inputs[1].meta)
    graph.output(total)
    return graph_module(gm, graph)


def _shaped(graph: fx.Graph, x: fx.Node, like: fx.Node) -> fx.Node:
    """A stream ``[batch, tokens, width]``, also where the block has made it flat (opt)."""
    if x.meta["val"].dim() == like.meta["val"].dim():
        return x
    sizes = [graph.call_function(torch.ops.aten.sym_size.int, (like, d)) for d in (0, 1)]
    for d, size in enumerate(sizes):
        size.meta = {"val": like.meta["val"].shape[d]}
    shaped = graph.call_function(torch.ops.aten.reshape.default, (x, [*sizes, x.meta["val"].shape[-1]]))
    shaped.meta = dict(like.meta)
    return shaped
