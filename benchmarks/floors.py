"""Least ratios to the stock model that a roofline allows (see docs/benchmarks.md): weights read once per product."""

from __future__ import annotations


def floor(F: float, W: float, rows: int, group_rows: list[int], blocks: int, serial: int, block_params: int,
          head_params: int, itemsize: int = 4) -> float:
    """Roofline ratio of a training step with ``serial`` blocks in a token loop; weight gradients sunk.

    Args:
        F, W: FLOP/s of a large product, bytes/s of streamed weights.
        rows: tokens of the batch.
        group_rows: tokens of every chunk.
        block_params, head_params: weights that a token is multiplied with.
    """

    def gemm(n: int, p: int) -> float:
        return max(2 * n * p / F, itemsize * p / W)

    plain = blocks * 3 * gemm(rows, block_params) + 3 * gemm(rows, head_params)
    more = serial * 2 * (sum(gemm(r, block_params) for r in group_rows) - gemm(rows, block_params))
    return 1 + max(more, 0.0) / plain  # chunks never take less than the row; their sum may round below it


def forward_floor(F: float, W: float, rows: int, group_rows: list[int], blocks: int, serial: int, block_params: int,
                  head_params: int, itemsize: int = 4) -> float:
    """Roofline ratio of a forward pass; arguments as in :func:`floor`."""

    def gemm(n: int, p: int) -> float:
        return max(2 * n * p / F, itemsize * p / W)

    head, plain = gemm(rows, head_params), gemm(rows, block_params)
    more = serial * (sum(gemm(r, block_params) for r in group_rows) - plain)
    return 1 + max(more, 0.0) / (blocks * plain + head)
