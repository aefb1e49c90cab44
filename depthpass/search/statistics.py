"""Confidence intervals for mean scores and for paired differences of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from depthpass.prompt import in_notebooks

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""

RESAMPLES = 1000

Total = Callable[[Sequence[int]], float]
"""A score of the samples at the given places, which may repeat."""


@in_notebooks
@dataclass(frozen=True)
class Estimate:
    """A score over samples with its 95 % interval.

    Attributes:
        value: the score.
        low, high: the interval; None = not enough samples for one.
        n: samples.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        around = "" if self.low is None or self.high is None else f" [{_short(self.low)}, {_short(self.high)}]"
        return f"{_short(self.value)}{around}"

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927).

    >>> [round(x, 3) for x in wilson(9, 10)]
    [0.596, 0.982]
    """
    p, z2 = right / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(better: int, worse: int, n: int) -> tuple[float, float]:
    """Interval of a difference of shares on the same samples (Agresti and Min 2005): half a sample in each of four cells.

    >>> [round(x, 3) for x in paired(5, 1, 20)]
    [-0.041, 0.405]
    """
    m, b, c = n + 2, better + 0.5, worse + 0.5
    middle = (b - c) / m
    half = Z * math.sqrt((b + c) - (b - c) ** 2 / m) / m
    return max(-1.0, middle - half), min(1.0, middle + half)


def bootstrap(total: Total, n: int, seed: int = 0) -> tuple[float, float] | None:
    """Percentile interval of a score by resampling samples; None with fewer than two of them."""
    if n < 2:
        return None
    rng = random.Random(seed)
    drawn = sorted(total([rng.randrange(n) for _ in range(n)]) for _ in range(RESAMPLES))
    low, high = drawn[round(0.025 * (RESAMPLES - 1))], drawn[round(0.975 * (RESAMPLES - 1))]
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _short(x: float) -> str:
    return f"{x:.3f}" if x == 0 or 1e-3 <= abs(x) < 1e4 else f"{x:.3g}"
