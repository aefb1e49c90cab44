"""Ops of a program that look at one token only, in plain torch: what the eager rung runs and what a region's graph holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu,
    "softmax": lambda x: torch.softmax(x, -1),
}


def rms(x: Tensor, eps: float) -> Tensor:
    """``x / rms(x)`` over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
