"""Find the products with parameters in a graph, and join those that read one stream.

``linear(x, p, b)`` and ``addmm(b, x, p)`` (GPT-2's Conv1D) with parameters p, b become one node per stream x, whose results
are those of all its weights: q, k and v make one product, gate and up another. Their weight gradients are contractions over
tokens and may leave the token loop (:mod:`.sink`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from depthpass_lowering.fx_passes.effects import writes
from depthpass_lowering.products.packed import Weights, plain

aten = torch.ops.aten


def products(
    transposed: bool, weights: Sequence[Tensor], biases: Sequence[Tensor | None], x: Tensor, gain: Tensor | None = None
) -> Sequence[Tensor]:
    """Products of one stream with parameters: ``x W^T + b`` of each; with a gain, of ``gain * x``."""
    x = x if gain is None else gain * x
    return plain(Weights(tuple(weights), tuple(biases), transposed=transposed), (x,))


def land(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], present: Tensor | None, x: Tensor, *cs: Tensor
) -> Tensor:
    """What bridges bring to a block: ``x + present * sum_b (c_b W_b^T + bias_b)``."""
    (y,) = plain(Weights(tuple(weights), tuple(biases), joined=True), cs)
    return x + (y if present is None else torch.where(present, y, 0))


def join_products_pass(graph: fx.Graph, parameters: set[fx.Node]) -> int:
    """Replace products with parameters by :func:`products` nodes, one for all that read the same stream.

    A weight that anything else reads keeps its own node, and so does a product whose result is changed in place.

    Numerics: exact (the same products), or reassociated where they are packed.

    Returns:
        the number of products found.
    """
    groups: dict[tuple[fx.Node, bool], list[tuple[fx.Node, fx.Node, fx.Node | None]]] = {}
    for node in graph.nodes:
        match = _match(node, parameters)
        if match is None:
            continue
        x, weight, bias, transposed = match
        # GPT-2's layout cannot be joined: each product stands alone.
        key = (node, True) if transposed else (x, False)
        groups.setdefault(key, []).append((node, weight, bias))
    for (_, transposed), members in groups.items():
        first = members[0][0]
        x = _x_of(first)
        with graph.inserting_before(first):
            weights, biases = tuple(w for _, w, _ in members), tuple(b for _, _, b in members)
            joined = graph.call_function(products, (transposed, weights, biases, x))
            parts = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(members))]
        for (node, _, _), part in zip(members, parts):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    return sum(len(m) for m in groups.values())


def _x_of(node: fx.Node) -> Any:
    """What a product multiplies with its weight."""
    return node.args[1 if node.target is aten.addmm.default else 0]


def _match(node: fx.Node, parameters: set[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """``(x, weight, bias, whether weight is [in, out])`` of a product with a parameter, or None."""
    if node.op != "call_function" or any(writes(u) for u in node.users):
        return None
    operands, args = None, cast("tuple[Any, ...]", node.args)
    if node.target is aten.linear.default and not node.kwargs:
        operands = args[0], args[1], args[2] if len(args) > 2 else None, False
    elif node.target is aten.addmm.default and not node.kwargs:
        operands = args[1], args[2], args[0], True
    if operands is None or operands[1] not in parameters or not (operands[2] is None or operands[2] in parameters):
        return None
    for p in (operands[1], operands[2]):
        if p is not None and not all(_multiplies(u, p) for u in p.users):
            return None
    return operands


def _multiplies(user: fx.Node, parameter: fx.Node) -> bool:
    """Whether a parameter is the weight or bias of a product here, and nothing else."""
    if user.target is aten.linear.default:
        return user.args[0] is not parameter
    if user.target is aten.addmm.default:
        return user.args[1] is not parameter
    return user.target in (products, land)
