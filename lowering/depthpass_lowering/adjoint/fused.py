"""Norms and rotary embeddings as one node each, whose backward passes have short formulas."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depthpass_lowering.adjoint.reverse import layout
from depthpass_lowering.fx_passes.products import land, products
from depthpass_lowering.fx_passes.region import delayed, present

aten = torch.ops.aten
LAST = torch.iinfo(torch.int64).max


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""
    n = x * torch.rsqrt(x.pow(2).mean(-1, True) + eps)
    return n if weight is None else weight * n


def rope(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """``x cos + rotated(x) sin`` with rotated(x) = (-second half, first half) of the last axis of size ``2 half``."""
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def fuse_pass(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    """Drop casts that change nothing, and put :func:`rms` and :func:`rope` in place of their parts.

    Numerics: exact up to the order of a product's factors.

    Args:
        dtype: of the streams.
    """
    for node in list(gm.graph.nodes):
        node.meta["dtype"] = _dtype(node, dtype)
        if not _casts(node):
            continue
        source: Any = node.args[0]
        if "layout" not in source.meta:
            # What stands between blocks has no example value; its reader's has its shape.
            known = layout(node)
            source.meta["layout"] = None if known is None else (known[0], source.meta["dtype"])
        if node.meta["dtype"] is not None and source.meta["dtype"] == node.meta["dtype"]:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if node.target is aten.rsqrt.default and (dtype != torch.float64 or node.meta["dtype"] == dtype):
            # A norm in float32 inside a float64 model stays as it is: another formula would differ by float32's rounding.
            _norm(gm.graph, node)
        elif node.target is aten.add.Tensor:
            _rotation(gm.graph, node)
    gm.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or (n.op == "call_function" and not _droppable(n)))
    gm.graph.lint()


def fold_gains_pass(graph: fx.Graph, active: set[fx.Node], params: Sequence[fx.Node], dtype: torch.dtype) -> int:
    """Take the gain of a norm into the weights of the products that read it: ``(s * gain) W^T = s (W * gain)^T``.

    The gain's gradient is then a column sum over the weights' gradients, taken once behind the loop. Where a part of the
    weights is frozen it would need gradients that nobody asks for, and the norm stays as it is; likewise in half precision,
    where the product of gain and weight would be rounded.

    Numerics: reassociated.

    Args:
        active: inputs that have a gradient; params: inputs that are parameters.

    Returns:
        how many gains were taken in.
    """
    count = 0
    if dtype not in (torch.float32, torch.float64):
        return count
    for node in graph.nodes:
        if node.target is not rms or node.args[1] not in params:
            continue
        x, gain, eps = node.args
        users = list(node.users)
        if not all(u.target is products and u.args[3] is node and len(u.args) == 4 for u in users):
            continue
        trained = [{w in active for w in u.args[1]} for u in users]
        if any(len(t) != 1 for t in trained) or (gain in active and any(t != {True} for t in trained)):
            continue
        node.args = (x, None, eps)
        for u in users:
            u.args = (*u.args, gain)
        count += 1
    return count


_PARTS = frozenset({
    aten.pow.Tensor_Scalar, aten.square.default, aten.mean.dim, aten.add.Tensor, aten.rsqrt.default, aten.mul.Tensor,
    aten.slice.Tensor, aten.neg.default, aten.cat.default,
})


def _droppable(n: fx.Node) -> bool:
    return n.target in _PARTS


def _dtype(n: fx.Node, streams: torch.dtype) -> torch.dtype | None:
    """The dtype of a node's value; None = not certain."""
    value = n.meta.get("val")
    if isinstance(value, Tensor):
        return value.dtype
    if n.op == "placeholder":
        return streams if n.name.startswith("stream_") else None
    if n.target is delayed:
        return streams
    if n.target in (land, present, operator.add):
        of = {a.meta.get("dtype") for a in n.all_input_nodes if a.op == "call_function" or a.name.startswith("stream_")}
        return of.pop() if len(of) == 1 else None
    return None


