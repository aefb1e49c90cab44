"""Loop counts that are drawn in training (Huginn)."""

from __future__ import annotations

import math

import torch


def draw(mean: float, sigma: float, low: int, high: int, generator: torch.Generator | None = None) -> int:
    """Draw a loop count: r ~ Poisson(LogNormal(ln mean - sigma^2 / 2, sigma)) + 1, clipped to low..high (Huginn).

    Args:
        mean: of the log-normal rate, so r is ``mean`` + 1 on average before it is clipped.
        generator: on the CPU; None = torch's default one.
    """
    normal = torch.randn((), dtype=torch.float64, generator=generator)
    # Far above the range it is cut off anyway, and a Poisson of an infinite rate is no number.
    rate = torch.exp(math.log(mean) - sigma**2 / 2 + sigma * normal).clamp_max(1e9)
    return min(max(int(torch.poisson(rate, generator=generator)) + 1, low), high)
