"""Static key-value buffers of the token loop, written in place, with gradient accumulators beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from depthpass_kernels import slot_attention_backward, slot_attention_forward
from depthpass_kernels.slot_attention import chunk
from depthpass_kernels.slot_attention.columns import copy_columns
from torch import Tensor


@contextmanager
def outer_mode() -> Iterator[None]:
    """Makes what leaves the chunks that it is made in, which run in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


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
        # Keys and values of one width lie in one tensor [2, batch, kv_heads, columns, dim], and so do their gradients.
        self.both: Tensor | None = None
        self.sums: Tensor | None = None
        # Orders the backward passes of all uses of this buffer: later columns first.
        self.token: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        """Write the keys and values of the columns from ``start`` on."""
        if self.k is None or self.v is None:
            self._make(k, k.shape[3], v.shape[3])
        copy_columns([t.narrow(2, start, k.shape[2]) for t in self.held()], (k, v))

    def write_both(self, kv: Tensor, start: int) -> None:
        """As :meth:`write` of keys and values that lie side by side, ``[batch, tokens, 2, kv_heads, dim]``."""
        if self.both is None:
            self._make(kv[:, :, 0].transpose(1, 2), kv.shape[4], kv.shape[4])
        assert self.both is not None
        self.both.narrow(3, start, kv.shape[1]).copy_(kv.permute(2, 0, 3, 1, 4))

    @outer_mode()
    def _make(self, k: Tensor, keys: int, values: int) -> None:
        batch, heads = k.shape[:2]
        if keys == values:
            self.both = k.new_empty(2, batch, heads, self.columns, keys)
            self.k, self.v = self.both[0], self.both[1]
        else:
            self.k, self.v = (k.new_empty(batch, heads, self.columns, width) for width in (keys, values))
        if self.before is not None:
            past = slice(self.first, self.first + self.before[0].shape[2])
            self.k[:, :, past], self.v[:, :, past] = self.before

    def by_head(self, columns: int) -> Sequence[Tensor]:
        """Keys and values of the first columns, ``[batch * kv_heads, columns, dim]``."""
        return _by_head(self.both, self.held(), columns)

    def gradients_by_head(self, columns: int) -> Sequence[Tensor]:
        """The accumulators beside :meth:`by_head`."""
        return _by_head(self.sums, self.gradients(), columns)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values, once something is written."""
        if self.k is None or self.v is None:
            raise RuntimeError("a buffer is read before it is written")
        return self.k, self.v

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Accumulators beside keys and values, in at least float32."""
        if self.gk is None or self.gv is None:
            k, v = self.held()
            dtype = torch.promote_types(k.dtype, torch.float32)
            with outer_mode():
                if self.both is not None:
                    self.sums = torch.zeros_like(self.both, dtype=dtype)
                    self.gk, self.gv = self.sums[0], self.sums[1]
                else:
                    self.gk, self.gv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        return self.gk, self.gv


def _by_head(both: Tensor | None, sides: Sequence[Tensor], columns: int) -> Sequence[Tensor]:
    if both is not None:
        return both.flatten(1, 2).narrow(2, 0, columns).unbind()
    return [t.flatten(0, 1).narrow(1, 0, columns) for t in sides]


