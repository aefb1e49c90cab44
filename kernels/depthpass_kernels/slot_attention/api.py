"""`slot_attention` and its two halves, as callers see them: argument checks, then the registered op."""

from typing import Any

import torch
from torch import Tensor

from depthpass_kernels import ops
from depthpass_kernels.select import check_name, traced
from depthpass_kernels.slot_attention import naive
from depthpass_kernels.slot_attention.problem import Problem

OPTIONS = ("q_start", "valid", "row_start", "scale", "window", "chunk", "softcap", "sinks")


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_start: int | Tensor,
    valid: Tensor | None = None,
    row_start: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attend from a chunk of queries to a prefix of keys; differentiable in q, k, v and sinks.

    Query c of row b stands at column i = q_start + c, key j at column j. The query sees the key iff j <= i,
    `valid[b, j]`, i - j < window, and both lie in one chunk, that is
    (j - row_start[b]) // chunk == (i - row_start[b]) // chunk. With the logits s_j = scale q·k_j, or
    softcap tanh(scale q·k_j / softcap), of the keys it sees:

        out = Σ_j exp(s_j) v_j / (Σ_j exp(s_j) + exp(sink))          0 for a query that sees nothing

    Keys that no query may see can hold anything, NaN included: a static buffer need not be cleared.

    Args:
        q: [B, Hq, C, D]; float32, bfloat16 or float16, with `"naive"` float64 too.
        k: [B, Hkv, N, D] in q's dtype; Hq divisible by Hkv, N >= q_start + C.
        v: [B, Hkv, N, Dv] in q's dtype.
        q_start: column of the first query. An integer tensor of one element keeps one graph for a moving
            position (compiled decode); its value is then not checked against N.
        valid: [B, N] bool; False keys are never attended. None: all valid.
        row_start: [B] integers, first real column of each row; used by `chunk` alone. None: 0.
        scale: None means D ** -0.5.
        window: number of columns seen, the query's own included.
        chunk: length of the chunks that attention stays inside.
        softcap: cap on the logits.
        sinks: [Hq] one more logit per head, in the denominator only.
        implementation: `"auto"`, `"naive"` or `"triton"` (see `depthpass_kernels.select`).

    Returns:
        [B, Hq, C, Dv] in q's dtype, laid out in memory as [B, C, Hq, Dv].

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
        >>> slot_attention(q, k, v, q_start=9, window=4).shape
        torch.Size([1, 4, 3, 16])
    """
    check_name("slot_attention", implementation)
    problem = _problem(q, k, v, q_start, valid, row_start, scale, window, chunk, softcap, sinks)
    return ops.slot_attention(*problem, implementation)[0]


def slot_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, implementation: str = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)` for a hand-written backward; options as `slot_attention`.

    lse [B, Hq, C] is the log of the denominator (-inf where it is empty), float32, or float64 for float64
    inputs. It carries no gradient: use `slot_attention` under autograd.
    """
    check_name("slot_attention", implementation)
    problem = _problem_of(q, k, v, options)
    # A registered op costs tens of microseconds a call, as much as a small chunk's attention itself.
    if traced():
        return ops.slot_attention(*problem, implementation)
    with torch.no_grad():
        return ops.attention_forward(problem, implementation)


