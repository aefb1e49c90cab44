"""Find the matrix products of a block's graph whose weight gradient may leave the token loop."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from depthpass_lowering.sink import Sink, sunk_linear

aten = torch.ops.aten


def sink_linears_pass(gm: fx.GraphModule, sink: fx.Node | None = None) -> tuple[fx.GraphModule, int]:
    """Replace every product of a stream with a parameter by one that reports its operands to a sink.

    The weight gradient of ``y = x W`` is a contraction over tokens, so it is linear in the tokens and may be computed
    once over all of them. ``linear(x, p, b)`` and ``addmm(b, x, p)`` (GPT-2's Conv1D) with parameters p, b are matched.

    Numerics: reassociated (sums over tokens in one product instead of one per chunk).

    Returns:
        a new graph module ``(sink, visit, hidden, *sides, *params)`` and the number of products replaced.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    holder = graph.placeholder("sink")
    parameters = {n for n in gm.graph.nodes if n.op == "placeholder" and n.name.startswith("p_")}
    count = 0
    for node in gm.graph.nodes:
        match = match_product(node, parameters)
        if match is None:
            env[node] = graph.node_copy(node, lambda n: env[n])
            continue
        x, weight, bias, transposed = match
        args = (holder, env[x], env[weight], None if bias is None else env[bias], transposed)
        env[node] = graph.call_function(_call, args)
        env[node].meta = dict(node.meta)
        count += 1
    made = fx.GraphModule(gm, graph)
    made.graph.lint()
    return made, count


def match_product(node: fx.Node, parameters: set[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """``(x, weight, bias, whether weight is [in, out])`` of a product with a parameter, or None."""
    if node.target is aten.linear.default and node.args[1] in parameters:
        bias = node.args[2] if len(node.args) > 2 else None
        if bias is None or bias in parameters:
            return node.args[0], node.args[1], bias, False
    if node.target is aten.addmm.default and not node.kwargs and node.args[2] in parameters and node.args[0] in parameters:
        return node.args[1], node.args[2], node.args[0], True
    return None


def _call(sink: Sink, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return sunk_linear(sink, x, weight, bias, transposed)
