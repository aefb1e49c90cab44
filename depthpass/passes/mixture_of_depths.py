"""Mixture-of-Depths (arXiv 2404.02258): blocks that only some tokens pass through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from depthpass.ir.program import Op, Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.positions import check_positions, positions
from depthpass.passes.streams import Builder, straight
from depthpass.passes.thresholds import check_thresholds, threshold_of


@dataclass(frozen=True)
class MixtureOfDepths(Pass):
    """Chosen blocks f run for a share of the tokens only; the others pass by unchanged.

        r = theta x;   x[sel] <- x[sel] + r[sel] f(x[sel])

    ``sel`` are the top-k of the row (as published, not causal), or those with r of at least a threshold (causal).

    rewrite:
        mixture_of_depths(blocks=[0])
        `%1 = block 0 (%0) slot 0`
        ->
        `%1 = linear mod.v0.router (%0) out 1 bias false` `%2 = route topk (%1) capacity 0.125 label mod`
        `%3 = gather (%0, %2)` `%4 = block 0 (%3) slot 0` `%5 = gather (%1, %2)` `%6 = mul (%4, %5)`
        `%7 = scatter (%0, %6, %2)`

    Parameters: ``{scope}.v{visit}.router.weight``. Identity: none.

    Args:
        capacity: share of a row's tokens that a block takes, rounded down, at least one token. Only ``topk``.
        blocks: positions of the routed blocks; ``every_other`` one, from the second.
        mode: ``topk`` or ``threshold``, a score of at least ``threshold``.
        threshold: one number, or one for every routed block (``depthpass.calibrate`` sets them). Mode ``threshold``.
        combine: ``paper``: f is the whole block, its residual included; ``delta``: what the block adds, f(x) - x.
        weight: ``linear``: r itself; ``sigmoid``: sigmoid(r).
        aux: coefficient of the loss ``{scope}.aux``, the router's cross-entropy against the choice, which prepares it
            for ``threshold``. Mode ``topk``.
        taps: return the scores, ``{scope}.v{visit}``, and which tokens are taken, ``{scope}.v{visit}.taken``.
        scope: first part of the parameter, loss and tap names; the capacity is set at run time by this name.
    """

    name: ClassVar[str] = "mixture_of_depths"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("capacity",)

    capacity: float = 0.125
    blocks: Literal["every_other"] | Sequence[int] = "every_other"
    mode: Literal["topk", "threshold"] = "topk"
    threshold: float | tuple[float, ...] = 0.0
    combine: Literal["paper", "delta"] = "paper"
    weight: Literal["linear", "sigmoid"] = "linear"
    aux: float = 1e-3
    taps: bool = False
    scope: str = "mod"

    def validate(self) -> None:
        n = self.name
        require(0 < self.capacity <= 1, f"{n}.capacity", "a share in (0, 1]", self.capacity)
        require(self.mode == "topk" or self.capacity == 0.125, f"{n}.capacity", "mode='topk' beside it", self.mode)
        require(self.mode == "threshold" or self.threshold == 0, f"{n}.threshold", "mode='threshold' beside it", self.mode)
        check_positions(n, self.blocks)
        require(self.aux >= 0, f"{n}.aux", "a number of at least 0", self.aux)
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        chosen = positions(self.name, self.blocks, len(visits))
        build, x = Builder(program), visits[0].args[0]
        for p, v in enumerate(visits):
            x = self._routed(build, v, p, x) if p in chosen else build.visit(v, x)
        check_thresholds(self.name, build, self.threshold)
        return build.splice(visits, x)

    def _routed(self, build: Builder, block: Op, position: int, x: str) -> str:
        prefix = f"{self.scope}.v{position}"
        score = build.emit("linear", x, parameter=f"{prefix}.router", out=1, bias=False)
        rule = {"rule": "topk", "capacity": self.capacity}
        if self.mode == "threshold":
            rule = {"rule": "threshold", "threshold": threshold_of(build, self.threshold)}
        route = build.emit("route", score, **rule, label=self.scope)
        if self.mode == "topk":
            build.loss("bce", f"{self.scope}.aux", self.aux, score, route)
        if self.taps:
            build.tap(prefix, score, head=False)
            build.tap(f"{prefix}.taken", route, head=False)
        h = build.emit("gather", x, route)
        y = build.visit(block, h)
        if self.combine == "delta":
            y = build.emit("add", y, build.emit("scale", h, by=-1.0))
        w = build.emit("act", score, fn="sigmoid") if self.weight == "sigmoid" else score
        return build.emit("scatter", x, build.emit("mul", y, build.emit("gather", w, route)), route)
