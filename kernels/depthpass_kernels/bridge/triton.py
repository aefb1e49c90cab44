"""The bridge entry as Triton kernels: up-projection with everything around it, norm, norm backward.

Imported only when a kernel runs. Accumulation in float32, no atomics.

Split. A norm needs whole rows, the projection wants many small tiles: one program per row block would leave
most of the GPU idle at 100 to 200 rows. So the projection's epilogue masks, scales, adds bias and residual,
stores y and one partial sum of squares per tile and row; a second kernel adds those few numbers, stores rstd
and scales the row. Backward: the norm and the residual add are one kernel, the projection's three products go
to the BLAS.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (a kernel's constexpr arguments are plain values to its caller, which triton's types do not say)

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthpass_kernels.bridge.problem import BridgeIn
from depthpass_kernels.launch import Launch, Tile, cdiv, power_of_two
from depthpass_kernels.operands import accumulation_dtype

MAX_PARTIALS = 64


@triton.jit(do_not_specialize=["rows"])
def up_kernel(
    X, C, W, BIAS, PRESENT, Y, SQUARES, gain, rows,
    DIM: tl.constexpr, RANK: tl.constexpr, TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """y = x + present * (gain * c Wᵀ + bias) for one tile, and its partial sums of squares per row."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside, columns, row = m < rows, n < DIM, m.to(tl.int64)
    present = inside
    if PRESENT is not None:
        present = present & (tl.load(PRESENT + m, inside, 0) != 0)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, RANK, BK):
        k = start + tl.arange(0, BK)
        c = tl.load(C + row[:, None] * RANK + k[None, :], present[:, None] & (k < RANK)[None, :], 0.0)
        w = tl.load(W + n[:, None] * RANK + k[None, :], columns[:, None] & (k < RANK)[None, :], 0.0)
        if UP:
            c, w = c.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(c, tl.trans(w), acc, input_precision="ieee")
    acc *= gain
    if BIAS is not None:
        acc += tl.load(BIAS + n, columns, 0.0).to(tl.float32)[None, :]
    at, mask = row[:, None] * DIM + n[None, :], inside[:, None] & columns[None, :]
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    y = (x + tl.where(present[:, None], acc, 0.0)).to(Y.dtype.element_ty)
    tl.store(Y + at, y, mask)
    if SQUARES is not None:
        wide = tl.where(mask, y.to(tl.float32), 0.0)
        tl.store(SQUARES + row * TILES + tl.program_id(1), tl.sum(wide * wide, 1), inside)


