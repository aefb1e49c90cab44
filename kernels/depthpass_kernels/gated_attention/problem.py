"""The operands of one gated-attention call, shared by the reference, the kernels and the registered ops."""

from typing import NamedTuple

from torch import Tensor

from depthpass_kernels.operands import accumulation_dtype, unit_stride


class Gated(NamedTuple):
    """Operands and options of one call, in the order of the registered ops.

    Args:
        q: [B, Hq, C, D] queries; query c stands at column `q_start + c`.
        k: [B, Hkv, N, D] shared keys; key j stands at column j.
        v: [B, Hkv, N, Dv] their values.
        near_k: [B, Hkv, M, D] own keys; key j stands at column `q_start + C - M + j`.
        near_v: [B, Hkv, M, Dv] their values.
        score: [B, C, Hq] the gate is sigmoid(score).
        valid: [B, N] bool; the tokens of False columns are never attended, in either part.
        q_start: column of the first query.
        scale: factor on q·k.
        window: own keys a query sees, itself included.
        far_window: shared keys a query sees; None = all up to its own column.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    near_k: Tensor
    near_v: Tensor
    score: Tensor
    valid: Tensor | None
    q_start: int
    scale: float
    window: int
    far_window: int | None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def near_start(self) -> int:
        """Column of the first own key."""
        return self.q_start + self.q.shape[2] - self.near_k.shape[2]

    def with_unit_strides(self) -> "Gated":
        """Return the problem with the last axis of every operand contiguous, copying only what is not."""
        fields = {n: unit_stride(getattr(self, n)) for n in ("q", "k", "v", "near_k", "near_v", "score")}
        return self._replace(**fields, valid=None if self.valid is None else unit_stride(self.valid))

    # Layouts of results depend on shapes alone, so that fake kernels predict the strides.

    def new_output(self) -> Tensor:
        """Allocate [B, C, Hq, Dv]."""
        batch, heads, length, _ = self.q.shape
        return self.q.new_empty(batch, length, heads, self.v.shape[-1])

    def new_lse(self) -> Tensor:
        """Allocate a log-sum-exp [B, Hq, C] in the accumulation dtype."""
        return self.q.new_empty(self.q.shape[:3], dtype=accumulation_dtype(self.q.dtype))
