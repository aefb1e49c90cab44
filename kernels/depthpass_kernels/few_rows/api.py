"""``few_rows_product`` and ``few_queries_attention``, as callers see them: argument checks, then the op."""

from __future__ import annotations

import torch
from torch import Tensor

from depthpass_kernels.few_rows.build import TYPES
from depthpass_kernels.few_rows.ops import few_queries_op, few_rows_op
from depthpass_kernels.few_rows.product import MOST


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of at most four rows, for inference on a CPU. Sums are float32, rounded once.

    Args:
        x: ``[..., in]`` with at most four rows, bfloat16 or float16.
        weight: ``[out, in]``, contiguous.
        bias: ``[out]``, contiguous.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        ValueError: operands that the product does not take, or gradients are wanted.
        RuntimeError: there is no compiler.
    """
    given = [t for t in (x, weight, bias) if t is not None]
    _check(given)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1] or not 0 < x.numel() <= MOST * x.shape[-1]:
        got = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"expected [..., in] with 1 to {MOST} rows and [out, in], got {got}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected a bias of {weight.shape[0]} entries, got {tuple(bias.shape)}")
    if not all(t.is_contiguous() for t in given[1:]):
        raise ValueError("expected a contiguous weight and bias")
    return few_rows_op(x, weight, bias)


def few_queries_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention of a few queries over the columns that they see, for inference on a CPU. Sums are float32.

    Args:
        q: ``[B, H, C, D]``, bfloat16 or float16; queries that share a head's keys are queries of one head.
        k, v: ``[B, H, N, D]`` and ``[B, H, N, Dv]`` in the same dtype.
        seen: ``[B or 1, 1, 1, N]``, boolean. A row that sees nothing gets NaN, as from a softmax.
        scale: of the logits.

    Returns:
        ``[B, H, C, Dv]``.

    Raises:
        ValueError: operands that it does not take, or gradients are wanted.
        RuntimeError: there is no compiler.
    """
    _check([q, k, v])
    fits = q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3]
    fits = fits and q.shape[3] == k.shape[3]
    if not fits or seen.dtype != torch.bool or list(seen.shape) not in ([b, 1, 1, k.shape[2]] for b in (1, q.shape[0])):
        raise ValueError(
            "expected q [B, H, C, D], k [B, H, N, D], v [B, H, N, Dv] and a boolean seen [B or 1, 1, 1, N], got "
            f"{[tuple(t.shape) for t in (q, k, v, seen)]} and {seen.dtype}"
        )
    return few_queries_op(q, k, v, seen, scale)


def _check(given: list[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ValueError("the products of few rows have no gradient; call them under torch.no_grad()")
    if any(t.device.type != "cpu" or t.dtype != given[0].dtype for t in given) or given[0].dtype not in TYPES:
        raise ValueError(f"expected CPU tensors of one half-precision dtype, got {[(t.device.type, t.dtype) for t in given]}")