class Use:
    """One attention over a buffer: whose columns, from where, and the options of the attention.

    Args:
        options: of :func:`depthpass_kernels.slot_attention_forward`, without the sinks.
        write: whether the span's keys and values belong into this buffer.
    """

    __slots__ = ("buffer", "count", "options", "start", "write")

    def __init__(self, buffer: Buffer, start: int, count: int, write: bool, options: dict[str, Any]):
        self.buffer, self.start, self.count, self.write, self.options = buffer, start, count, write, options

    def __call__(self, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Attention of the span's queries, ``[B, H, C, D]`` -> ``[B, C, H, Dv]``.

        Writes the span's own keys and values first when this is their slot; else they may be None.
        """
        device = q.device.type
        if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
            # As autocast does to the operands of SDPA; rotary tables have made float32 of some of them.
            dtype = torch.get_autocast_dtype(device)
            q, k, v = q.to(dtype), *(None if t is None else t.to(dtype) for t in (k, v))
        if not torch.is_grad_enabled():
            return self.taped(q, k, v, sinks)[0]
        token = self.buffer.token if self.buffer.token is not None else q.new_empty(0)
        out, self.buffer.token = _InPlaceAttention.apply(q, k, v, sinks, token, self)
        return out.transpose(1, 2)

    def taped(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, AttentionTape | ChunkTape]:
        """As :meth:`__call__`, without autograd: the result, and what its backward pass needs."""
        if self.write and k is not None and v is not None:
            self.buffer.write(k, v, self.start)
        if sinks is None and self.plain(q):
            return self.chunk(q.transpose(1, 2))
        out, lse = self.attend(q, sinks)
        return out.transpose(1, 2), AttentionTape(self, q, sinks, out, lse)

    def plain(self, x: Tensor) -> bool:
        """Whether :meth:`chunk` can be taken; x of the queries' dtype."""
        return chunk.fits(x, self.count, self.start, self.options)

    def chunk(self, q: Tensor) -> tuple[Tensor, ChunkTape]:
        """As :meth:`taped` of a chunk whose queries ``[B, C, H, D]`` see every key before them, its own keys written."""
        k, v = self.buffer.by_head(self.start + self.count)
        out, p = chunk.forward(q, k, v, self.options["scale"])
        return out, ChunkTape(self, q, k, v, p)

    def own(self) -> list[Tensor | None]:
        """Gradients of the span's own keys and values, in their dtype: complete once every use has gone back."""
        if not self.write:
            return [None, None]
        sums = (t.narrow(2, self.start, self.count) for t in self.buffer.gradients())
        return [g.to(t.dtype) for g, t in zip(sums, self.buffer.held())]

    def own_by_token(self) -> Tensor:
        """The same of keys and values of one width, which are its own, ``[batch, tokens, 2 * kv_heads, dim]``."""
        self.buffer.gradients()
        both, sums = self.buffer.both, self.buffer.sums
        assert both is not None and sums is not None
        return sums.narrow(3, self.start, self.count).permute(1, 3, 0, 2, 4).flatten(2, 3).to(both.dtype)

    def attend(self, q: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attention and the log of its denominator."""
        return slot_attention_forward(q, *self.columns(*self.buffer.held()), sinks=sinks, **self.options)

    def columns(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers up to the last query's column."""
        return keys[:, :, : self.start + self.count], values[:, :, : self.start + self.count]


class AttentionTape:
    """What the backward pass of an attention needs: called with the gradient of its result, returns those of q and the sinks.

    Gradients of keys and values are accumulated in the buffer; those of the own ones are complete once every later use has
    added its part, so chunks go back last to first.
    """

    __slots__ = ("lse", "out", "q", "sinks", "use")

    def __init__(self, use: Use, q: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor):
        self.use, self.q, self.sinks, self.out, self.lse = use, q, sinks, out, lse

    def __call__(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        use, buffer = self.use, self.use.buffer
        dq, _, _, dsinks = slot_attention_backward(
            grad.transpose(1, 2), self.q, *use.columns(*buffer.held()), self.out, self.lse,
            into=use.columns(*buffer.gradients()), sinks=self.sinks, **use.options,
        )
        return dq, dsinks


class ChunkTape:
    """The same of a chunk whose queries see every key before them."""

    __slots__ = ("k", "p", "q", "use", "v")

    def __init__(self, use: Use, q: Tensor, k: Tensor, v: Tensor, p: Tensor | None):
        self.use, self.q, self.k, self.v, self.p = use, q, k, v, p

    def __call__(self, grad: Tensor) -> tuple[Tensor, None]:
        sums = self.use.buffer.gradients_by_head(self.k.shape[1])
        dq = chunk.backward(grad, self.q, self.k, self.v, self.p, self.use.options["scale"], *sums)
        return dq.transpose(1, 2), None


class _InPlaceAttention(torch.autograd.Function):
    """Attention over a buffer that is written in place.

    Nothing of the buffer is saved: a column's content never changes once written, so the backward pass reads it again.
    Gradients of keys and values are accumulated in the buffer; when the columns of a chunk come up, every later use has
    added its part, because the token chains the uses.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, token, use: Use):
        if use.write:
            use.buffer.write(k.detach(), v.detach(), use.start)
        out, lse = use.attend(q, sinks)
        ctx.use, ctx.strides = use, [torch.empty_like(t, device="meta").stride() for t in (k, v)] if use.write else ()
        ctx.save_for_backward(q, sinks, out, lse)
        return out, token.new_empty(0)

    @staticmethod
    def backward(ctx, grad, grad_token):
        q, sinks, out, lse = ctx.saved_tensors
        use: Use = ctx.use
        buffer = use.buffer
        keys, values = use.columns(*buffer.held())
        dq, _, _, dsinks = slot_attention_backward(
            grad, q, keys, values, out, lse, into=use.columns(*buffer.gradients()), sinks=sinks,
            **use.options,
        )
        own_k = own_v = None
        if use.write:
            # In the layout of the keys and values themselves: what comes before expects it, and would copy once more.
            own_k, own_v = own = [
                torch.empty_strided((*t.shape[:2], use.count, t.shape[3]), strides, dtype=t.dtype, device=t.device)
                for t, strides in zip(buffer.held(), ctx.strides)
            ]
            copy_columns(own, [g.narrow(2, use.start, use.count) for g in buffer.gradients()])
        return dq, own_k, own_v, dsinks, grad.new_zeros(0), None
