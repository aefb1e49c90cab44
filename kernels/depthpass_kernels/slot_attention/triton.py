"""Slot attention as Triton kernels: forward (with split keys), dq, dk/dv.

Imported only when a kernel runs. All accumulation is in float32, nothing uses atomics, so results repeat bit
for bit.

Layout. A program owns one (row, key head) pair and a tile of its *packed* queries: packed row `r` is query `r
// G` of head `r % G` in the group, so a chunk of 4 queries with 8 heads per key head fills a 32-row tile, and
the rows of a tile are in column order. Query column i sees the keys of one interval, `first(i) <= j <= i`,
minus the invalid ones: window and chunk only move `first`. Both ends rise with i, which gives the key blocks
(or query tiles) a program must visit.

`UP` makes every operand float32 after its load. The interpreter needs it: numpy has no bfloat16 arithmetic.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (a kernel's constexpr arguments are plain values to its caller, which triton's types do not say)

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthpass_kernels.launch import Launch, Tile, cdiv, power_of_two
from depthpass_kernels.operands import unit_stride
from depthpass_kernels.slot_attention.naive import sink_gradient
from depthpass_kernels.slot_attention.problem import Problem
from depthpass_kernels.slot_attention.tile_parts import (
    LN2,
    LOG2E,
    NEVER,
    _first_key,
    _last_query,
    _live_keys,
    _load,
    _logits,
    _origin,
    _program,
    _query_start,
    _share,
    _slope,
    _store,
)
from depthpass_kernels.slot_attention.tiles import dkv_tile, dq_tile, forward_tile, key_splits

VARYING = ["q_start", "length", "n_keys"]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    Q, K, V, OUT, LSE, VALID, ROW_START, SINKS, Q_OFFSET,
    q_start, scale, key_heads, length, n_keys,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n, o_s, o_b, o_h, o_c, lse_s, valid_b,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one query tile over one of SPLITS shares of its key blocks."""
    tile, pair = _program(tl.cdiv(length * G, BM))
    split = tl.program_id(1)
    row, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    q_start = _query_start(Q_OFFSET, q_start)
    origin = _origin(ROW_START, row, CHUNK)
    if VALID is not None:
        VALID += row * valid_b
    r = tile * BM + tl.arange(0, BM)
    c, head = r // G, key_head * G + r % G
    inside = c < length
    i = q_start + c
    first = _first_key(i, origin, WINDOW, CHUNK)
    low = tl.maximum(_first_key(q_start + tile * BM // G, origin, WINDOW, CHUNK), 0)
    high = tl.minimum(q_start + tl.minimum((tile * BM + BM - 1) // G, length - 1) + 1, n_keys)
    begin, end = _share(low, high, split, SPLITS, BN)

    q = _load(Q + row * q_b, head * q_h + c.to(tl.int64) * q_c, 1, inside, D, BD, UP)
    top = tl.full((BM,), NEVER, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    for n in range(begin, end, BN):
        j = n + tl.arange(0, BN)
        live = _live_keys(VALID, j, low, end)
        k = _load(K + row * k_b + key_head * k_h, j, k_n, live, D, BD, UP)
        logits = _logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)
        seen = live[None, :] & (j[None, :] >= first[:, None]) & (j[None, :] <= i[:, None])
        logits = tl.where(seen, logits, NEVER)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == NEVER, 0.0, new_top)
        p = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        v = _load(V + row * v_b + key_head * v_h, j, v_n, live, DV, BDV, UP)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top

    if SINKS is not None:
        sink = tl.load(SINKS + head, inside, 0.0).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        shift = tl.where(new_top == NEVER, 0.0, new_top)
        decay = tl.exp2(top - shift)
        acc *= decay[:, None]
        total = total * decay + tl.exp2(sink - shift)
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, NEVER, tl.where(empty, 0.0, top) * LN2 + tl.log(total))
    heads = key_heads * G
    tl.store(LSE + split.to(tl.int64) * lse_s + (row * heads + head) * length + c, lse, inside)
    at = head * o_h + c.to(tl.int64) * o_c
    _store(OUT + split.to(tl.int64) * o_s + row * o_b, at, 1, acc / total[:, None], inside, DV, BDV)


@triton.jit(do_not_specialize=["length"])
def combine_kernel(
    PARTIAL, PARTIAL_LSE, OUT, LSE, SINKS, heads, length, o_b, o_h, o_c, partial_s, lse_s,
    SPLITS: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Merge the SPLITS partial outputs of one query by their log-sum-exps, and add the sink."""
    query = tl.program_id(0).to(tl.int64)
    c, head, row = query % length, query // length % heads, query // length // heads
    s = tl.arange(0, BS)
    parts = tl.load(PARTIAL_LSE + s * lse_s + query, s < SPLITS, NEVER)
    top = tl.max(parts, 0)
    if SINKS is not None:
        sink = tl.load(SINKS + head).to(tl.float32)
        top = tl.maximum(top, sink)
    shift = tl.where(top == NEVER, 0.0, top)
    weights = tl.exp2((parts - shift) * LOG2E)
    total = tl.sum(weights, 0)
    if SINKS is not None:
        total += tl.exp2((sink - shift) * LOG2E)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(LSE + query, tl.where(empty, NEVER, shift + tl.log(total)))
    partial = _load(PARTIAL + query * DV, s, partial_s, s < SPLITS, DV, BDV, False)
    out = tl.sum(partial * weights[:, None], 0) / total
    d = tl.arange(0, BDV)
    tl.store(OUT + row * o_b + head * o_h + c * o_c + d, out.to(OUT.dtype.element_ty), d < DV)


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, VALID, ROW_START, Q_OFFSET,
    q_start, scale, key_heads, length, n_keys,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_c, g_b, g_h, g_c, dq_b, dq_h, dq_c, valid_b,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """dq of one query tile; also writes delta = sum(grad * out) for the key pass."""
    tile, pair = _program(tl.cdiv(length * G, BM))
    row, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    q_start = _query_start(Q_OFFSET, q_start)
    origin = _origin(ROW_START, row, CHUNK)
    if VALID is not None:
        VALID += row * valid_b

    r = tile * BM + tl.arange(0, BM)
    c, head = r // G, key_head * G + r % G
    inside = c < length
    i = q_start + c
    first = _first_key(i, origin, WINDOW, CHUNK)
    low = tl.maximum(_first_key(q_start + tile * BM // G, origin, WINDOW, CHUNK), 0)
    high = tl.minimum(q_start + tl.minimum((tile * BM + BM - 1) // G, length - 1) + 1, n_keys)

    q = _load(Q + row * q_b, head * q_h + c.to(tl.int64) * q_c, 1, inside, D, BD, UP)
    grad = _load(GRAD + row * g_b, head * g_h + c.to(tl.int64) * g_c, 1, inside, DV, BDV, UP)
    out = _load(OUT + row * o_b, head * o_h + c.to(tl.int64) * o_c, 1, inside, DV, BDV, UP)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    at = (row * key_heads * G + head) * length + c
    tl.store(DELTA + at, delta, inside)
    lse = tl.load(LSE + at, inside, 0.0)
    lse = tl.where(lse == NEVER, 0.0, lse) * LOG2E
    acc = tl.zeros((BM, BD), tl.float32)
    for n in range(low // BN * BN, high, BN):
        j = n + tl.arange(0, BN)
        live = _live_keys(VALID, j, low, high)
        k = _load(K + row * k_b + key_head * k_h, j, k_n, live, D, BD, UP)
        v = _load(V + row * v_b + key_head * v_h, j, v_n, live, DV, BDV, UP)
        logits = _logits(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)
        seen = live[None, :] & (j[None, :] >= first[:, None]) & (j[None, :] <= i[:, None])
        p = tl.exp2(tl.where(seen, logits, NEVER) - lse[:, None])
        dlogits = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        if SOFTCAP > 0:
            dlogits *= _slope(logits, SOFTCAP)
        acc = tl.dot(dlogits.to(k.dtype), k, acc, input_precision="ieee")
    _store(DQ + row * dq_b, head * dq_h + c.to(tl.int64) * dq_c, 1, acc * scale, inside, D, BD)


@triton.jit(do_not_specialize=VARYING)
def dkv_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV_OUT, VALID, ROW_START, Q_OFFSET,
    q_start, scale, key_heads, length, n_keys,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_c, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, valid_b,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, ACCUMULATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key block, over the queries and heads that see it; written, or added in place."""
    block, pair = _program(tl.cdiv(n_keys, BN))
    row, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    q_start = _query_start(Q_OFFSET, q_start)
    origin = _origin(ROW_START, row, CHUNK)
    if VALID is not None:
        VALID += row * valid_b

    n = block * BN
    j = n + tl.arange(0, BN)
    last = q_start + length - 1
    begin = tl.maximum(n - q_start, 0) * G
    end = (_last_query(n + BN - 1, last, origin, WINDOW, CHUNK) - q_start + 1) * G
    live = _live_keys(VALID, j, 0, tl.minimum(n_keys, last + 1))
    acc_k = tl.zeros((BN, BD), tl.float32)
    acc_v = tl.zeros((BN, BDV), tl.float32)
    if begin < end:
        k = _load(K + row * k_b + key_head * k_h, j, k_n, live, D, BD, UP)
        v = _load(V + row * v_b + key_head * v_h, j, v_n, live, DV, BDV, UP)
        until = _last_query(j, last + j * 0, origin, WINDOW, CHUNK)
        for m in range(begin // BM * BM, end, BM):
            r = m + tl.arange(0, BM)
            c, head = r // G, key_head * G + r % G
            inside = c < length
            i = q_start + c
            q = _load(Q + row * q_b, head * q_h + c.to(tl.int64) * q_c, 1, inside, D, BD, UP)
            grad = _load(GRAD + row * g_b, head * g_h + c.to(tl.int64) * g_c, 1, inside, DV, BDV, UP)
            at = (row * key_heads * G + head) * length + c
            lse = tl.load(LSE + at, inside, 0.0)
            lse = tl.where(lse == NEVER, 0.0, lse) * LOG2E
            delta = tl.load(DELTA + at, inside, 0.0)
            logits = _logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, SOFTCAP)
            seen = live[:, None] & (i[None, :] >= j[:, None]) & (i[None, :] <= until[:, None])
            p = tl.exp2(tl.where(seen, logits, NEVER) - lse[None, :])
            acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision="ieee")
            dlogits = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
            if SOFTCAP > 0:
                dlogits *= _slope(logits, SOFTCAP)
            acc_k = tl.dot(dlogits.to(q.dtype), q, acc_k, input_precision="ieee")
        acc_k *= scale
    at_k, at_v = DK + row * dk_b + key_head * dk_h, DV_OUT + row * dv_b + key_head * dv_h
    if not ACCUMULATE:
        _store(at_k, j, dk_n, acc_k, j < n_keys, D, BD)
        _store(at_v, j, dv_n, acc_v, j < n_keys, DV, BDV)
    elif begin < end:
        _store(at_k, j, dk_n, acc_k + _load(at_k, j, dk_n, live, D, BD, True), live, D, BD)
        _store(at_v, j, dv_n, acc_v + _load(at_v, j, dv_n, live, DV, BDV, True), live, DV, BDV)


def forward(problem: Problem, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """Return out [B, Hq, C, Dv] and the log-sum-exp [B, Hq, C]; `splits` overrides `key_splits`."""
    problem = problem.with_unit_strides()
    out, lse = problem.new_output(), problem.new_lse()
    for launch in plan_forward(problem, out, lse, splits):
        launch.run()
    return out, lse


def backward(
    problem: Problem, grad: Tensor, out: Tensor, lse: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dq, dk, dv and dsinks (or None); with `into=(dk, dv)` add to those buffers in place."""
    p = problem.with_unit_strides()
    grad, dq, delta = unit_stride(grad), p.new_dq(), p.new_lse()
    dk, dv = p.new_dkv() if into is None else into
    for launch in plan_backward(p, grad, out, lse, delta, dq, dk, dv, accumulate=into is not None):
        launch.run()
    return dq, dk, dv, None if p.sinks is None else sink_gradient(p.sinks, lse, delta)


def plan_forward(problem: Problem, out: Tensor, lse: Tensor, splits: int | None = None) -> list[Launch]:
    """Return the launches of the forward: one kernel, or partial outputs over key shares and their merge."""
    p = problem
    batch, heads, length, _ = p.q.shape
    tile = forward_tile(p)
    programs = cdiv(p.group * length, tile.m) * batch * p.k.shape[1]
    splits = key_splits(p, tile, programs) if splits is None else splits
    common, kernel_args = _common(p), dict(SPLITS=splits, **_blocks(p, tile))
    if splits == 1:
        args = common | dict(OUT=out, LSE=lse, SINKS=p.sinks, o_s=0, lse_s=0)
        args |= _strides("v", p.v) | _strides("o", out) | kernel_args
        return [Launch(forward_kernel, (programs, 1), args, tile)]
    partial = torch.empty(splits, *lse.shape, p.v.shape[-1], dtype=lse.dtype, device=lse.device)
    partial_lse = lse.new_empty(splits, *lse.shape)
    scratch = dict(
        OUT=partial, LSE=partial_lse, SINKS=None, o_s=partial.stride(0), lse_s=partial_lse.stride(0)
    )
    scratch |= _strides("v", p.v) | _strides("o", partial[0])
    combine = dict(
        PARTIAL=partial, PARTIAL_LSE=partial_lse, OUT=out, LSE=lse, SINKS=p.sinks, heads=heads, length=length,
        **_strides("o", out), partial_s=partial.stride(0), lse_s=partial_lse.stride(0),
        SPLITS=splits, DV=p.v.shape[-1], BS=1 << (splits - 1).bit_length(), BDV=power_of_two(p.v.shape[-1]),
    )  # fmt: skip
    return [
        Launch(forward_kernel, (programs, splits), common | scratch | kernel_args, tile),
        Launch(combine_kernel, (batch * heads * length,), combine, Tile(1, 1, warps=1, stages=1)),
    ]


def plan_backward(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool = False,
) -> list[Launch]:
    """Return the two launches of the backward, in order: the first writes the `delta` the second reads."""
    p = problem
    batch, _, length, _ = p.q.shape
    pairs = batch * p.k.shape[1]
    shared = _common(p) | _strides("v", p.v) | _strides("g", grad)
    q_tile, k_tile = dq_tile(p), dkv_tile(p)
    q_args = dict(OUT=out, GRAD=grad, LSE=lse, DELTA=delta, DQ=dq)
    q_args |= _strides("o", out) | _strides("dq", dq) | _blocks(p, q_tile)
    k_args = dict(GRAD=grad, LSE=lse, DELTA=delta, DK=dk, DV_OUT=dv, ACCUMULATE=accumulate)
    k_args |= _strides("dk", dk) | _strides("dv", dv) | _blocks(p, k_tile)
    return [
        Launch(dq_kernel, (cdiv(p.group * length, q_tile.m) * pairs,), shared | q_args, q_tile),
        Launch(dkv_kernel, (cdiv(p.k.shape[2], k_tile.n) * pairs,), shared | k_args, k_tile),
    ]


def _common(problem: Problem) -> dict[str, object]:
    p = problem
    return dict(
        Q=p.q, K=p.k, V=p.v,
        VALID=None if p.valid is None else p.valid.view(torch.uint8),
        valid_b=0 if p.valid is None else p.valid.stride(0),
        ROW_START=p.row_start, Q_OFFSET=p.q_offset, q_start=p.q_start, scale=p.scale,
        key_heads=p.k.shape[1], length=p.q.shape[2], n_keys=p.k.shape[2],
        G=p.group, WINDOW=p.window or 0, CHUNK=p.chunk or 0, SOFTCAP=p.softcap or 0.0,
        UP=triton.knobs.runtime.interpret,
        **_strides("q", p.q), **_strides("k", p.k),
    )  # fmt: skip


def _blocks(problem: Problem, tile: Tile) -> dict[str, int]:
    d, dv = problem.q.shape[-1], problem.v.shape[-1]
    return dict(D=d, DV=dv, BM=tile.m, BN=tile.n, BD=power_of_two(d), BDV=power_of_two(dv))


def _strides(name: str, x: Tensor) -> dict[str, int]:
    axes = "bhc" if name in ("q", "o", "g", "dq") else "bhn"
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(axes)}
