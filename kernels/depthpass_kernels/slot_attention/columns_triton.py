"""Two copies between strided tensors as one Triton kernel."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (a kernel's constexpr arguments are plain values to its caller, which triton's types do not say)

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from depthpass_kernels.launch import Launch, Tile, cdiv, power_of_two

ROWS = 16
"""Vectors of one head and column that a program copies."""


@triton.jit
def _copy(TO, FROM, b, h, c, inside, t_b, t_h, t_c, f_b, f_h, f_c, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    mask = inside[:, None] & (d < D)[None, :]
    x = tl.load(FROM + (b * f_b + h * f_h + c * f_c)[:, None] + d[None, :], mask, 0.0)
    tl.store(TO + (b * t_b + h * t_h + c * t_c)[:, None] + d[None, :], x.to(TO.dtype.element_ty), mask)


@triton.jit
def copy_kernel(
    K_TO, K, V_TO, V, rows, heads, length,
    kt_b, kt_h, kt_c, k_b, k_h, k_c, vt_b, vt_h, vt_c, v_b, v_h, v_c,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Some keys, or as many values: the second axis of the grid says which."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside, c, pair = r < rows, (r % length).to(tl.int64), r // length
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    if tl.program_id(1) == 0:
        _copy(K_TO, K, b, h, c, inside, kt_b, kt_h, kt_c, k_b, k_h, k_c, D, BD)
    else:
        _copy(V_TO, V, b, h, c, inside, vt_b, vt_h, vt_c, v_b, v_h, v_c, DV, BDV)


def plan(to: Sequence[Tensor], source: Sequence[Tensor]) -> Launch:
    """Return the launch that copies keys and values."""
    (k_to, v_to), (k, v) = to, source
    batch, heads, length, width = k.shape
    rows = batch * heads * length
    args = dict(
        K_TO=k_to, K=k, V_TO=v_to, V=v, rows=rows, heads=heads, length=length,
        D=width, DV=v.shape[-1], BD=power_of_two(width), BDV=power_of_two(v.shape[-1]), BR=ROWS,
    )  # fmt: skip
    for name, x in (("kt", k_to), ("k", k), ("vt", v_to), ("v", v)):
        args |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("bhc")}
    return Launch(copy_kernel, (cdiv(rows, ROWS), 2), args, Tile(ROWS, width, warps=4, stages=1))
