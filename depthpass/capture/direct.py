"""Captured graphs called through torch's own functions instead of the op registry.

The registry's calling convention costs a microsecond per op, which is what a small op costs altogether; a decoded token
runs hundreds of them. The ops, their order and their results stay the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import fx
from torch._C._nn import gelu, linear, silu

aten = torch.ops.aten

FUNCTIONS: dict[object, Callable] = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.pow.Tensor_Scalar: torch.pow, aten.mean.dim: torch.mean, aten.rsqrt.default: torch.rsqrt,
    aten.neg.default: torch.neg, aten.cat.default: torch.cat, aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid, aten.linear.default: linear, aten.silu.default: silu,
    aten.gelu.default: gelu, aten.addmm.default: torch.addmm, aten.matmul.default: torch.matmul,
    aten.layer_norm.default: torch.layer_norm, aten.transpose.int: torch.transpose, aten.view.default: torch.Tensor.view,
    aten.reshape.default: torch.reshape, aten.unsqueeze.default: torch.unsqueeze, aten.to.dtype: torch.Tensor.to,
    aten.sym_size.int: torch.Tensor.size, aten.cos.default: torch.cos,
    aten.sin.default: torch.sin, aten.expand.default: torch.Tensor.expand, aten.embedding.default: torch.embedding,
    aten.square.default: torch.square,
}
"""Functions with the positional signature of the op they stand for."""

_DIRECT: weakref.WeakKeyDictionary[fx.GraphModule, Callable] = weakref.WeakKeyDictionary()


def direct(graph: fx.GraphModule) -> Callable:
    """The function that a captured graph computes, made once per graph; takes what the graph takes."""
    code = _DIRECT.get(graph)
    if code is None:
        code = _DIRECT[graph] = _rewritten(graph).forward
    return code


def _rewritten(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            node.target = _with_grad
        elif node.target is aten.slice.Tensor and _is_whole(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif not node.kwargs:
            node.target = FUNCTIONS.get(node.target, node.target)
    rewritten = fx.GraphModule(module, graph)
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule) and hasattr(rewritten, name):
            setattr(rewritten, name, _rewritten(child))
    return rewritten


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice takes everything."""
    given = dict(zip(("x", "dim", "start", "end", "step"), node.args), **node.kwargs)
    last = torch.iinfo(torch.int64).max
    usual = {"start": (0, None), "end": (last, None), "step": (1, None)}
    return all(not isinstance(given.get(n), fx.Node) and given.get(n) in values for n, values in usual.items())


def _with_grad(enabled: bool, graph: Callable, *args: object) -> object:
    with torch.set_grad_enabled(enabled):
        return graph(*args)