def slot_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    into: tuple[Tensor, Tensor] | None = None,
    implementation: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `(dq, dk, dv, dsinks)` from the results of `slot_attention_forward`; dsinks None without sinks.

    Args:
        grad: gradient of `out`.
        q: as given to the forward, like k and v.
        k: see q.
        v: see q.
        out: returned by the forward, like lse.
        lse: see out.
        into: `(dk, dv)` buffers shaped as k and v, of any dtype (float32 accumulators, say). This call's key
            gradients are **added** to them in place, touching only keys that some query may see, and they are
            what is returned: a reverse loop over chunks sums into one pair of buffers.
        implementation: as given to the forward.
        options: exactly those given to the forward.
    """
    check_name("slot_attention", implementation)
    problem = _problem_of(q, k, v, options)
    if into is None:
        dq, dk, dv, dsinks = ops.slot_attention_backward(grad, out, lse, *problem, implementation)
    else:
        dk, dv = into
        _check_accumulator("into[0]", dk, k)
        _check_accumulator("into[1]", dv, v)
        if traced():
            dq, dsinks = ops.slot_attention_backward_accumulate(grad, out, lse, dk, dv, *problem, implementation)
        else:
            dq, dsinks = ops.attention_backward_accumulate(problem, grad, out, lse, dk, dv, implementation)
    return dq, dk, dv, None if problem.sinks is None else dsinks


def slot_attention_naive(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Compute `slot_attention` in plain differentiable torch ops, which a compiler can see and fuse."""
    return naive.forward(_problem_of(q, k, v, options))[0]


def _problem_of(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Problem:
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise TypeError(f"slot_attention: unknown option {unknown[0]!r}, expected some of {OPTIONS}")
    if "q_start" not in options:
        raise TypeError("slot_attention: q_start is required: the column of the first query")
    return _problem(q, k, v, **options)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: int | Tensor,
    valid: Tensor | None = None,
    row_start: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Problem:
    """Check everything that needs no data."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise _unexpected("q, k, v", "4 dimensions each", f"{q.dim()}, {k.dim()}, {v.dim()}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise _unexpected("q, k, v", "one floating dtype", f"{q.dtype}, {k.dtype}, {v.dtype}")
    (batch, heads, length, width), (_, key_heads, n_keys, _) = q.shape, k.shape
    if key_heads == 0 or heads % key_heads != 0:
        raise _unexpected("q", f"a multiple of k's {key_heads} heads", f"{heads} heads")
    _check_shape("k", k, (batch, key_heads, n_keys, width))
    _check_shape("v", v, (batch, key_heads, n_keys, v.shape[-1]))
    q_offset = None
    if isinstance(q_start, Tensor):
        if q_start.numel() != 1 or q_start.is_floating_point():
            raise _unexpected("q_start", "one integer", f"{q_start.dtype} of shape {tuple(q_start.shape)}")
        q_offset, q_start = q_start, 0
    elif q_start < 0:
        raise _unexpected("q_start", "a column, at least 0", q_start)
    elif n_keys < q_start + length:
        raise _unexpected("k", f"at least q_start + C = {q_start + length} keys", n_keys)
    if valid is not None:
        _check_shape("valid", valid, (batch, n_keys))
        if valid.dtype != torch.bool:
            raise _unexpected("valid", "dtype torch.bool", valid.dtype)
    if row_start is not None:
        _check_shape("row_start", row_start, (batch,))
        if row_start.is_floating_point():
            raise _unexpected("row_start", "an integer dtype", row_start.dtype)
    if sinks is not None:
        _check_shape("sinks", sinks, (heads,))
    for name, value in (("window", window), ("chunk", chunk)):
        if value is not None and value < 1:
            raise _unexpected(name, "at least 1, or None", value)
    if softcap is not None and softcap <= 0:
        raise _unexpected("softcap", "a positive number, or None", softcap)
    factor = width**-0.5 if scale is None else float(scale)
    return Problem(q, k, v, valid, row_start, sinks, q_offset, q_start, factor, window, chunk, softcap)


def _check_accumulator(name: str, buffer: Tensor, like: Tensor) -> None:
    _check_shape(name, buffer, tuple(like.shape))
    if buffer.stride(-1) != 1 or buffer.requires_grad:
        raise _unexpected(
            name, "a buffer without gradient whose last axis is contiguous", f"stride {buffer.stride()}"
        )


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise _unexpected(name, f"shape {expected}", tuple(x.shape))


def _unexpected(field: str, expected: str, got: object) -> ValueError:
    return ValueError(f"slot_attention: {field}: expected {expected}, got {got}")
