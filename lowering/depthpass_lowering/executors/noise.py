"""Noise that a token keeps: a function of its place in the row, not of how the row was cut into calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 16
"""Places that share one generator."""


def noise(number: int, places: Tensor, width: int) -> Tensor:
    """Standard normal noise in float32 on the CPU, ``[*places.shape, width]``.

    The same on every machine, for every row and in every call: cached decoding, beams and whole rows agree.

    Args:
        number: which noise of the program.
        places: token numbers of a row, from 0.
    """
    first, last = (int(p) // BLOCK for p in places.aminmax())
    table = torch.cat([_block(number, b, width) for b in range(first, last + 1)])
    return table[places.cpu() - first * BLOCK]


def cut_off(x: Tensor, cut: float | None) -> Tensor:
    """Draws of a standard normal distribution as draws of one that is cut off at ``cut`` on both sides; None = as they are.

    The two distribution functions are matched, so nothing is thrown away: a draw stays a function of its place.
    """
    if cut is None:
        return x
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    inside = torch.erfinv(torch.erf(precise / math.sqrt(2)) * math.erf(cut / math.sqrt(2))) * math.sqrt(2)
    return inside.clamp(-cut, cut).to(x.dtype)


def _block(number: int, block: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed((number << 32) + block)
    return torch.randn(BLOCK, width, generator=generator)
