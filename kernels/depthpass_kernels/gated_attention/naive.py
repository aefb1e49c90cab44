"""Gated attention in plain torch: the reference of the kernel, and what runs everywhere.

Differentiable as it stands. Memory is linear in the number of queries: the window is read block by block, and where
nothing is padded the shared keys are read with SDPA's causal flag, so no queries x keys mask exists.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from depthpass_kernels.gated_attention.problem import Gated

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
"""(q [B, H, C, D], k [B, Hkv, N, D], v, mask [B or 1, 1, C, N] or None, causal) -> [B, C, H, Dv]."""

BLOCK = 32
"""Queries of a block are a multiple of this: smaller products do not pay, and SDPA on the CPU is a fifth faster for
such a number of keys."""


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
    q: Tensor, k: Tensor, v: Tensor, window: int, attend: Attend, *, valid: Tensor | None = None, chunk: int | None = None,
    q_start: int = 0, row_start: Tensor | None = None,
) -> Tensor:
    """Attend from every query to the last `window` keys, its own included: [B, C, H, Dv].

    Args:
        q: [B, H, C, D].
        k, v: [B, Hkv, N, ..], N >= C; the last C keys are the queries' own.
        valid, chunk, q_start, row_start: see `Blocks.plan`.
    """
    blocks = Blocks.plan(
        q.shape[0], q.shape[2], k.shape[2], window, q.device, valid=valid, chunk=chunk, q_start=q_start,
        row_start=row_start,
    )
    return blocks.read(q, k, v, attend)


@dataclass(frozen=True)
class Blocks:
    """How C queries read a window of keys: in blocks of about half a window, each with its own keys and those before it.

    No query is multiplied with more than about twice the window. One plan serves every attention of these columns.

    Attributes:
        count: C.
        blocks, block: number of blocks and queries in each.
        lead: keys before a block's own that it reads.
        past: keys before the first query that are there and read, at most `lead`.
        mask: which keys a block's queries see, [B * blocks or 1, 1, group * block, lead + block], bool or additive.
        group: query heads that are multiplied together with one key head, as more queries.
    """

    count: int
    blocks: int
    block: int
    lead: int
    past: int
    mask: Tensor
    group: int = 1

    @classmethod
    def plan(
        cls,
        batch: int,
        count: int,
        keys: int,
        window: int,
        device: torch.device,
        *,
        valid: Tensor | None = None,
        chunk: int | None = None,
        q_start: int = 0,
        row_start: Tensor | None = None,
        group: int = 1,
        dtype: torch.dtype | None = None,
    ) -> "Blocks":
        """Choose blocks and make their mask.

        Args:
            keys: N, of which the last C are the queries' own.
            valid: [B, N]; False keys are never attended.
            chunk: attention stays inside chunks of so many columns, counted from `row_start`.
            q_start: column of the first query; `chunk` alone reads it.
            row_start: [B]; None means 0.
            group: query heads per key head, to be multiplied together; the caller's attention then sees as many heads
                as there are key heads.
            dtype: make the mask additive, of this dtype; None = bool.
        """
        reach, block = window - 1, _up(-(-window // 2), BLOCK)
        blocks = -(-count // block)
        if blocks == 1:
            block = count
        # The reach, and what makes the number of keys even.
        size = _up(block + reach, BLOCK)
        lead = size - block if blocks > 1 and 4 * size <= 5 * (block + reach) else reach
        size, past = block + lead, min(lead, keys - count)
        # Place t of a block's keys is `lead` columns behind place t of its queries.
        s = torch.arange(block, device=device)[:, None]
        t = torch.arange(size, device=device)[None, :] - lead
        mask = ((t >= s - reach) & (t <= s))[None, None]
        first = torch.arange(blocks, device=device)[:, None] * block
        if valid is not None:
            edges = lead - past, blocks * block - count
            present = F.pad(valid[:, keys - count - past :], edges).unfold(1, size, block)
            mask = mask & present[:, :, None]
        elif past < lead:
            mask = mask & (first + t >= -past)[None, :, None]
        if chunk is not None:
            origin = first.new_zeros(1) if row_start is None else row_start
            own, seen = (
                torch.div(q_start + first + c - origin[:, None, None], chunk, rounding_mode="floor") for c in (s.T, t)
            )
            mask = mask & (own[..., None] == seen[:, :, None])
        if mask.shape[:2] != (1, 1):
            mask = mask.expand(batch, blocks, -1, -1).flatten(0, 1)[:, None]
        mask = mask.repeat(1, 1, group, 1) if group > 1 else mask
        if dtype is not None:
            # The least number, not infinity: a padding query sees nothing, and must not become NaN.
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, torch.finfo(dtype).min)
        return cls(count, blocks, block, lead, past, mask, group)

    def read(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attention of q [B, H, C, D] to k, v [B, Hkv, N, ..]: [B, C, H, Dv]."""
        batch, block, group = q.shape[0], self.block, self.group
        skip, missing, tail = k.shape[2] - self.count - self.past, self.lead - self.past, self.blocks * block - self.count
        k, v = (_framed(x[:, :, skip:], missing, tail) for x in (k, v))
        if self.blocks > 1:
            size = block + self.lead
            q = _framed(q, 0, tail).unflatten(2, (self.blocks, block)).transpose(1, 2).flatten(0, 1)
            k, v = (x.unfold(2, size, block).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
        if group > 1:
            q = q.unflatten(1, (-1, group)).flatten(2, 3)
        out = attend(q, k, v, self.mask, False)
        if group > 1:
            out = out.unflatten(1, (group, block)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return out if self.blocks == 1 else out.unflatten(0, (batch, self.blocks)).flatten(1, 2)[:, : self.count]


def _framed(x: Tensor, before: int, after: int) -> Tensor:
    """Tokens added in front and behind, which nobody sees."""
    return F.pad(x, (0, 0, before, after)) if before or after else x


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
