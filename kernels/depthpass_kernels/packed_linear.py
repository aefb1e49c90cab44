"""Products with a packed weight: several times faster on a CPU for a few dozen rows.

oneDNN's blocks, one Python call above its own ops, which Inductor takes for weights that are constants only; or float32
in panels (:mod:`depthpass_kernels.panels`) where those are faster.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from depthpass_kernels import panels
from depthpass_kernels.processor import onednn_leads
from depthpass_kernels.select import traced

SMALLEST = 1 << 15
"""Entries of a weight below which a packed product costs more in calls than it saves."""
_SMALLEST_IN_PANELS = 1 << 13

_LIBRARY = torch.library.Library("depthpass_kernels", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define("in_panels(Tensor weight) -> Tensor")
_LIBRARY.impl("in_panels", panels.in_panels, "CPU")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.is_mkldnn:
        return panels.panel_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


_LIBRARY.impl("packed_linear", _multiply, "CompositeExplicitAutograd")


@torch.library.register_fake("depthpass_kernels::packed_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("depthpass_kernels::in_panels", lib=_LIBRARY)
def _(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


packed_linear = torch.ops.depthpass_kernels.packed_linear.default
"""``x W^T + b`` with W ``[out, in]`` as :func:`pack` gives it where it packs."""


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:data:`packed_linear`, called without torch's dispatcher where nothing that it serves is about."""
    return packed_linear(x, weight, bias) if traced() or type(x) is not Tensor else _multiply(x, weight, bias)


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b`` from what :func:`pack` returns, W itself or packed."""
    return packed_linear(x, weight, bias) if blocked(x, weight) else F.linear(x, weight, bias)


def repays(x: Tensor, entries: int) -> bool:
    """Whether packing a weight of so many entries saves time where it is multiplied often; x like its operand."""
    if entries >= SMALLEST or entries < _SMALLEST_IN_PANELS:
        return entries >= SMALLEST
    return x.device.type == "cpu" and x.dtype == torch.float32 and panels.obstacle() is None


def pack(matrix: Tensor, x: Tensor) -> Tensor:
    """Return W as products with such rows read it best: packed, or as it is."""
    if not blocked(x, matrix):
        return matrix
    if x.dtype == torch.float32 and panels.obstacle() is None:
        return torch.ops.depthpass_kernels.in_panels.default(matrix)
    return torch.ops.mkldnn._reorder_linear_weight(matrix, x.numel() // x.shape[-1])


def blocked(x: Tensor, weight: Tensor) -> bool:
    """Whether these operands are multiplied from a packed weight."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16) or not x.numel():
        return False
    if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        # oneDNN packs half precision only for processors that multiply it (not for AVX2 alone).
        return x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    _say_unpacked()
    return False


@functools.cache
def _say_unpacked() -> None:
    logging.getLogger("depthpass").info(
        "products on the CPU do not pack their weights: this torch has no oneDNN, or it is switched off"
    )


def contraction(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a^T b`` of two matrices with the same, long, first dimension: a weight gradient."""
    small = a.numel() + b.numel() < SMALLEST or not blocked(a, b)
    leads = onednn_leads()
    if not small and (a.shape[1] > b.shape[1] if leads else a.shape[1] < b.shape[1]):
        return contraction(b, a).t()
    if small or not leads:
        # Where oneDNN has no lead, torch's own product is faster; with AVX2 the more so with the wider operand in front.
        return a.t() @ b
    # oneDNN copies the operand in front: the narrower one.
    return torch.ops.mkldnn._linear_pointwise(a.t(), b.t(), None, "none", [], "")
