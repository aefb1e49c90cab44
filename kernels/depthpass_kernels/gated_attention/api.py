"""`gated_attention` as callers see it: argument checks, then the registered op."""

from torch import Tensor

from depthpass_kernels import gated_ops
from depthpass_kernels.gated_attention import naive
from depthpass_kernels.gated_attention.problem import Gated
from depthpass_kernels.select import check_name


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_k: Tensor,
    near_v: Tensor,
    score: Tensor,
    *,
    window: int,
    q_start: int = 0,
    valid: Tensor | None = None,
    scale: float | None = None,
    far_window: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Mix attention to shared keys with attention to a window of own keys; differentiable in all tensors but `valid`.

    Query c of row b stands at column i = q_start + c, shared key j at column j, own key j of M at column
    q_start + C - M + j: the last own key is the last query's. With g = sigmoid(score[b, c, h]):

        out = g Attn(q, shared keys of columns <= i) + (1 - g) Attn(q, own keys of columns i - window + 1 .. i)

    Columns where `valid` is False are seen by nobody; a part in which a query sees nothing counts as 0.

    Args:
        q: [B, Hq, C, D]; float32, bfloat16 or float16, with `"naive"` float64 too.
        k: [B, Hkv, N, D] in q's dtype; Hq divisible by Hkv, N >= q_start + C.
        v: [B, Hkv, N, Dv] in q's dtype.
        near_k: [B, Hkv, M, D]; C <= M <= q_start + C. Of keys before the queries' own, window - 1 are read.
        near_v: [B, Hkv, M, Dv].
        score: [B, C, Hq] what the gate is the sigmoid of.
        window: own columns seen, the query's own included.
        q_start: column of the first query.
        valid: [B, N] bool; None: all valid.
        scale: None means D ** -0.5.
        far_window: shared columns seen, the query's own included; None: all.
        implementation: `"auto"`, `"naive"` or `"triton"` (see `depthpass_kernels.select`).

    Returns:
        [B, C, Hq, Dv] in q's dtype.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
        >>> gated_attention(q, k, v, k[:, :, 5:], v[:, :, 5:], torch.zeros(1, 3, 4), window=2, q_start=9).shape
        torch.Size([1, 3, 4, 16])
    """
    check_name("gated_attention", implementation)
    problem = _problem(q, k, v, near_k, near_v, score, window, q_start, valid, scale, far_window)
    if gated_ops.implementation(problem, implementation) == "naive":
        return naive.forward(problem)
    return gated_ops.gated_attention(*problem, implementation)[0]


def _problem(q, k, v, near_k, near_v, score, window, q_start, valid, scale, far_window) -> Gated:
    """Check everything that needs no data."""
    tensors = {"q": q, "k": k, "v": v, "near_k": near_k, "near_v": near_v}
    for name, x in tensors.items():
        if x.dim() != 4:
            raise _unexpected(name, "4 dimensions", x.dim())
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise _unexpected(name, f"q's dtype, {q.dtype}", x.dtype)
    (batch, heads, length, width), (_, key_heads, n_keys, _) = q.shape, k.shape
    if key_heads == 0 or heads % key_heads != 0:
        raise _unexpected("q", f"a multiple of k's {key_heads} heads", f"{heads} heads")
    if not isinstance(q_start, int) or q_start < 0:
        raise _unexpected("q_start", "a column, at least 0", q_start)
    end, own, deep = q_start + length, near_k.shape[2], v.shape[-1]
    if n_keys < end:
        raise _unexpected("k", f"at least q_start + C = {end} keys", n_keys)
    if not length <= own <= end:
        raise _unexpected("near_k", f"C to q_start + C = {length} to {end} keys", own)
    shapes = {
        "k": (batch, key_heads, n_keys, width), "v": (batch, key_heads, n_keys, deep),
        "near_k": (batch, key_heads, own, width), "near_v": (batch, key_heads, own, deep), "score": (batch, length, heads),
    }
    for name, expected in shapes.items():
        if (got := tuple((tensors | {"score": score})[name].shape)) != expected:
            raise _unexpected(name, f"shape {expected}", got)
    if not score.is_floating_point():
        raise _unexpected("score", "a floating dtype", score.dtype)
    if valid is not None and (tuple(valid.shape) != (batch, n_keys) or str(valid.dtype) != "torch.bool"):
        raise _unexpected("valid", f"torch.bool of shape {(batch, n_keys)}", f"{valid.dtype} of {tuple(valid.shape)}")
    for name, value in (("window", window), ("far_window", far_window)):
        if (value is None and name == "window") or (value is not None and (not isinstance(value, int) or value < 1)):
            raise _unexpected(name, "at least 1 key", value)
    return Gated(
        q, k, v, near_k, near_v, score, valid, q_start, width**-0.5 if scale is None else float(scale), window, far_window
    )


def _unexpected(field: str, expected: str, got: object) -> ValueError:
    return ValueError(f"gated_attention: {field}: expected {expected}, got {got}")
