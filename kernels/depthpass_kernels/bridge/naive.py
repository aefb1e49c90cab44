"""The bridge in plain torch: the reference of the kernel, and what runs on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from depthpass_kernels.bridge.problem import BridgeIn
from depthpass_kernels.operands import accumulation_dtype


def forward(problem: BridgeIn) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, z and rstd; differentiable as it stands. The norm reads y after its rounding to x's dtype."""
    p = problem
    acc = accumulation_dtype(p.x.dtype)
    added = p.gain * (_masked(p.c, p.present).to(acc) @ p.weight.to(acc).mT)
    if p.bias is not None:
        added = added + p.bias.to(acc)
    y = (p.x.to(acc) + _masked(added, p.present)).to(p.x.dtype)
    if p.norm_weight is None:
        return y, p.x.new_empty(0), p.x.new_empty(0, dtype=acc)
    wide = y.to(acc)
    rstd = torch.rsqrt(wide.square().mean(-1) + p.eps)
    z = wide * rstd[..., None] * (p.norm_offset + p.norm_weight.to(acc))
    return y, z.to(p.x.dtype), rstd


def norm_backward(
    problem: BridgeIn, grad_y: Tensor | None, grad_z: Tensor | None, y: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of y through both outputs (new, x's dtype) and the norm weight's, if any."""
    p = problem
    acc = accumulation_dtype(p.x.dtype)
    if p.norm_weight is None or grad_z is None:
        dnorm = None if p.norm_weight is None else p.norm_weight.new_zeros(p.norm_weight.shape, dtype=acc)
        return (torch.zeros_like(y) if grad_y is None else torch.clone(grad_y).contiguous()), dnorm
    unit = y.to(acc) * rstd[..., None]
    grad_z = grad_z.to(acc)
    scaled = grad_z * (p.norm_offset + p.norm_weight.to(acc))
    dy = rstd[..., None] * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    if grad_y is not None:
        dy = dy + grad_y.to(acc)
    return dy.to(p.x.dtype), (grad_z * unit).flatten(0, -2).sum(0)


def projection_backward(
    problem: BridgeIn, dy: Tensor, dnorm: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dc, dweight, dbias, dnorm_weight in their parameters' dtypes, from the whole gradient of y.

    Three products that a BLAS does well, in the dtype of the operands. The presence mask is put on their
    rank-r side, never on a hidden-sized tensor.
    """
    p = problem
    dx, dc, dweight, dbias, dnorm_weight = p.new_gradients(needed)
    need_x, need_c, need_weight, need_bias, need_norm = needed
    if need_x:
        dx = dy
    if need_c:
        dc.copy_(_masked(p.gain * (dy @ p.weight.to(dy.dtype)), p.present))
    rows = dy.flatten(0, -2)
    if need_weight:
        stream = _masked(p.c, p.present).flatten(0, -2).to(dy.dtype)
        dweight.copy_(p.gain * (rows.mT @ stream))
    if need_bias:
        wide = rows.to(accumulation_dtype(dy.dtype))
        dbias.copy_(wide.sum(0) if p.present is None else p.present.flatten().to(wide.dtype) @ wide)
    if need_norm and dnorm is not None:
        dnorm_weight.copy_(dnorm)
    return dx, dc, dweight, dbias, dnorm_weight


def _masked(x: Tensor, present: Tensor | None) -> Tensor:
    """Zero the absent rows by selection: a delay line may hold NaN before its first write."""
    return x if present is None else torch.where(present[..., None], x, 0)
