"""Slot attention of a chunk whose queries see every key up to their own, in as few torch ops as it takes.

What a token loop on a CPU runs most: no padding, no window that has passed a key, no cap and no sinks. Probabilities are
computed again in the backward pass, so nothing but the operands is kept.
"""

import functools

import torch
from torch import Tensor

from depthpass_kernels.operands import accumulation_dtype

_softmax_backward = torch.ops.aten._softmax_backward_data.default


def fits(q: Tensor, start: int, options: dict) -> bool:
    """Whether queries from column `start` on are such a chunk; options as of `slot_attention`."""
    window = options["window"]
    return (
        q.device.type == "cpu" and q.dtype == accumulation_dtype(q.dtype) and options["valid"] is None
        and options["chunk"] is None and options["softcap"] is None
        and (window is None or start + q.shape[2] <= window)
    )


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return [B, C, Hq, Dv] from queries [B, Hq, C, D] and keys and values [B * Hkv, N, D or Dv] up to the last query's."""
    batch, heads, count, _ = q.shape
    rows = _rows(q, len(k))
    out = torch.bmm(_probabilities(rows, k, count, scale), v)
    return out.view(batch, heads, count, v.shape[-1]).transpose(1, 2)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq [B, Hq, C, D] and dk, dv laid out as k and v, from the gradient [B, C, Hq, Dv] of the result."""
    batch, heads, count, width = q.shape
    rows, g = _rows(q, len(k)), _rows(grad.transpose(1, 2), len(k))
    p = _probabilities(rows, k, count, scale)
    logits = _softmax_backward(torch.bmm(g, v.mT), p, -1, p.dtype).mul_(scale)
    dq = torch.bmm(logits, k).view(batch, heads, count, width)
    return dq, torch.bmm(logits.mT, rows), torch.bmm(p.mT, g)


def _rows(x: Tensor, heads: int) -> Tensor:
    """[B, Hq, C, D] -> [B * Hkv, group * C, D]: the queries of a key head below one another."""
    return x.reshape(heads, -1, x.shape[-1])


def _probabilities(rows: Tensor, k: Tensor, count: int, scale: float) -> Tensor:
    logits = torch.baddbmm(_mask(rows.shape[1] // count, count, k.shape[1], rows.dtype), rows, k.mT, alpha=scale)
    return torch.softmax(logits, -1)


def _mask(group: int, count: int, keys: int, dtype: torch.dtype) -> Tensor:
    """What hides later keys of the own chunk, [group * count, keys], a view of a longer one."""
    longest = 256
    while longest < keys:
        longest *= 2
    return _widest(group, count, longest, dtype)[:, longest - keys :]


@functools.lru_cache(16)
def _widest(group: int, count: int, keys: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        mask = torch.zeros(count, keys, dtype=dtype)
        mask[:, keys - count :] = torch.full((count, count), float("-inf"), dtype=dtype).triu_(1)
        return mask.repeat(group, 1)
