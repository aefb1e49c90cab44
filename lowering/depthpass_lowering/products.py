"""Matrix products of a token loop: the same few weights, many times, with few rows each.

On a CPU such a product is bound by how its weight is read. oneDNN multiplies weights packed in its own blocked format
several times faster than a plain product of a few dozen rows, and a loop of many chunks repays the packing. Packed copies
live as long as the pass over the chunks that reads them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1 << 15
"""Entries of a weight below which a packed product costs more in calls than it saves."""
LEAST_USES = 4
"""Products with one weight that repay packing it."""


class Products:
    """Products with the weights of one loop.

    Args:
        uses: how often the loop multiplies each weight.
    """

    def __init__(self, uses: int = 0):
        self.uses = uses
        self._packed: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b`` without gradient: x ``[..., in]``, weight ``[out, in]``."""
        if not self._pays(x, weight):
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._pack(weight, False, x), bias, "none", [], "")

    def transposed(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W + b`` without gradient: x ``[..., in]``, weight ``[in, out]``."""
        if not self._pays(x, weight):
            return F.linear(x, weight.t(), bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._pack(weight, True, x), bias, "none", [], "")

    def forget(self) -> None:
        """Free the packed weights."""
        self._packed.clear()

    def _pays(self, x: Tensor, weight: Tensor) -> bool:
        return self.uses >= LEAST_USES and weight.numel() >= SMALLEST and packs(x, weight)

    def _pack(self, weight: Tensor, transposed: bool, x: Tensor) -> Tensor:
        key = (id(weight), transposed)
        held = self._packed.get(key)
        if held is None:
            rows = x.numel() // x.shape[-1]
            plain = weight.detach().t() if transposed else weight.detach()
            # The weight is kept as well: its id must not be given to another tensor.
            held = self._packed[key] = weight, torch.ops.mkldnn._reorder_linear_weight(plain, rows)
        return held[1]


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can multiply these operands from a packed weight."""
    return (
        x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and x.numel() > 0
    )


def contraction(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of two matrices with the same, long, first dimension: a weight gradient."""
    if a.numel() + b.numel() < SMALLEST or not packs(a, b):
        return a.t() @ b
    return torch.ops.mkldnn._linear_pointwise(a.t(), b.t(), None, "none", [], "")
