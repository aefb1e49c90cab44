"""A product of a few rows with one large half-precision weight on a CPU, outside of any compiled graph: a model's head."""

from __future__ import annotations

import torch
from depthpass_kernels.few_rows.api import few_rows_product
from depthpass_kernels.few_rows.build import TYPES, obstacle
from depthpass_kernels.few_rows.product import MOST
from torch import Tensor

LEAST = 1 << 20
"""Entries of a weight below which stock code's own product does as well."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x W^T + b`` where the operands :func:`fits`, else None."""
    return few_rows_product(x, weight, bias) if fits(x, weight, bias) and obstacle(x.dtype) is None else None


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product is bound by reading its weight, and the library reads it at half the rate of memory."""
    given = (weight,) if bias is None else (weight, bias)
    return (
        not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in TYPES
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == x.dtype and t.device == x.device for t in given)
        and weight.dim() == 2 and all(t.is_contiguous() for t in given) and weight.numel() >= LEAST
        and 0 < x.numel() <= MOST * x.shape[-1] and not torch.is_autocast_enabled("cpu")
        and not any(t.is_inference() and not torch.is_inference_mode_enabled() for t in (x, *given))
    )
