"""Noise that a token keeps: a function of its place in the row, not of how the row was cut into calls."""

from __future__ import annotations

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


def _block(number: int, block: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed((number << 32) + block)
    return torch.randn(BLOCK, width, generator=generator)
