"""Gated attention in plain torch: the reference of the kernel, and what runs everywhere.

Differentiable as it stands. Memory is linear in the number of queries: the window is read block by block, and where
nothing is padded the shared keys are read with SDPA's causal flag, so no queries x keys mask exists.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from depthpass_kernels.gated_attention.problem import Gated

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
"""(q [B, H, C, D], k [B, Hkv, N, D], v, mask [B or 1, 1, C, N] or None, causal) -> [B, C, H, Dv]."""

BLOCK = 32
"""Fewest queries of a block: a window of a few keys would else make many tiny products."""


def forward(problem: Gated) -> Tensor:
    """Return out [B, C, Hq, Dv]."""
    p = problem
    count = p.q.shape[2]
    end = p.q_start + count
    k, v = p.k[:, :, :end], p.v[:, :, :end]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return sdpa(q, k, v, mask, causal, p.scale)

    valid = None if p.valid is None else p.valid[:, :end]
    if p.far_window is not None:
        far = local(p.q, k, v, p.far_window, attend, valid=valid)
    elif valid is None and (count == 1 or p.q_start == 0):
        far = attend(p.q, k, v, None, count > 1)
    else:
        columns = torch.arange(end, device=k.device)
        mask = (columns <= columns[p.q_start :, None])[None]
        far = attend(p.q, k, v, (mask if valid is None else mask & valid[:, None])[:, None], False)
    own = None if valid is None else valid[:, end - p.near_k.shape[2] :]
    return mix(far, local(p.q, p.near_k, p.near_v, p.window, attend, valid=own), p.score)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """SDPA with grouped heads, [B, C, H, Dv]; a query that sees nothing gets 0."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if mask is not None:
        out = out.where(mask.any(-1, keepdim=True), 0)
    return out.transpose(1, 2)


def mix(far: Tensor, near: Tensor, score: Tensor) -> Tensor:
    """g far + (1 - g) near with g = sigmoid(score), exactly one of them where g is 1 or 0.

    Args:
        far, near: [B, C, H, Dv].
        score: [B, C, H].
    """
    return torch.lerp(near, far, torch.sigmoid(score)[..., None].to(far.dtype))


def local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    attend: Attend,
    *,
    valid: Tensor | None = None,
    chunk: int | None = None,
    q_start: int = 0,
    row_start: Tensor | None = None,
) -> Tensor:
    """Attend from every query to the last `window` keys, its own included.

    The last C of the N keys are the queries' own. Blocks of at least `window` queries each read their own keys and the
    `window - 1` before them.

    Args:
        q: [B, H, C, D].
        k, v: [B, Hkv, N, ..], N >= C.
        valid: [B, N]; False keys are never attended.
        chunk: attention stays inside chunks of so many columns, counted from `row_start`.
        q_start: column of the first query; `chunk` alone reads it.
        row_start: [B]; None means 0.

    Returns:
        [B, C, H, Dv].
    """
    batch, _, count, _ = q.shape
    reach, block = window - 1, max(window, BLOCK)
    past = k.shape[2] - count
    if past > reach:
        k, v = k[:, :, past - reach :], v[:, :, past - reach :]
        valid, past = None if valid is None else valid[:, past - reach :], reach
    blocks = -(-count // block)
    if blocks == 1:
        block = count
    missing, tail = reach - past, blocks * block - count
    size = block + reach
    device = q.device
    # Place t of a block's keys is `reach` columns behind place t of its queries.
    s, t = torch.arange(block, device=device)[:, None], torch.arange(size, device=device)[None, :]
    mask = ((t >= s) & (t <= s + reach))[None, None]
    if missing or tail:
        k, v = (F.pad(x, (0, 0, missing, tail)) for x in (k, v))
    if valid is not None:
        present = F.pad(valid, (missing, tail)).unfold(1, size, block)
        mask = mask & present[:, :, None]
    elif missing:
        column = torch.arange(blocks, device=device)[:, None] * block + t
        mask = mask & (column >= missing)[None, :, None]
    if chunk is not None:
        column = q_start + torch.arange(blocks, device=device)[:, None] * block
        origin = column.new_zeros(1) if row_start is None else row_start
        own, seen = (
            torch.div(c[None] - origin[:, None, None], chunk, rounding_mode="floor")
            for c in (column + s.T, column + t - reach)
        )
        mask = mask & (own[..., None] == seen[:, :, None])
    if blocks == 1:
        return attend(q, k, v, mask, False)
    q = F.pad(q, (0, 0, 0, tail)) if tail else q
    q = q.unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    k, v = (x.unfold(2, size, block).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    if mask.shape[:2] != (1, 1):
        mask = mask.expand(batch, blocks, -1, -1).flatten(0, 1)[:, None]
    return attend(q, k, v, mask, False).unflatten(0, (batch, blocks)).flatten(1, 2)[:, :count]
