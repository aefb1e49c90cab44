"""Slot attention of a chunk whose queries see every key up to their own: compiled, or in as few torch ops as it takes.

What a token loop on a CPU runs most: no padding, no window that has passed a key, no cap and no sinks. Of long rows nothing
but the operands is kept, and probabilities are computed again in the backward pass.
"""


import torch
from torch import Tensor

from depthpass_kernels.operands import accumulation_dtype
from depthpass_kernels.select import remembered
from depthpass_kernels.slot_attention import chunk_cpp

_softmax_backward = torch.ops.aten._softmax_backward_data.default

KEPT = 4
"""Probabilities are kept of up to this many times as many keys as a head has features: no more than a few streams."""


def fits(x: Tensor, count: int, start: int, options: dict) -> bool:
    """Whether `count` queries from column `start` on are such a chunk; x of their dtype, options as of `slot_attention`."""
    window = options["window"]
    return (
        x.device.type == "cpu" and x.dtype == accumulation_dtype(x.dtype) and options["valid"] is None
        and options["chunk"] is None and options["softcap"] is None
        and (window is None or start + count <= window)
    )


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Return the result and the probabilities [B * Hkv, C * group, N] if they are worth keeping.

    Args:
        q: [B, C, Hq, D]; the result is laid out in the same way.
        k, v: [B * Hkv, N, D or Dv] up to the last query's.
    """
    keep = k.shape[1] <= KEPT * k.shape[2]
    if chunk_cpp.fits(q, k, v):
        return chunk_cpp.forward(q, k, v, scale, keep)
    p = _probabilities(_rows_of(q, k.shape[0]), k, q.shape[1], scale)
    return _by_token(torch.bmm(p, v), *q.shape[:2]), p if keep else None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, scale: float, dk: Tensor, dv: Tensor
) -> Tensor:
    """Return dq from the gradient of the result and what :func:`forward` was given and gave; those of k and v are added to
    dk and dv."""
    if chunk_cpp.fits(q, k, v, dk, dv):
        return chunk_cpp.backward(grad, q, k, v, p, scale, dk, dv)
    g, rows = _rows_of(grad, k.shape[0]), _rows_of(q, k.shape[0])
    if p is None:
        p = _probabilities(rows, k, q.shape[1], scale)
    logits = _softmax_backward(torch.bmm(g, v.mT), p, -1, p.dtype).mul_(scale)
    dk.add_(torch.bmm(logits.mT, rows))
    dv.add_(torch.bmm(p.mT, g))
    return _by_token(torch.bmm(logits, k), *q.shape[:2])


def _rows_of(q: Tensor, keys: int) -> Tensor:
    """[B, C, Hq, D] -> [B * Hkv, C * group, D]: the queries of a key head below one another; `keys` = B * Hkv. No copy where
    all heads share one key head."""
    batch, count, _, width = q.shape
    if keys == batch:
        return q.reshape(keys, -1, width)
    return q.reshape(batch, count, keys // batch, -1, width).transpose(1, 2).reshape(keys, -1, width)


def _by_token(rows: Tensor, batch: int, count: int) -> Tensor:
    """The inverse of `_rows_of`."""
    keys, _, width = rows.shape
    if keys == batch:
        return rows.view(batch, count, -1, width)
    return rows.view(batch, keys // batch, count, -1, width).transpose(1, 2).flatten(2, 3)


def _probabilities(rows: Tensor, k: Tensor, count: int, scale: float) -> Tensor:
    logits = torch.baddbmm(_mask(rows.shape[1] // count, count, k.shape[1], rows.dtype), rows, k.mT, alpha=scale)
    return torch.softmax(logits, -1)


@remembered(32)  # every visit of a chunk asks for the same one
def _mask(group: int, count: int, keys: int, dtype: torch.dtype) -> Tensor:
    """What hides later keys of the own chunk, [count * group, keys], a view of a longer one."""
    longest = 256
    while longest < keys:
        longest *= 2
    return _widest(group, count, longest, dtype)[:, longest - keys :]


@remembered(16)
def _widest(group: int, count: int, keys: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(count, keys, dtype=dtype, device="cpu")
    mask[:, keys - count :] = torch.full((count, count), float("-inf"), dtype=dtype, device="cpu").triu_(1)
    return mask.repeat_interleave(group, 0)
