"""Gated attention as Triton kernels: forward, dq with the gate's gradient, dk/dv.

Imported only when a kernel runs. Tiles, packing of queries and the rule that each query sees one interval of keys are
those of :mod:`depthpass_kernels.slot_attention.triton`. One program of the forward reads its queries once, runs the
online softmax over the shared keys and then over the window, and stores the mixture. Own keys are addressed by column
like shared ones: their base pointer is moved back by the column of the first.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthpass_kernels.gated_attention.problem import Gated
from depthpass_kernels.launch import Launch, Tile, cdiv, power_of_two
from depthpass_kernels.operands import unit_stride
from depthpass_kernels.slot_attention.tile_parts import LN2, LOG2E, NEVER, _live_keys, _load, _program, _store

VARYING = ["q_start", "near_start", "length"]


@triton.jit
def _first(i, start, WINDOW: tl.constexpr):
    """First key column that query column i sees, of keys that begin at column `start`."""
    first = i * 0 + start
    if WINDOW > 0:
        first = tl.maximum(first, i - (WINDOW - 1))
    return first


@triton.jit
def _softmax(
    q, K, V, VALID, k_n, v_n, i, first, low, high, scale,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Attention of a query tile to the keys of columns low..high: values [BM, BDV] and log-sum-exps [BM], float32."""
    top = tl.full((BM,), NEVER, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    for n in range(low // BN * BN, high, BN):
        j = n + tl.arange(0, BN)
        live = _live_keys(VALID, j, low, high)
        k = _load(K, j, k_n, live, D, BD, UP)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        seen = live[None, :] & (j[None, :] >= first[:, None]) & (j[None, :] <= i[:, None])
        logits = tl.where(seen, logits, NEVER)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == NEVER, 0.0, new_top)
        p = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        v = _load(V, j, v_n, live, DV, BDV, UP)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, NEVER, tl.where(empty, 0.0, top) * LN2 + tl.log(total))
    return acc / total[:, None], lse


