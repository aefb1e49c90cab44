"""What an arm costs, by the report's own counts."""

from __future__ import annotations

from typing import Any

import depthpass as dp

QUANTITIES = {
    "FLOPs forward": "FLOPs forward", "weight bytes": "weight bytes forward", "KV bytes": "KV bytes",
    "line bytes": "delay line bytes",
}
"""Column -> quantity of the report."""


def step_flops(model: Any, length: int, rows: int) -> float:
    """Forward and backward of a batch."""
    cost = dp.report(model, seq_len=length, batch=rows).cost
    assert cost is not None
    return sum(cost.at(name, length, rows) for name in ("FLOPs forward", "FLOPs backward"))


def costs(model: Any, length: int) -> dict[str, Any]:
    """Parameters, depth, and FLOPs and bytes of one row of ``length`` tokens."""
    report = dp.report(model, seq_len=length)
    assert report.cost is not None
    totals = {column: report.cost.at(name, length) for column, name in QUANTITIES.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "depth": report.depth_at(length),
        "visits": report.visits, "length": length, **totals,
    }
