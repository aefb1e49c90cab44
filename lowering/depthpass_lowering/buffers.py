"""Static key-value buffers of the token loop, written in place, with gradient accumulators beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Buffer:
    """Keys and values of one attention call of one slot over all columns of a forward pass.

    Attributes:
        k, v: ``[batch, kv_heads, columns, dim]``; columns from ``first`` up to the running one are written.
    """

    def __init__(self, before: tuple[Tensor, Tensor] | None, columns: int, first: int = 0):
        self.before, self.columns, self.first = before, columns, first
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.gk: Tensor | None = None
        self.gv: Tensor | None = None
        # Orders the backward passes of all uses of this buffer: later columns first.
        self.token: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        """Write the keys and values of the columns from ``start`` on."""
        if self.k is None:
            self.k = k.new_empty(k.shape[0], k.shape[1], self.columns, k.shape[3])
            self.v = v.new_empty(v.shape[0], v.shape[1], self.columns, v.shape[3])
            if self.before is not None:
                past = slice(self.first, self.first + self.before[0].shape[2])
                self.k[:, :, past], self.v[:, :, past] = self.before
        self.k[:, :, start : start + k.shape[2]] = k
        self.v[:, :, start : start + v.shape[2]] = v

    def accumulate(self, gk: Tensor, gv: Tensor, low: int, high: int) -> None:
        if self.gk is None:
            self.gk, self.gv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        self.gk[:, :, low:high] += gk
        self.gv[:, :, low:high] += gv


class Use:
    """One attention over a buffer: which columns, which mask, and the function that computes it."""

    __slots__ = ("attend", "buffer", "count", "low", "start", "write")

    def __init__(self, buffer: Buffer, start: int, count: int, low: int, write: bool, attend: Callable):
        self.buffer, self.start, self.count, self.low, self.write, self.attend = (
            buffer, start, count, low, write, attend
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Attention of the span's queries; writes the span's own keys and values first when this is their slot."""
        if not torch.is_grad_enabled():
            if self.write:
                self.buffer.write(k, v, self.start)
            return self.attend(q, *self.view(), sinks)
        token = self.buffer.token if self.buffer.token is not None else q.new_empty(0)
        out, self.buffer.token = _InPlaceAttention.apply(q, k, v, sinks, token, self)
        return out

    def view(self) -> tuple[Tensor, Tensor]:
        high = self.start + self.count
        return self.buffer.k[:, :, self.low : high], self.buffer.v[:, :, self.low : high]


class _InPlaceAttention(torch.autograd.Function):
    """Attention over a buffer that is written in place.

    Nothing of the buffer is saved: a column's content never changes once written, so the backward pass reads it again
    and recomputes the (small) attention of its chunk. Gradients of keys and values are accumulated in the buffer; when
    the columns of a chunk come up, every later use has added its part, because the token chains the uses.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, token, use: Use):
        if use.write:
            use.buffer.write(k.detach(), v.detach(), use.start)
        ctx.use = use
        # A backward pass usually runs outside of autocast: what it recomputes has to run as it did here.
        device = q.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(q, sinks)
        return use.attend(q, *use.view(), sinks), token.new_empty(0)

    @staticmethod
    def backward(ctx, grad, grad_token):
        q, sinks = ctx.saved_tensors
        use: Use = ctx.use
        high = use.start + use.count
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            leaves = [t.detach().requires_grad_() for t in (q, *use.view())]
            if sinks is not None:
                leaves.append(sinks.detach().requires_grad_())
            out = use.attend(*leaves[:3], leaves[3] if sinks is not None else None)
            gq, gk, gv, *gs = torch.autograd.grad(out, leaves, grad)
        use.buffer.accumulate(gk, gv, use.low, high)
        own_k = own_v = None
        if use.write:
            own_k = use.buffer.gk[:, :, use.start : high].clone()
            own_v = use.buffer.gv[:, :, use.start : high].clone()
        return gq, own_k, own_v, gs[0] if gs else None, grad.new_zeros(0), None
