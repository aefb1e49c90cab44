"""Pointwise work between two products is computed again in the backward pass instead of kept.

An MLP's activations are wide: autograd would keep every step of ``silu(gate) * up``. The product that reads the result takes
the steps in, keeps what they start from, and computes them again when it needs x for its weight gradient.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from depthpass.capture.nodes import graph_module
from depthpass_lowering.fx_passes.products import products

aten = torch.ops.aten

POINTWISE = frozenset({
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.square.default,
    aten.view.default, aten.reshape.default,
})
"""Ops that are cheap to compute again; views among them change shapes by numbers only."""


def recompute_pass(gm: fx.GraphModule) -> int:
    """Give products the pointwise nodes between them and the products before: :func:`absorbed` in place of
    :func:`~depthpass_lowering.fx_passes.products.products`.

    Numerics: exact.

    Returns:
        how many products took something in.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not products:
            continue
        transposed, weights, biases, x = node.args
        inside = _between(node, x)
        if not inside:
            continue
        leaves = list(dict.fromkeys(a for n in inside for a in n.all_input_nodes if a not in inside))
        steps = fx.Graph()
        env = {a: steps.placeholder(a.name) for a in leaves}
        for a, given in env.items():
            given.meta = dict(a.meta)
        for n in inside:
            env[n] = steps.node_copy(n, env.__getitem__)
        steps.output(env[x])
        name = f"steps_{count}"
        setattr(gm, name, graph_module(gm, steps))
        with gm.graph.inserting_before(node):
            given = gm.graph.get_attr(name)
            product = gm.graph.call_function(absorbed, (transposed, weights, biases, given, *leaves))
        node.replace_all_uses_with(product)
        gm.graph.erase_node(node)
        for n in reversed(inside):
            gm.graph.erase_node(n)
        count += 1
    gm.recompile()
    return count


def absorbed(transposed, weights, biases, steps, *leaves):
    """Products of ``steps(*leaves)``."""
    return products(transposed, weights, biases, steps(*leaves))


def _between(node: fx.Node, x: fx.Node) -> list[fx.Node]:
    """The pointwise nodes behind ``x`` that nothing else reads, in order, if they all start from products."""
    inside, wanted, nodes = {node}, {x}, []
    for n in reversed(list(node.graph.nodes)):
        if n not in wanted or _starts(n):
            continue
        if n.op != "call_function" or n.target not in POINTWISE or not all(u in inside for u in n.users):
            return []
        inside.add(n)
        nodes.append(n)
        wanted.update(n.all_input_nodes)
    return nodes[::-1]


def _starts(n: fx.Node) -> bool:
    """Whether a node is the result of a product, or a view of one."""
    if n.target in (aten.view.default, aten.reshape.default):
        return _starts(n.all_input_nodes[0])
    return n.target is operator.getitem and n.all_input_nodes[0].target in (products, absorbed)
