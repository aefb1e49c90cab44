"""How fast the sweeps of a serial region contract, measured against its exact solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.lowered.program import LoweredRegion
from depthpass.schedule.fixed_point import FixedPoint, Measure
from depthpass.schedule.regions import Region
from depthpass_lowering.executors.base import Executor
from depthpass_lowering.executors.context import CallContext
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.executors.fixed_point import SWEEPS, JacobiExecutor, JacobiSchedule, unswept
from depthpass_lowering.executors.sweeps import JacobiSweep, Solver
from depthpass_lowering.state.slots import State


@dataclass(frozen=True)
class MeasuredSweep:
    """One sweep of a region over whole rows.

    Attributes:
        hops: how often a value can have passed a delay in its result: the sweep's number, from 0.
        change: of c by this sweep, relative to c.
        error: of the c it read, relative to the exact c.
        output_error: of the region's results, relative to the exact ones: the largest over the streams it hands on.
    """

    hops: int
    change: float
    error: float
    output_error: float


@dataclass(frozen=True)
class Measured:
    """The sweeps of one region.

    Attributes:
        blocks: physical blocks of its visits.
        tokens, chunk, chunks: columns of the call, of a chunk, and how many chunks that makes.
        sweeps: until the results were exact up to rounding, or the number of chunks.
    """

    blocks: tuple[int, ...]
    tokens: int
    chunk: int
    chunks: int
    sweeps: tuple[MeasuredSweep, ...]


def start(policy: FixedPoint | Measure | None) -> Any:
    """What runs the sweeps of one call and keeps their record, or measures them; None = the sequential schedule."""
    if policy is None:
        return None
    return JacobiSchedule(policy) if isinstance(policy, FixedPoint) else Measuring(policy)


class Measuring:
    """Runs serial regions in the token loop and measures what sweeps would do."""

    def __init__(self, measure: Measure):
        self.limit = measure.sweeps
        self.policy = FixedPoint(window=1)
        self.solves: list[Measured] = []

    def on(self, inner: Executor) -> Executor:
        return _Measured(self.policy, self.solves, inner, self.limit)


class _Measured(JacobiExecutor):
    def __init__(self, policy: FixedPoint, solves: list, inner: Executor, limit: int | None):
        super().__init__(policy, solves, inner)
        self.limit = limit

    def level(self, run: Run, region: Region) -> tuple[str, str | None]:
        if run.context.count <= region.size:
            return self.inner.level(run, region)
        if reason := unswept(run, region):
            raise LoweringError(f"contraction cannot be measured: {reason}.")
        return SWEEPS, None

    def region(self, run: Run, region: LoweredRegion) -> dict[str, Tensor]:
        if region.level != SWEEPS:
            return self.inner.region(run, region)
        inputs = run.streams(region)
        jacobi = JacobiSweep(run, region)
        exact = Solver(jacobi, self.policy)
        before = run.state.fork()
        exact.solve(inputs, run.state)
        values = {n: torch.cat(parts, 1) for n, parts in exact.pieces.items()}
        sweeps = self._sweeps(jacobi, inputs, before, values)
        record = exact.record
        self.solves.append(Measured(record.blocks, record.tokens, record.chunk, record.chunks, sweeps))
        return {n: values[n] for n in region.outputs}

    def _sweeps(self, jacobi: JacobiSweep, inputs: dict[str, Tensor], before: State, values: dict[str, Tensor]):
        count = jacobi.run.context.count
        span = jacobi.span(0, count)
        inner = jacobi.inner(before.fork())
        right = jacobi.inject(inner, {s: values[s] for s in jacobi.sources}, span)
        c = jacobi.first(inner, span)
        chunks = -(-count // jacobi.size)
        sweeps: list[MeasuredSweep] = []
        floor = 8 * max(torch.finfo(x.dtype).eps for x in right.values())
        for hops in range(min(chunks, self.limit or chunks)):
            local = jacobi.sweep(jacobi.inner(before.fork()), inputs, c, span)
            after = jacobi.inject(inner, {s: local[s] for s in jacobi.sources}, span)
            results = {n: local[n] for n in jacobi.wanted} or {s: local[s] for s in jacobi.sources}
            sweeps.append(MeasuredSweep(
                hops, *(_distance(jacobi.run.context, x, y) for x, y in ((c, after), (c, right), (results, values)))
            ))
            if sweeps[-1].error <= floor:
                break
            c = after
        return tuple(sweeps)


def _distance(context: CallContext, x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    """Largest relative distance of the values named in ``x``, over real tokens."""
    worst = 0.0
    real = None if context.valid is None else context.valid[:, context.start :, None]
    for name, a in x.items():
        b = y[name].double()
        apart = a.double() - b
        if real is not None:
            apart, b = apart.where(real, apart.new_zeros(())), b.where(real, b.new_zeros(()))
        size, moved = float(b.norm()), float(apart.norm())
        worst = max(worst, 0.0 if moved == 0 else moved / size if size else math.inf)
    return worst
