"""A product of a few rows with one large half-precision weight on a CPU, outside of any compiled graph: a model's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from depthpass.log import working
from depthpass_lowering.fx_passes.few_rows import MOST, few_rows_pass

LEAST = 1 << 20
"""Entries of a weight below which a product is not worth a compilation of its own."""

_MADE: dict[tuple, Callable[..., Any]] = {}


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product is bound by reading its weight, and the library reads it at half the rate of memory."""
    given = (weight,) if bias is None else (weight, bias)
    return (
        not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == x.dtype and t.device == x.device for t in given)
        and weight.dim() == 2 and all(t.is_contiguous() for t in given) and weight.numel() >= LEAST
        and 0 < x.numel() <= MOST * x.shape[-1] and not torch.is_autocast_enabled("cpu")
        and not any(t.is_inference() and not torch.is_inference_mode_enabled() for t in (x, *given))
    )


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for operands that :func:`fits`; compiled once per shape. Sums are float32, rounded once.

    Args:
        x: ``[..., in]``, at most four rows.
        weight: ``[out, in]``.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    inputs = [flat, weight, *(() if bias is None else (bias,))]
    key = (x.dtype, bias is None, flat.shape, weight.shape, torch.is_inference_mode_enabled(), torch.get_num_threads())
    run = _MADE.get(key)
    if run is None:
        with working(f"compiling a product with a weight of {weight.shape[0]} rows"):
            graph = make_fx(lambda *given: [F.linear(*given)], tracing_mode="fake")(*inputs)
            few_rows_pass(graph)
            run = _MADE[key] = cast(Any, torch._inductor).compile(graph, inputs)
    return run(*inputs)[0].view(*x.shape[:-1], weight.shape[0])
