"""Products of a few rows in half precision on a CPU: one pass over the weight, at the rate of memory.

A decoded token multiplies each weight with one row (or with one per stacked visit), which costs what reading the weight
costs. The libraries' bfloat16 product of one row reads it at half the rate that memory allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from depthpass_kernels.few_rows.build import TYPES, obstacle
from depthpass_kernels.few_rows.ops import few_rows_op
from depthpass_kernels.few_rows.pages import on_huge_pages
from depthpass_kernels.few_rows.product import MOST
from torch import Tensor, fx

from depthpass.log import fallback

aten = torch.ops.aten

LEAST = 1 << 14
"""Entries of a weight below which nothing is won."""


def few_rows_pass(gm: fx.GraphModule, weights: Iterable[Tensor] = ()) -> int:
    """Write ``x @ W^T`` as the product of few rows where x has few and W is a half-precision matrix on a CPU.

    Numerics: reassociated; sums are taken in float32 and rounded once, as the products do.

    Args:
        weights: what the graph will be given, put on huge pages if a product is replaced.

    Returns:
        how many products were replaced.
    """
    matches = {node: operands for node in gm.graph.nodes if (operands := _match(node)) is not None}
    for node, (bias, x, weight) in matches.items():
        if reason := obstacle(x.meta["val"].dtype):
            fallback(f"products of a decoded token are the library's, at half the speed: {reason}", asked=False)
            return 0
        with gm.graph.inserting_before(node):
            result = gm.graph.call_function(few_rows_op, (x, weight, bias))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    if matches:
        on_huge_pages(weights)
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return len(matches)


def _match(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """``(bias, x [rows, in], W [out, in])`` of a product that is to be written out, or None."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return None
    bias, x, back = (None, *node.args) if node.target is aten.mm.default else node.args
    if not isinstance(x, fx.Node) or not isinstance(back, fx.Node) or back.target is not aten.t.default:
        return None
    weight: Any = back.args[0]
    a, w = x.meta.get("val"), weight.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(w, Tensor) or a.device.type != "cpu" or not isinstance(a.shape[0], int):
        return None
    fits = a.dtype == w.dtype and a.dtype in TYPES and 0 < a.shape[0] <= MOST
    return (bias, x, weight) if fits and a.is_contiguous() and w.is_contiguous() and w.numel() >= LEAST else None