@triton.jit(do_not_specialize=VARYING)
def gated_forward_kernel(
    Q, K, V, NEAR_K, NEAR_V, SCORE, OUT, FAR, NEAR, LSE_FAR, LSE_NEAR, VALID,
    q_start, near_start, scale, key_heads, length,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n, nk_b, nk_h, nk_n, nv_b, nv_h, nv_n, s_b, s_c, valid_b,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, FAR_WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The mixture of one query tile; with FAR, NEAR, LSE_FAR and LSE_NEAR also what the backward needs."""
    tile, pair = _program(tl.cdiv(length * G, BM))
    row, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    heads = key_heads * G
    if VALID is not None:
        VALID += row * valid_b
    r = tile * BM + tl.arange(0, BM)
    c, head = r // G, key_head * G + r % G
    inside = c < length
    i = q_start + c
    begin = q_start + tile * BM // G
    high = q_start + tl.minimum((tile * BM + BM - 1) // G, length - 1) + 1
    q = _load(Q + row * q_b, head * q_h + c.to(tl.int64) * q_c, 1, inside, D, BD, UP)
    far, lse_far = _softmax(
        q, K + row * k_b + key_head * k_h, V + row * v_b + key_head * v_h, VALID, k_n, v_n, i,
        _first(i, 0, FAR_WINDOW), _first(begin, 0, FAR_WINDOW), high, scale, D, DV, BM, BN, BD, BDV, UP,
    )  # fmt: skip
    near, lse_near = _softmax(
        q, NEAR_K + row * nk_b + key_head * nk_h - near_start.to(tl.int64) * nk_n,
        NEAR_V + row * nv_b + key_head * nv_h - near_start.to(tl.int64) * nv_n, VALID, nk_n, nv_n, i,
        _first(i, near_start, WINDOW), _first(begin, near_start, WINDOW), high, scale, D, DV, BM, BN, BD, BDV, UP,
    )  # fmt: skip
    gate = tl.sigmoid(tl.load(SCORE + row * s_b + c.to(tl.int64) * s_c + head, inside, 0.0).to(tl.float32))
    # Results are dense: [B, C, H, Dv] and [B, H, C].
    at = ((row * length + c) * heads + head) * DV
    _store(OUT, at, 1, near + gate[:, None] * (far - near), inside, DV, BDV)
    if FAR is not None:
        _store(FAR, at, 1, far, inside, DV, BDV)
        _store(NEAR, at, 1, near, inside, DV, BDV)
        tl.store(LSE_FAR + (row * heads + head) * length + c, lse_far, inside)
        tl.store(LSE_NEAR + (row * heads + head) * length + c, lse_near, inside)


@triton.jit
def _dq(
    acc, q, grad, weight, lse, delta, K, V, VALID, k_n, v_n, i, first, low, high, scale,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Add one part's weight * sum_j p_j (grad v_j - delta) k_j to acc."""
    lse = tl.where(lse == NEVER, 0.0, lse) * LOG2E
    for n in range(low // BN * BN, high, BN):
        j = n + tl.arange(0, BN)
        live = _live_keys(VALID, j, low, high)
        k = _load(K, j, k_n, live, D, BD, UP)
        v = _load(V, j, v_n, live, DV, BDV, UP)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        seen = live[None, :] & (j[None, :] >= first[:, None]) & (j[None, :] <= i[:, None])
        p = tl.exp2(tl.where(seen, logits, NEVER) - lse[:, None]) * weight[:, None]
        dlogits = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(dlogits.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=VARYING)
def gated_dq_kernel(
    Q, K, V, NEAR_K, NEAR_V, SCORE, GRAD, FAR, NEAR, LSE_FAR, LSE_NEAR, DELTA_FAR, DELTA_NEAR, DQ, DSCORE, VALID,
    q_start, near_start, scale, key_heads, length,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n, nk_b, nk_h, nk_n, nv_b, nv_h, nv_n, s_b, s_c, valid_b,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, FAR_WINDOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """dq and dscore of one query tile; also writes both deltas for the key pass. GRAD, FAR, NEAR, DQ are [B, C, H, ..]."""
    tile, pair = _program(tl.cdiv(length * G, BM))
    row, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    heads = key_heads * G
    if VALID is not None:
        VALID += row * valid_b
    r = tile * BM + tl.arange(0, BM)
    c, head = r // G, key_head * G + r % G
    inside = c < length
    i = q_start + c
    begin = q_start + tile * BM // G
    high = q_start + tl.minimum((tile * BM + BM - 1) // G, length - 1) + 1
    place = (row * length + c) * heads + head
    at = (row * heads + head) * length + c

    q = _load(Q + row * q_b, head * q_h + c.to(tl.int64) * q_c, 1, inside, D, BD, UP)
    grad = _load(GRAD, place * DV, 1, inside, DV, BDV, UP)
    wide = grad.to(tl.float32)
    delta_far = tl.sum(wide * _load(FAR, place * DV, 1, inside, DV, BDV, True), 1)
    delta_near = tl.sum(wide * _load(NEAR, place * DV, 1, inside, DV, BDV, True), 1)
    tl.store(DELTA_FAR + at, delta_far, inside)
    tl.store(DELTA_NEAR + at, delta_near, inside)
    gate = tl.sigmoid(tl.load(SCORE + row * s_b + c.to(tl.int64) * s_c + head, inside, 0.0).to(tl.float32))
    dscore = gate * (1.0 - gate) * (delta_far - delta_near)  # pyright: ignore[reportOperatorIssue]  tl.sum has no type
    tl.store(DSCORE + place, dscore.to(DSCORE.dtype.element_ty), inside)
    acc = _dq(
        tl.zeros((BM, BD), tl.float32), q, grad, gate, tl.load(LSE_FAR + at, inside, 0.0), delta_far,
        K + row * k_b + key_head * k_h, V + row * v_b + key_head * v_h, VALID, k_n, v_n, i,
        _first(i, 0, FAR_WINDOW), _first(begin, 0, FAR_WINDOW), high, scale, D, DV, BN, BD, BDV, UP,
    )  # fmt: skip
    acc = _dq(
        acc, q, grad, 1.0 - gate, tl.load(LSE_NEAR + at, inside, 0.0), delta_near,
        NEAR_K + row * nk_b + key_head * nk_h - near_start.to(tl.int64) * nk_n,
        NEAR_V + row * nv_b + key_head * nv_h - near_start.to(tl.int64) * nv_n, VALID, nk_n, nv_n, i,
        _first(i, near_start, WINDOW), _first(begin, near_start, WINDOW), high, scale, D, DV, BN, BD, BDV, UP,
    )  # fmt: skip
    _store(DQ, place * D, 1, acc * scale, inside, D, BD)


@triton.jit(do_not_specialize=["q_start", "key_start", "length", "n_keys"])
def gated_dkv_kernel(
    Q, K, V, SCORE, GRAD, LSE, DELTA, DK, DV_OUT, VALID,
    q_start, key_start, scale, key_heads, length, n_keys,
    q_b, q_h, q_c, k_b, k_h, k_n, v_b, v_h, v_n, s_b, s_c, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, valid_b,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of shared keys, or (OWN) of own keys; key j stands at column key_start + j."""
    block, pair = _program(tl.cdiv(n_keys, BN))
    row, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    heads = key_heads * G
    if VALID is not None:
        VALID += row * valid_b + key_start
    m = block * BN + tl.arange(0, BN)
    j = key_start + m
    last = q_start + length - 1
    begin = tl.maximum(key_start + block * BN - q_start, 0) * G
    final = key_start + block * BN + BN - 1 + (WINDOW - 1) if WINDOW > 0 else last
    end = (tl.minimum(final, last) - q_start + 1) * G
    live = _live_keys(VALID, m, 0, tl.minimum(n_keys, last + 1 - key_start))
    acc_k = tl.zeros((BN, BD), tl.float32)
    acc_v = tl.zeros((BN, BDV), tl.float32)
    if begin < end:
        k = _load(K + row * k_b + key_head * k_h, m, k_n, live, D, BD, UP)
        v = _load(V + row * v_b + key_head * v_h, m, v_n, live, DV, BDV, UP)
        until = tl.minimum(j + (WINDOW - 1), last) if WINDOW > 0 else j * 0 + last
        for t in range(begin // BM * BM, end, BM):
            r = t + tl.arange(0, BM)
            c, head = r // G, key_head * G + r % G
            inside = c < length
            i = q_start + c
            q = _load(Q + row * q_b, head * q_h + c.to(tl.int64) * q_c, 1, inside, D, BD, UP)
            grad = _load(GRAD, ((row * length + c) * heads + head) * DV, 1, inside, DV, BDV, UP)
            at = (row * heads + head) * length + c
            lse = tl.load(LSE + at, inside, 0.0)
            lse = tl.where(lse == NEVER, 0.0, lse) * LOG2E
            delta = tl.load(DELTA + at, inside, 0.0)
            gate = tl.sigmoid(tl.load(SCORE + row * s_b + c.to(tl.int64) * s_c + head, inside, 0.0).to(tl.float32))
            weight = 1.0 - gate if OWN else gate
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
            seen = live[:, None] & inside[None, :] & (i[None, :] >= j[:, None]) & (i[None, :] <= until[:, None])
            p = tl.exp2(tl.where(seen, logits, NEVER) - lse[None, :]) * weight[None, :]
            acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision="ieee")
            dlogits = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
            acc_k = tl.dot(dlogits.to(q.dtype), q, acc_k, input_precision="ieee")
    _store(DK + row * dk_b + key_head * dk_h, m, dk_n, acc_k * scale, m < n_keys, D, BD)
    _store(DV_OUT + row * dv_b + key_head * dv_h, m, dv_n, acc_v, m < n_keys, DV, BDV)


def forward(problem: Gated) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, far, near [B, C, Hq, Dv] and both log-sum-exps [B, Hq, C]."""
    p = problem.with_unit_strides()
    results = p.new_output(), p.new_output(), p.new_output(), p.new_lse(), p.new_lse()
    for launch in plan_forward(p, *results):
        launch.run()
    return results


def backward(
    problem: Gated, grad: Tensor, far: Tensor, near: Tensor, lse_far: Tensor, lse_near: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dnear_k, dnear_v, dscore."""
    p = problem.with_unit_strides()
    batch, heads, length, width = p.q.shape
    dq = p.q.new_empty(batch, length, heads, width)
    dk, dv, dnear_k, dnear_v = (x.new_empty(x.shape) for x in (p.k, p.v, p.near_k, p.near_v))
    dscore = p.score.new_empty(p.score.shape)
    deltas = p.new_lse(), p.new_lse()
    for launch in plan_backward(
        p, unit_stride(grad).contiguous(), far, near, lse_far, lse_near, *deltas, dq, dk, dv, dnear_k, dnear_v, dscore
    ):
        launch.run()
    return dq.transpose(1, 2), dk, dv, dnear_k, dnear_v, dscore


def plan_forward(
    problem: Gated, out: Tensor, far: Tensor | None, near: Tensor | None, lse_far: Tensor | None, lse_near: Tensor | None
) -> list[Launch]:
    """Return the one launch of the forward; far, near and the log-sum-exps are for the backward, all or none."""
    tile = forward_tile(problem)
    args = _common(problem, tile) | dict(OUT=out, FAR=far, NEAR=near, LSE_FAR=lse_far, LSE_NEAR=lse_near)
    return [Launch(gated_forward_kernel, (_tiles(problem, tile),), args, tile)]


def plan_backward(
    problem: Gated, grad: Tensor, far: Tensor, near: Tensor, lse_far: Tensor, lse_near: Tensor, delta_far: Tensor,
    delta_near: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dnear_k: Tensor, dnear_v: Tensor, dscore: Tensor,
) -> list[Launch]:
    """Return the three launches of the backward, in order: the first writes the deltas that the others read."""
    p = problem
    tile = dq_tile(p)
    args = _common(p, tile) | dict(
        GRAD=grad, FAR=far, NEAR=near, LSE_FAR=lse_far, LSE_NEAR=lse_near, DELTA_FAR=delta_far, DELTA_NEAR=delta_near,
        DQ=dq, DSCORE=dscore,
    )
    return [
        Launch(gated_dq_kernel, (_tiles(p, tile),), args, tile),
        _dkv(p, grad, p.k, p.v, 0, lse_far, delta_far, dk, dv, p.far_window, False),
        _dkv(p, grad, p.near_k, p.near_v, p.near_start, lse_near, delta_near, dnear_k, dnear_v, p.window, True),
    ]


def _dkv(
    p: Gated, grad: Tensor, k: Tensor, v: Tensor, key_start: int, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    window: int | None, own: bool,
) -> Launch:
    tile = dkv_tile(p)
    batch, key_heads, n_keys, _ = k.shape
    args = dict(
        Q=p.q, K=k, V=v, SCORE=p.score, GRAD=grad, LSE=lse, DELTA=delta, DK=dk, DV_OUT=dv, **_validity(p),
        q_start=p.q_start, key_start=key_start, scale=p.scale, key_heads=key_heads, length=p.q.shape[2], n_keys=n_keys,
        **_strides("q", p.q), **_strides("k", k), **_strides("v", v), s_b=p.score.stride(0), s_c=p.score.stride(1),
        **_strides("dk", dk), **_strides("dv", dv), WINDOW=window or 0, OWN=own, **_blocks(p, tile),
    )  # fmt: skip
    return Launch(gated_dkv_kernel, (cdiv(n_keys, tile.n) * batch * key_heads,), args, tile)


# Blocks by the wider head dimension: chosen by compiling, none spills with 16-bit operands. Not tuned for speed, that
# needs a GPU. A tile keeps one more accumulator than slot attention's, so it is smaller.


def forward_tile(problem: Gated) -> Tile:
    """Blocks of the forward kernel."""
    width, rows = _width(problem), _packed_rows(problem)
    if problem.q.element_size() == 4:
        return Tile(min(rows, 32 if width <= 64 else 16), 32 if width <= 64 else 16, warps=8, stages=1)
    if width <= 128:
        return Tile(min(rows, 64), 32 if width == 128 else 64, warps=8 if width == 128 and rows >= 64 else 4)
    return Tile(min(rows, 64), 32, warps=8 if rows >= 64 else 4)


def dq_tile(problem: Gated) -> Tile:
    """Blocks of the dq kernel."""
    width, rows = _width(problem), _packed_rows(problem)
    if problem.q.element_size() == 4:
        return Tile(min(rows, 32 if width <= 64 else 16), 32 if width <= 64 else 16, warps=8, stages=1)
    if width <= 128:
        return Tile(min(rows, 64), 32, warps=4)
    return Tile(min(rows, 64), 16, warps=8 if rows >= 64 else 4)


def dkv_tile(problem: Gated) -> Tile:
    """Blocks of the dk/dv kernel."""
    width, rows = _width(problem), _packed_rows(problem)
    if problem.q.element_size() == 4:
        return Tile(16, 16, warps=4, stages=1)
    if width <= 128:
        return Tile(min(rows, 32), 64, warps=4 if width <= 64 else 8)
    return Tile(min(rows, 32), 32, warps=8, stages=1)


def _width(problem: Gated) -> int:
    return max(power_of_two(problem.q.shape[-1]), power_of_two(problem.v.shape[-1]))


def _packed_rows(problem: Gated) -> int:
    return power_of_two(problem.group * problem.q.shape[2])


def _tiles(problem: Gated, tile: Tile) -> int:
    p = problem
    return cdiv(p.group * p.q.shape[2], tile.m) * p.q.shape[0] * p.k.shape[1]


def _common(problem: Gated, tile: Tile) -> dict[str, object]:
    p = problem
    return dict(
        Q=p.q, K=p.k, V=p.v, NEAR_K=p.near_k, NEAR_V=p.near_v, SCORE=p.score, **_validity(p),
        q_start=p.q_start, near_start=p.near_start, scale=p.scale, key_heads=p.k.shape[1], length=p.q.shape[2],
        **_strides("q", p.q), **_strides("k", p.k), **_strides("v", p.v), **_strides("nk", p.near_k),
        **_strides("nv", p.near_v), s_b=p.score.stride(0), s_c=p.score.stride(1),
        WINDOW=p.window, FAR_WINDOW=p.far_window or 0, **_blocks(p, tile),
    )  # fmt: skip


def _validity(problem: Gated) -> dict[str, object]:
    valid = problem.valid
    return dict(
        VALID=None if valid is None else valid.view(torch.uint8), valid_b=0 if valid is None else valid.stride(0)
    )


def _blocks(problem: Gated, tile: Tile) -> dict[str, object]:
    d, dv = problem.q.shape[-1], problem.v.shape[-1]
    return dict(
        G=problem.group, D=d, DV=dv, BM=tile.m, BN=tile.n, BD=power_of_two(d), BDV=power_of_two(dv),
        UP=triton.knobs.runtime.interpret,
    )


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("bhc" if name == "q" else "bhn")}
