"""Blocks of the kernels of slot attention, and into how many shares the keys are cut."""

from __future__ import annotations

import torch

from depthpass_kernels.launch import Tile, cdiv, power_of_two
from depthpass_kernels.slot_attention.problem import Problem

# Blocks by the wider head dimension, chosen by compiling with triton 3.6 and 3.9: with 16-bit operands none
# spills on sm_80, sm_90, sm_100 with every option on, and sm_80 stays under the 99 KiB of smaller cards. For
# heads of up to 64 and chunks of 4 to 16 tokens with 4 heads per key head, warps and stages of forward and dq
# are the fastest of a sweep on an H200 (docs/benchmarks.md); everything else is not tuned for speed. Float32
# operands are multiplied in full precision on the FMA units, so their tiles are small (dq spills a little above 64).


def forward_tile(problem: Problem) -> Tile:
    """Blocks of the forward kernel."""
    width, rows = _width(problem), _packed_rows(problem)
    if problem.q.element_size() == 4:
        return Tile(min(rows, 32 if width <= 128 else 16), 32 if width <= 64 else 16, warps=8, stages=1)
    if width <= 64 and rows <= 64:
        return Tile(rows, 64, warps=2 if rows == 32 else 4, stages=3)
    if width <= 128:
        m = min(rows, 128)
        return Tile(m, 32 if width == 128 and m >= 64 else 64, warps=8 if m in (32, 128) else 4)
    return Tile(min(rows, 64), 32, warps=8 if rows >= 64 else 4)


def dq_tile(problem: Problem) -> Tile:
    """Blocks of the dq kernel."""
    width, rows = _width(problem), _packed_rows(problem)
    if problem.q.element_size() == 4:
        return Tile(min(rows, 32 if width <= 64 else 16), 32 if width <= 64 else 16, warps=8, stages=1)
    if width <= 128:
        return Tile(min(rows, 64), 64 if width <= 64 else 32, warps=4, stages=3 if width <= 64 and rows == 32 else 2)
    return Tile(min(rows, 64), 16, warps=8 if rows >= 64 else 4)


def dkv_tile(problem: Problem) -> Tile:
    """Blocks of the dk/dv kernel."""
    width, rows = _width(problem), _packed_rows(problem)
    if problem.q.element_size() == 4:
        return Tile(16, 16, warps=4, stages=1)
    if width <= 128:
        return Tile(min(rows, 32), 64, warps=4 if width <= 64 else 8)
    return Tile(min(rows, 32), 32, warps=8, stages=1)


def key_splits(problem: Problem, tile: Tile, programs: int) -> int:
    """Return into how many shares to cut the keys, so that few queries over many keys fill the GPU.

    Two programs per processor, each with at least four key blocks: a guess, not measured.
    """
    if problem.q.device.type != "cuda" or not torch.cuda.is_available():
        return 1
    processors = torch.cuda.get_device_properties(problem.q.device).multi_processor_count
    reach = [problem.k.shape[2]] + [
        w + problem.q.shape[2] for w in (problem.window, problem.chunk) if w is not None
    ]
    return max(1, min(cdiv(2 * processors, max(1, programs)), min(reach) // (4 * tile.n), 32))


def _width(problem: Problem) -> int:
    return max(power_of_two(problem.q.shape[-1]), power_of_two(problem.v.shape[-1]))


def _packed_rows(problem: Problem) -> int:
    return power_of_two(problem.group * problem.q.shape[2])
