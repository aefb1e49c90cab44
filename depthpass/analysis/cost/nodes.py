"""What one node of an ATen graph costs: matrix multiplies exactly, everything else by the element.

Conventions, the same as in ``torch.utils.flop_counter``: a multiply-add is two FLOPs; biases are free; a matrix
multiply ``[.., m, k] @ [k, n]`` is ``2*m*n*k``. Other arithmetic is counted apart and by the element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from torch import fx

aten = torch.ops.aten
Shape = tuple[sp.Expr, ...]
Shapes = Callable[[Any], Any]
"""Shape of an argument of a node; None when it has none (numbers, placeholders without a fake tensor)."""
Rule = Callable[[fx.Node, Shape, Shapes], sp.Expr]


def numel(shape: Shape) -> sp.Expr:
    return sp.Mul(*shape)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of a node, without fx's static types: an op's schema says what they are."""
    return node.args


def _last_of(position: int) -> Rule:
    """2 * output * K with K the last dimension of an operand."""
    def flops(node: fx.Node, out: Shape, shapes: Shapes) -> sp.Expr:
        return 2 * numel(out) * shapes(arguments(node)[position])[-1]

    return flops


def _linear(node: fx.Node, out: Shape, shapes: Shapes) -> sp.Expr:
    inner = shapes(arguments(node)[0]) or shapes(arguments(node)[1])
    return 2 * numel(out) * inner[-1]


def _grouped(node: fx.Node, out: Shape, shapes: Shapes) -> sp.Expr:
    left, right = (shapes(a) for a in arguments(node)[:2])
    # 2-D by 3-D: rows in groups, each by its own matrix. 2-D by 2-D: a batch of products over a ragged inner size.
    return 2 * left[-2] * left[-1] * right[-1]


def _convolution(node: fx.Node, out: Shape, shapes: Shapes) -> sp.Expr:
    weight = shapes(arguments(node)[1])
    return 2 * numel(out) * numel(weight[1:])


def _einsum(node: fx.Node, out: Shape, shapes: Shapes) -> sp.Expr:
    equation, operands = arguments(node)[:2]
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != len(operands) or "..." in equation or len(terms) > 2:
        raise KeyError(equation)
    sizes = {c: d for term, o in zip(terms, operands) for c, d in zip(term, shapes(o))}
    return (2 if len(terms) == 2 else 1) * sp.Mul(*sizes.values())


MATMULS: dict[object, Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _last_of(0),
    aten.mm.default: _last_of(0),
    aten.bmm.default: _last_of(0),
    aten.mv.default: _last_of(0),
    aten.dot.default: lambda node, out, shapes: 2 * numel(shapes(node.args[0])),
    aten.addmm.default: _last_of(1),
    aten.baddbmm.default: _last_of(1),
    aten.einsum.default: _einsum,
    aten._grouped_mm.default: _grouped,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.convolution.default: _convolution,
}
"""FLOPs of a node by op; reads the shapes of the result and of its arguments."""

SDPA = {
    aten.scaled_dot_product_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""Fused attention ops ``(q, k, v, ..)`` with ``[B, H, tokens, D]`` operands."""

PER_ELEMENT = {
    # Composite ops, by the primitive operations they stand for.
    "softmax": 5, "_softmax": 5, "log_softmax": 5, "_log_softmax": 5,
    "layer_norm": 8, "native_layer_norm": 8, "rms_norm": 5, "_fused_rms_norm": 5,
    # Reductions: one per element read.
    "mean": 1, "sum": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "prod": 1, "var": 3, "std": 3, "var_mean": 3,
    "cumsum": 1, "logsumexp": 3, "norm": 2, "linalg_vector_norm": 2, "cross_entropy_loss": 6, "nll_loss": 1,
    "nll_loss_nd": 1,
}
"""Operations per element of the first argument, for ops that are not plainly one per element of the result."""

MOVEMENT = frozenset((
    "view", "reshape", "_unsafe_view", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "slice",
    "select", "index", "gather", "scatter", "scatter_add", "index_add", "index_put", "embedding", "cat", "stack",
    "split", "split_with_sizes", "chunk", "narrow", "clone", "contiguous", "copy", "alias", "detach", "to",
    "_to_copy", "type_as", "flatten", "unflatten", "unbind", "repeat", "repeat_interleave", "pad", "constant_pad_nd",
    "roll", "flip", "masked_fill", "masked_scatter", "where", "zeros", "ones", "full", "empty", "arange",
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "scalar_tensor", "sym_size", "sym_numel", "item", "topk", "sort", "argmax", "argmin", "one_hot", "histc",
    "bincount", "dropout", "diff", "nonzero", "tril", "triu", "expand_as", "view_as", "index_select",
    "lift_fresh_copy", "lift_fresh", "as_strided", "movedim", "numel", "_assert_tensor_metadata", "_assert_scalar",
    "_assert_async", "sym_constrain_range_for_size", "sym_constrain_range", "meshgrid", "eye", "all", "any", "mT",
    "mH", "T", "H", "numpy_T", "adjoint", "is_nonzero", "floor_divide", "outer_index", "isin", "unfold", "fill_",
    "searchsorted", "view_as_real", "view_as_complex", "scatter_",
))
"""Ops that move or choose data: no FLOPs."""


def op_name(node: fx.Node) -> str:
    """Name of an ATen op without namespace and overload, or of a Python function."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def elementwise_flops(node: fx.Node, out: Shape, shapes: Shapes) -> sp.Expr | None:
    """Arithmetic of a node that is no matrix multiply; 0 for data movement, None when the op is not known."""
    name = op_name(node)
    value = node.meta.get("val")
    if name in PER_ELEMENT:
        first = next((shapes(a) for a in node.all_input_nodes if shapes(a) is not None), out)
        return PER_ELEMENT[name] * numel(first)
    if name in MOVEMENT or not isinstance(node.target, torch._ops.OpOverload):
        return sp.Integer(0)
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return sp.Integer(0)
    if torch.Tag.pointwise in node.target.tags:
        return numel(out)
    return None


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node belongs to, or an empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values())) if not path.startswith("_")), "")


def itemsize(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.element_size() if isinstance(value, torch.Tensor) else 0
