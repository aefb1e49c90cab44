"""What all implementations agree on about operands: the accumulation dtype and the layout kernels read."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """Return `x`, copied only if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
