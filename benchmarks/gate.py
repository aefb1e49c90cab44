"""The gate before a timing: a variant's numbers against its oracle's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from declare import Answer
from torch import Tensor

GRADIENT = "gradient of "
TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Relative errors of whole tensors that rounding explains in models of tens of blocks."""
SMALL = 1e-3
"""A gradient this much smaller than the largest one is held to that share of the largest one: it nearly vanishes."""


@dataclass(frozen=True)
class Gate:
    """How far a variant's numbers are from the right ones.

    Attributes:
        outputs, gradients: largest relative error of one tensor; None = there were none.
        where: the tensor that is furthest off.
    """

    outputs: float | None
    gradients: float | None
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return max(e for e in (self.outputs, self.gradients) if e is not None) <= self.tolerance

    def __str__(self) -> str:
        errors = [f"{name} {e:.0e}" for name, e in (("outputs", self.outputs), ("gradients", self.gradients)) if e is not None]
        return ", ".join(errors)


def check(got: Answer, want: Answer, tolerance: float) -> Gate:
    """Compare all that the oracle answers. A gradient that only one of them has is compared with zero.

    Raises:
        ValueError: the oracle answers nothing, or something that the variant does not.
    """
    if not want:
        raise ValueError("the oracle answers nothing, so nothing can be held against it")
    outputs = {n: _error(_result(got, n), w) for n, w in want.items() if not n.startswith(GRADIENT)}
    gradients = _gradients(got, want)
    errors = outputs | gradients
    where = max(errors, key=lambda n: errors[n])
    worst = (max(each.values()) if each else None for each in (outputs, gradients))
    return Gate(*worst, tolerance, where)


def _gradients(got: Answer, want: Answer) -> dict[str, float]:
    norms = [w.double().norm().item() for n, w in want.items() if n.startswith(GRADIENT)]
    if not norms:
        return {}
    least = SMALL * max(norms)
    names = [n for n in got | want if n.startswith(GRADIENT)]
    return {n: _error(got.get(n), want.get(n), least) for n in names}


def _result(answer: Answer, name: str) -> Tensor:
    if name not in answer:
        raise ValueError(f"the oracle answers {name!r}, the variant only {', '.join(sorted(answer))}")
    return answer[name]


def _error(got: Tensor | None, want: Tensor | None, least: float = 1e-30) -> float:
    """Norm of the error by that of the right value; infinite if anything is not finite."""
    if got is None or want is None:
        got = torch.zeros_like(want) if got is None else got
        want = torch.zeros_like(got) if want is None else want
    if got.shape != want.shape:
        raise ValueError(f"shape {tuple(got.shape)}, the oracle's is {tuple(want.shape)}")
    got, want = got.double(), want.double()
    error = ((got - want).norm() / want.norm().clamp_min(least)).item()
    return error if math.isfinite(error) else math.inf