def _casts(n: fx.Node) -> bool:
    return n.target is aten.to.dtype and len(n.args) == 2 and not n.kwargs


def _only(n: Any, targets: tuple, users: int = 1) -> bool:
    return isinstance(n, fx.Node) and n.target in targets and len(n.users) == users


def _norm(graph: fx.Graph, root: fx.Node) -> None:
    """``rsqrt(mean(x^2) + eps)`` and what multiplies with it."""
    total: Any = root.args[0]
    if len(root.users) != 1 or not _only(total, (aten.add.Tensor,)) or total.kwargs or not isinstance(total.args[1], float):
        return
    mean, eps = total.args
    if not _only(mean, (aten.mean.dim,)) or mean.kwargs or list(mean.args[1]) != [-1] or mean.args[2:] != (True,):
        return
    square = mean.args[0]
    if not (_only(square, (aten.square.default,)) or (_only(square, (aten.pow.Tensor_Scalar,)) and square.args[1] == 2)):
        return
    x, (scaled,) = square.args[0], root.users
    if scaled.target is not aten.mul.Tensor or scaled.kwargs or set(scaled.args) != {x, root}:
        return
    if len({n.meta["dtype"] for n in (x, mean, root, scaled)}) != 1:
        return
    weight, last = None, scaled
    if len(scaled.users) == 1:
        (user,) = scaled.users
        if user.target is aten.mul.Tensor and not user.kwargs and user.meta["dtype"] == scaled.meta["dtype"]:
            other: Any = next((a for a in user.args if a is not scaled), None)
            value = other.meta.get("val") if isinstance(other, fx.Node) else None
            if isinstance(value, Tensor) and value.dim() == 1 and value.dtype == scaled.meta["dtype"]:
                weight, last = other, user
    _replace(graph, last, rms, (x, weight, eps))


def _rotation(graph: fx.Graph, node: fx.Node) -> None:
    """``x cos + cat(-x[half:], x[:half]) sin``."""
    if node.kwargs or len(node.args) != 2:
        return
    both: Any = node.args
    for straight, turned in (both, both[::-1]):
        if not (_only(straight, (aten.mul.Tensor,)) and _only(turned, (aten.mul.Tensor,))):
            continue
        for whole, sin in (turned.args, turned.args[::-1]):
            halves = _halves(whole)
            if halves is None or halves[0] not in straight.args or not isinstance(sin, fx.Node):
                continue
            x, half = halves
            cos = next((a for a in straight.args if a is not x), None)
            same = isinstance(cos, fx.Node) and node.meta["dtype"] == x.meta["dtype"] == cos.meta["dtype"] == sin.meta["dtype"]
            if same:
                _replace(graph, node, rope, (x, cos, sin, half))
                return


def _halves(n: Any) -> tuple[fx.Node, int] | None:
    """``(x, half)`` of ``cat(-x[half:], x[:half])`` along the last axis, or None."""
    if not _only(n, (aten.cat.default,)) or len(n.args[0]) != 2 or n.args[1:] not in ((-1,), (3,)):
        return None
    minus, first = n.args[0]
    if not _only(minus, (aten.neg.default,)) or not _only(minus.args[0], (aten.slice.Tensor,)):
        return None
    second = minus.args[0]
    if not _only(first, (aten.slice.Tensor,)) or first.args[0] is not second.args[0]:
        return None
    x = first.args[0]
    value = x.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(value.shape[-1], int):
        return None
    axis, half = value.dim() - 1, value.shape[-1] // 2
    if n.args[1] not in (-1, axis) or 2 * half != value.shape[-1]:
        return None
    ends = (LAST, 2 * half)
    if first.args[1:] not in ((axis, 0, half), (-1, 0, half)) or second.args[1] not in (axis, -1):
        return None
    if second.args[2] != half or (len(second.args) > 3 and second.args[3] not in ends) or len(second.args) > 4:
        return None
    return x, half


def _replace(graph: fx.Graph, node: fx.Node, target, args: tuple) -> None:
    with graph.inserting_before(node):
        replacement = graph.call_function(target, args)
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
