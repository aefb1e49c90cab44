"""The operands of one slot-attention call, shared by the reference, the kernels and the registered ops."""

from typing import NamedTuple

from torch import Tensor

from depthpass_kernels.operands import accumulation_dtype, unit_stride


class Problem(NamedTuple):
    """Operands and options of one call, in the order of the registered ops.

    Args:
        q: [B, Hq, C, D] queries; query c stands at column `q_start + q_offset + c`.
        k: [B, Hkv, N, D] keys; key j stands at column j.
        v: [B, Hkv, N, Dv] values.
        valid: [B, N] bool; False keys are never attended.
        row_start: [B] first real column of each row, the origin of `chunk`; None means 0.
        sinks: [Hq] one more logit per head, in the denominator only.
        q_offset: one-element integer tensor added to `q_start`, for a position that moves; None means 0.
        q_start: column of the first query.
        scale: factor on q·k.
        window: a query sees the last `window` columns, itself included.
        chunk: a query sees its own chunk of `chunk` columns only.
        softcap: logits become `softcap * tanh(logits / softcap)`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    row_start: Tensor | None
    sinks: Tensor | None
    q_offset: Tensor | None
    q_start: int
    scale: float
    window: int | None
    chunk: int | None
    softcap: float | None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    def with_unit_strides(self) -> "Problem":
        """Return the problem with the last axis of q, k, v and valid contiguous, copying only what is not."""
        valid = None if self.valid is None else unit_stride(self.valid)
        return self._replace(q=unit_stride(self.q), k=unit_stride(self.k), v=unit_stride(self.v), valid=valid)

    # Layouts of results depend on shapes alone, so that fake kernels predict the strides.

    def new_output(self) -> Tensor:
        """Allocate [B, Hq, C, Dv] as a view of [B, C, Hq, Dv]: the usual `transpose(1, 2)` is contiguous."""
        batch, heads, length, _ = self.q.shape
        return self.q.new_empty(batch, length, heads, self.v.shape[-1]).transpose(1, 2)

    def new_lse(self) -> Tensor:
        """Allocate the log-sum-exp [B, Hq, C] in the accumulation dtype."""
        return self.q.new_empty(self.q.shape[:3], dtype=accumulation_dtype(self.q.dtype))

    def new_dq(self) -> Tensor:
        """Allocate [B, Hq, C, D] as a view of [B, C, Hq, D], the layout queries usually come in."""
        batch, heads, length, width = self.q.shape
        return self.q.new_empty(batch, length, heads, width).transpose(1, 2)

    def new_dkv(self) -> tuple[Tensor, Tensor]:
        """Allocate dk [B, Hkv, N, D] and dv [B, Hkv, N, Dv]."""
        return self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)