@triton.jit
def norm_kernel(
    Y, SQUARES, W, Z, RSTD, eps, offset,
    DIM: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """z = y * rstd * (offset + w) for one row, with rstd from the partial sums of squares."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BT)
    rstd = tl.rsqrt(tl.sum(tl.load(SQUARES + row * TILES + t, t < TILES, 0.0), 0) / DIM + eps)
    tl.store(RSTD + row, rstd)
    for start in range(0, DIM, BN):
        n = start + tl.arange(0, BN)
        y = tl.load(Y + row * DIM + n, n < DIM, 0.0).to(tl.float32)
        w = tl.load(W + n, n < DIM, 0.0).to(tl.float32) + offset
        tl.store(Z + row * DIM + n, (y * rstd * w).to(Z.dtype.element_ty), n < DIM)


@triton.jit(do_not_specialize=["rows", "per_program"])
def norm_backward_kernel(
    GRAD_Y, GRAD_Z, Y, RSTD, W, DY, PARTIAL, offset, rows, per_program, DIM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient of y: the norm's plus the residual's; one partial norm-weight gradient per program."""
    program = tl.program_id(0)
    n = tl.arange(0, BD)
    columns = n < DIM
    w = tl.load(W + n, columns, 0.0).to(tl.float32) + offset
    acc = tl.zeros((BD,), tl.float32)
    first = program * per_program
    for m in range(first, tl.minimum(first + per_program, rows)):
        at = tl.full((), DIM, tl.int64) * m + n
        rstd = tl.load(RSTD + m)
        unit = tl.load(Y + at, columns, 0.0).to(tl.float32) * rstd
        grad = tl.load(GRAD_Z + at, columns, 0.0).to(tl.float32)
        acc += grad * unit
        grad *= w
        dy = rstd * (grad - unit * (tl.sum(grad * unit, 0) / DIM))
        if GRAD_Y is not None:
            dy += tl.load(GRAD_Y + at, columns, 0.0).to(tl.float32)
        tl.store(DY + at, dy.to(DY.dtype.element_ty), columns)
    tl.store(PARTIAL + program.to(tl.int64) * DIM + n, acc, columns)


def forward(problem: BridgeIn) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, z and rstd; the last two empty without a norm."""
    y, z, rstd = problem.new_outputs()
    for launch in plan_forward(problem, y, z, rstd):
        launch.run()
    return y, z, rstd


def norm_backward(
    problem: BridgeIn, grad_y: Tensor | None, grad_z: Tensor | None, y: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of y through both outputs (new, x's dtype) and the norm weight's, if any."""
    p = problem
    if p.norm_weight is None or grad_z is None:
        dnorm = None if p.norm_weight is None else torch.zeros_like(p.norm_weight)
        return (
            torch.zeros_like(y) if grad_y is None else grad_y.clone(memory_format=torch.contiguous_format)
        ), dnorm
    dy, dim = torch.empty_like(y), y.shape[-1]
    partial = rstd.new_empty(min(y.numel() // dim, MAX_PARTIALS), dim)
    plan_norm_backward(p, grad_y, grad_z, y, rstd, dy, partial).run()
    return dy, partial.sum(0)


def plan_forward(problem: BridgeIn, y: Tensor, z: Tensor, rstd: Tensor) -> list[Launch]:
    """Return the launches of the forward, in order: the projection, then the norm if there is one."""
    p = problem
    dim, rank = p.weight.shape
    rows = p.x.numel() // dim
    tile, depth = up_tile(rows, p.c.element_size())
    tiles = cdiv(dim, tile.n)
    normed = p.norm_weight is not None
    squares = (
        torch.empty(rows, tiles, dtype=accumulation_dtype(p.x.dtype), device=p.x.device) if normed else None
    )
    args = dict(
        X=p.x.contiguous(), C=p.c.contiguous(), W=p.weight.contiguous(), BIAS=p.bias,
        PRESENT=None if p.present is None else p.present.contiguous().view(torch.uint8),
        Y=y, SQUARES=squares, gain=p.gain, rows=rows, DIM=dim, RANK=rank, TILES=tiles,
        BM=tile.m, BN=tile.n, BK=min(depth, power_of_two(rank)),
        UP=triton.knobs.runtime.interpret or p.c.dtype != p.weight.dtype,
    )  # fmt: skip
    launches = [Launch(up_kernel, (cdiv(rows, tile.m), tiles), args, tile)]
    if normed:
        args = dict(
            Y=y, SQUARES=squares, W=p.norm_weight, Z=z, RSTD=rstd, eps=p.eps, offset=p.norm_offset,
            DIM=dim, TILES=tiles, BT=power_of_two(tiles), BN=min(1024, power_of_two(dim)),
        )  # fmt: skip
        launches.append(Launch(norm_kernel, (rows,), args, Tile(1, args["BN"], warps=4, stages=2)))
    return launches


def plan_norm_backward(
    problem: BridgeIn,
    grad_y: Tensor | None,
    grad_z: Tensor,
    y: Tensor,
    rstd: Tensor,
    dy: Tensor,
    partial: Tensor,
) -> Launch:
    """Return the one launch of the norm's backward; `partial` has one row per program."""
    dim = y.shape[-1]
    rows = y.numel() // dim
    args = dict(
        GRAD_Y=None if grad_y is None else grad_y.contiguous(), GRAD_Z=grad_z.contiguous(), Y=y, RSTD=rstd,
        W=problem.norm_weight, DY=dy, PARTIAL=partial, offset=problem.norm_offset, rows=rows,
        per_program=cdiv(rows, partial.shape[0]), DIM=dim, BD=power_of_two(dim),
    )  # fmt: skip
    warps = 4 if dim <= 2048 else 8 if dim <= 8192 else 16
    return Launch(norm_backward_kernel, (partial.shape[0],), args, Tile(1, args["BD"], warps=warps, stages=1))


def up_tile(rows: int, itemsize: int) -> tuple[Tile, int]:
    """Return the projection's tile and its depth along the rank: rows are few, so tiles are small."""
    if itemsize == 4:
        return Tile(min(32, power_of_two(rows)), 32, warps=4, stages=1), 32
    return Tile(min(64, power_of_two(rows)), 64, warps=4, stages=2), 64
