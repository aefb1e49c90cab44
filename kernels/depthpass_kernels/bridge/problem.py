"""The operands of one bridge entry, shared by the reference, the kernels and the registered ops."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from depthpass_kernels.operands import accumulation_dtype


@dataclass(frozen=True)
class BridgeIn:
    """Operands and options of one call.

    Args:
        x: [..., dim] hidden stream.
        c: [..., r] delayed low-rank stream.
        weight: [dim, r] up-projection.
        bias: [dim] or None.
        present: [...] bool, False where the delay reaches before the row's first real token; None: nowhere.
        norm_weight: [dim] scale of the RMS norm that follows, or None for no norm.
        gain: factor on the stream.
        eps: added to the mean square.
        norm_offset: added to `norm_weight` (1 for the Gemma family).
    """

    x: Tensor
    c: Tensor
    weight: Tensor
    bias: Tensor | None
    present: Tensor | None
    norm_weight: Tensor | None
    gain: float
    eps: float
    norm_offset: float

    def new_outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate y, z [..., dim] and rstd [...], in the accumulation dtype; both empty without a norm."""
        y = self.x.new_empty(self.x.shape)
        shape, stat = (0, 0) if self.norm_weight is None else (self.x.shape, self.x.shape[:-1])
        return y, self.x.new_empty(shape), self.x.new_empty(stat, dtype=accumulation_dtype(self.x.dtype))

    def new_gradients(self, needed: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Allocate the gradients of x, c, weight, bias, norm_weight; those not needed are empty."""
        of = (self.x, self.c, self.weight, self.bias, self.norm_weight)
        dx, dc, dweight, dbias, dnorm = (
            self.x.new_empty(0) if p is None or not wanted else p.new_empty(p.shape)
            for p, wanted in zip(of, needed, strict=True)
        )
        return dx, dc, dweight, dbias, dnorm
