"""Products of a few rows in half precision on a CPU, written out so that the compiler makes its own loop of them.

A decoded token multiplies each weight with one row (or with one per stacked visit), which costs what reading the weight
costs. The libraries' bfloat16 product of one row reads it at half the rate that memory allows; the plain reduction below,
compiled, reads it at the full one, once for all rows, and needs no packed copy of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

MOST = 4
"""Rows up to which one pass over the weight serves them all."""
LEAST = 1 << 14
"""Entries of a weight below which nothing is won."""


def few_rows_pass(gm: fx.GraphModule) -> int:
    """Write ``x @ W^T`` out as ``sum(x W)`` where x has few rows and W is a half-precision matrix on a CPU.

    Numerics: reassociated; sums are taken in float32 and rounded once, as the products do.

    Returns:
        how many products were written out.
    """
    count = 0
    for node in list(gm.graph.nodes):
        operands = _match(node)
        if operands is None:
            continue
        bias, x, weight = operands
        rows, dtype = x.meta["val"].shape[0], x.meta["val"].dtype
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function
            # A value of its own: worked out once, and not again for every row of the weight.
            shape = tuple(x.meta["val"].shape)
            x = call(aten.as_strided.default, (x, shape, (shape[1], 1)))
            wide = call(aten._to_copy.default, (weight,), {"dtype": torch.float32})
            sums = []
            for i in range(rows):
                row = call(aten._to_copy.default, (call(aten.select.int, (x, 0, i)),), {"dtype": torch.float32})
                sums.append(call(aten.sum.dim_IntList, (call(aten.mul.Tensor, (wide, row)), [-1])))
            y = call(aten.stack.default, (sums,))
            if bias is not None:
                y = call(aten.add.Tensor, (y, bias))
            result = call(aten._to_copy.default, (y,), {"dtype": dtype})
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
        count += 1
    if count:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return count


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
    fits = a.dtype == w.dtype and a.dtype in (torch.bfloat16, torch.float16) and 0 < a.shape[0] <= MOST
    return (bias, x, weight) if fits and a.is_contiguous() and w.is_contiguous() and w.numel() >= LEAST else None
