"""How fast the sweeps of a serial region contract, measured against its exact solution."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.schedule.fixed_point import FixedPoint, Measure
from depthpass.schedule.regions import Region
from depthpass_lowering.eager import Run
from depthpass_lowering.fixed_point import Sweeping, Swept
from depthpass_lowering.sweeps import Solver, Sweeper


@dataclass(frozen=True)
class Sweep:
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
    sweeps: tuple[Sweep, ...]


def start(policy: FixedPoint | Measure | None) -> Any:
    """What runs the sweeps of one call and keeps their record, or measures them; None = the sequential schedule."""
    if policy is None:
        return None
    return Sweeping(policy) if isinstance(policy, FixedPoint) else Measuring(policy)


class Measuring:
    """Runs serial regions in the token loop and measures what sweeps would do."""

    def __init__(self, measure: Measure):
        self.limit = measure.sweeps
        self.policy = FixedPoint(window=1)
        self.solves: list[Measured] = []

    def on(self, rung: type[Run]):
        return functools.partial(_measured(rung), self)


@functools.cache
def _measured(rung: type[Run]) -> type[Run]:
    return type(f"Measured{rung.__name__}", (_MeasuredRun, Swept, rung), {})


class _MeasuredRun(Swept):
    def _region(self, region: Region, reads: Sequence[str], results: frozenset[str]) -> None:
        if not region.serial or self.count <= region.chunk:
            return super()._region(region, reads, results)
        if reason := self.unswept(region):
            raise LoweringError(f"contraction cannot be measured: {reason}.")
        wanted = [o.name for o in region.ops if o.name in results]
        inputs = {a: self.env[a] for o in region.ops for a in o.args if a in self.env}
        sweeper = Sweeper(self, region, wanted)
        exact = Solver(sweeper, self.sweeping.policy)
        before = self.state.fork()
        exact.solve(inputs, self.state)
        values = {n: torch.cat(parts, 1) for n, parts in exact.pieces.items()}
        found = self._sweeps(sweeper, inputs, before, values)
        made = exact.made
        self.sweeping.solves.append(Measured(made.blocks, made.tokens, made.chunk, made.chunks, found))
        self.env |= {n: values[n] for n in wanted}
        return None

    def _sweeps(self, sweeper: Sweeper, inputs: dict[str, Tensor], before: Any, values: dict[str, Tensor]):
        whole = sweeper.span(0, self.count)
        inner = sweeper.inner(before.fork())
        right = sweeper.inject(inner, {s: values[s] for s in sweeper.sources}, whole)
        c = sweeper.first(inner, whole)
        chunks = -(-self.count // sweeper.region.chunk)
        found: list[Sweep] = []
        floor = 8 * max(torch.finfo(x.dtype).eps for x in right.values())
        for hops in range(min(chunks, self.sweeping.limit or chunks)):
            local = sweeper.sweep(sweeper.inner(before.fork()), inputs, c, whole)
            after = sweeper.inject(inner, {s: local[s] for s in sweeper.sources}, whole)
            results = {n: local[n] for n in sweeper.wanted} or {s: local[s] for s in sweeper.sources}
            found.append(Sweep(
                hops, self._distance(c, after), self._distance(c, right), self._distance(results, values)
            ))
            if found[-1].error <= floor:
                break
            c = after
        return tuple(found)

    def _distance(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
        """Largest relative distance of the values named in ``x``, over real tokens."""
        worst = 0.0
        real = None if self.valid is None else self.valid[:, self.length :, None]
        for name, a in x.items():
            b = y[name].double()
            apart = a.double() - b
            if real is not None:
                apart, b = apart.where(real, apart.new_zeros(())), b.where(real, b.new_zeros(()))
            size, moved = float(b.norm()), float(apart.norm())
            worst = max(worst, 0.0 if moved == 0 else moved / size if size else math.inf)
        return worst
