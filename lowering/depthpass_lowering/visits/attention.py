"""Attention of a span of queries against a slot, with masks made from columns, validity, window and chunk.

On a full sequence without a cache the calls below are the ones transformers makes for its ``sdpa`` and ``eager``
implementations, so that an identity program gives the stock model's bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from depthpass_kernels.gated_attention.naive import Blocks
from torch import Tensor


@dataclass
class Masks:
    """Masks of one span, made once per (window, chunk) and shared by all visits of the span.

    Attributes:
        start, count: the queries' columns.
        valid: validity of the keys ``0 .. start+count-1``, ``[batch, n]``; None = all real.
        ahead: how far queries see ahead, see :attr:`depthpass.ir.program.Program.ahead`; None = causal.
    """

    start: int
    count: int
    valid: Tensor | None
    device: torch.device
    ahead: int | None = None
    _made: dict = field(default_factory=dict)

    def get(self, window: int | None, chunk: int | None, first: int = 0) -> tuple[Tensor | None, bool]:
        """``(mask, is_causal)``: a bool mask ``[batch or 1, 1, queries, keys]`` or None, and SDPA's causal flag.

        Args:
            first: column of the first key.
        """
        key = window, chunk, first
        if key not in self._made:
            self._made[key] = self._make(window, chunk, first)
        return self._made[key]

    def last(self, keys: int) -> Tensor | None:
        """Which of the last keys are real, ``[batch, 1, 1, keys]``; None = all."""
        return None if self.valid is None else self.valid[:, None, None, self.valid.shape[1] - keys :]

    def blocks(
        self, window: int, chunk: int | None, keys: int, group: int, dtype: torch.dtype | None, batch: int
    ) -> Blocks:
        """How the queries read a window of the last ``keys`` keys, in blocks; see its ``plan``."""
        key = "blocks", window, chunk, keys, group, dtype, batch
        if key not in self._made:
            self._made[key] = Blocks.plan(
                batch, self.count, keys, window, self.device, chunk=chunk, q_start=self.start,
                valid=None if self.valid is None else self.valid[:, self.valid.shape[1] - keys :],
                row_start=None if chunk is None else self.row_start, group=group, dtype=dtype,
            )
        return self._made[key]

    def _make(self, window: int | None, chunk: int | None, first: int) -> tuple[Tensor | None, bool]:
        keys = self.start + self.count
        local = window if window is not None else chunk
        if self.ahead is not None and self.valid is None and (local is None or keys <= local) and (
            not self.ahead or self.start // self.ahead == (keys - 1) // self.ahead
        ):
            return None, False  # all queries see all keys
        if self.ahead is None and self.valid is None and (local is None or keys < local) and (self.count == 1 or self.start == 0):
            return None, self.count > 1
        q = torch.arange(self.start, keys, device=self.device)[:, None]
        k = torch.arange(first, keys, device=self.device)[None, :]
        valid = self.valid if self.valid is None or not first else self.valid[:, first:]
        return column_mask(q[None], k[None], window, chunk, valid, self.row_start, self.ahead)[:, None], False

    @cached_property
    def row_start(self) -> Tensor | None:
        """First real column of each row, ``[batch]``; None = 0."""
        return None if self.valid is None else (self.valid.long().cumsum(-1) == 0).sum(-1)


def column_mask(
    q: Tensor, k: Tensor, window: int | None, chunk: int | None, valid: Tensor | None, row_start: Tensor | None,
    ahead: int | None = None,
) -> Tensor:
    """Which keys each query sees: ``[batch or 1, queries, keys]`` bool.

    Args:
        q: query columns ``[batch or 1, queries, 1]``; k: key columns ``[batch or 1, 1, keys]``.
        ahead: None = no later key, 0 = all of them, else those up to the end of the query's block of so many tokens.
    """
    begin = 0 if row_start is None else row_start[:, None, None]
    if ahead is None:
        mask = k <= q
    elif ahead:
        mask = (k - begin) // ahead <= (q - begin) // ahead
    else:
        mask = (k == k) & (q == q)
    if window is not None:
        mask = mask & (k > q - window)
        if ahead is not None:
            mask = mask & (k < q + window)
    if chunk is not None:
        mask = mask & ((k - begin) // chunk == (q - begin) // chunk)
    return mask if valid is None else mask & valid[:, None, :]


def additive(mask: Tensor | None, causal: bool, count: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A bool mask as the float mask that transformers adds to the logits.

    Its lowest value is one that float32 has too: layers that take their softmax in float32 would make infinity of float64's, and
    NaN of the queries that see nothing (padding), which reaches every token of the row through the values.
    """
    if mask is None and causal:
        mask = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None:
        return None
    return torch.where(mask, torch.zeros((), device=device, dtype=dtype),
                       max(torch.finfo(dtype).min, torch.finfo(torch.float32).min))


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention with grouped heads: q ``[B, H, C, D]``, k, v ``[B, Hkv, N, D]`` -> ``[B, C, H, Dv]``."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1 and not torch.is_grad_enabled():
        # Heads that share keys are queries of one head: nothing is repeated, and keys are read once.
        out = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], groups, -1), k, v, attn_mask=mask, scale=scale)
        return out.reshape(len(q), 1, q.shape[1], -1)
    shared = groups > 1 and mask is None and k.shape[-1] == v.shape[-1] <= 256
    if groups > 1 and not shared:
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal, enable_gqa=shared
    )
    return out.transpose(1, 2).contiguous()


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """``[B, Hkv, N, D]`` -> ``[B, Hkv * groups, N, D]``, each head repeated in place."""
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, groups, n, d).reshape(b, h * groups, n, d)
