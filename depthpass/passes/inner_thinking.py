"""Inner Thinking Transformer (arXiv 2502.13842): extra routed steps inside single blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import Builder, straight


@dataclass(frozen=True)
class InnerThinking(Pass):
    """Give chosen blocks K steps: one over all tokens, then K - 1 that only routed tokens take.

    For a block f with input X; every step routes all tokens anew (nobody leaves for good):

        Y = f(X);  acc = phi_0 Y;  cur = Y
        step t: w = sigmoid(R_t cur);  acc[sel] += phi_t alpha w[sel] f(cur)[sel];  cur = acc

    Routed tokens query the keys of *all* current states, so the program visits the block with all tokens and gathers
    the routed ones from the result; only those queries are needed.

    rewrite:
        inner_thinking(layers=[0], steps=2)
        `%1 = block 0 (%0) slot 0`
        ->
        `%1 = block 0 (%0) slot 0`
        `%2 = weigh itt.v0.phi0 (%1)`
        `%3 = linear itt.v0.router1 (%1) out 1 bias false` `%4 = act sigmoid (%3)`
        `%5 = route topk (%4) capacity 0.7 rounding ceil`
        `%6 = block 0 (%1) slot 1` `%7 = gather (%6, %5)` `%8 = gather (%4, %5)` `%9 = mul (%7, %8)`
        `%10 = weigh itt.v0.phi1 (%9) init 0.0` `%11 = scatter (%2, %10, %5)`

    Parameters: ``{scope}.v{visit}.phi{t}.weight`` (of the hidden width; phi_0 starts from 1, the others from 0) and
    ``{scope}.v{visit}.router{t}.weight``. Identity: the initial state.

    Args:
        layers: positions of the blocks that think; None = every other one, from the second.
        steps: K.
        ratios: share of tokens each of the K - 1 routed steps takes, rounded up; None = 0.7 for all. Only ``topk``.
        mode: ``topk`` over the whole row (as published, not causal), or ``threshold``: w >= 0.5 (causal).
        alpha: factor of every routed step.
        bypass: tokens that a step does not take get ``none`` of it, or, read ``literally``, phi_t cur.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "inner_thinking"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("steps",)
    loop_field: ClassVar[str | None] = "steps"

    layers: tuple[int, ...] | None = None
    steps: int = 3
    ratios: tuple[float, ...] | None = None
    mode: Literal["topk", "threshold"] = "topk"
    alpha: float = 1.0
    bypass: Literal["none", "literal"] = "none"
    scope: str = "itt"

    def validate(self) -> None:
        n = self.name
        require(self.steps >= 1, f"{n}.steps", "at least 1", self.steps)
        require(self.layers != (), f"{n}.layers", "at least one position", [])
        for layers in (self.layers or (),):
            require(len(set(layers)) == len(layers), f"{n}.layers", "positions that differ", list(layers))
            require(min(layers, default=0) >= 0, f"{n}.layers", "positions of at least 0", list(layers))
        require(self.ratios is None or self.mode == "topk", f"{n}.ratios", "mode='topk' beside it", self.mode)
        if self.ratios is not None:
            require(len(self.ratios) == self.steps - 1, f"{n}.ratios", f"{self.steps - 1} shares", list(self.ratios),
                    "One for each step but the first.")
            require(all(0 < r <= 1 for r in self.ratios), f"{n}.ratios", "shares in (0, 1]", list(self.ratios))
        require(self.alpha != 0, f"{n}.alpha", "a factor other than 0", self.alpha)
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        layers = tuple(range(1, len(visits), 2)) if self.layers is None else self.layers
        if not layers or max(layers) >= len(visits):
            raise PassError(f"inner_thinking.layers: expected positions in 0..{len(visits) - 1}, got {list(layers)}.")
        build, x = Builder(program), visits[0].args[0]
        for p, v in enumerate(visits):
            x = build.visit(v, x)
            if p in layers:
                x = self._think(build, v, p, x)
        return build.splice(visits, x)

    def _think(self, build: Builder, block: Op, position: int, y: str) -> str:
        prefix = f"{self.scope}.v{position}"
        acc, cur = build.emit("weigh", y, parameter=f"{prefix}.phi0"), y
        for t in range(1, self.steps):
            score = build.emit("linear", cur, parameter=f"{prefix}.router{t}", out=1, bias=False)
            w = build.emit("act", score, fn="sigmoid")
            route = self._route(build, w, t)
            z = build.emit("gather", build.visit(block, cur), route)
            z = build.emit("mul", z, build.emit("gather", w, route))
            if self.alpha != 1:
                z = build.emit("scale", z, by=self.alpha)
            z = self._phi(build, prefix, t, z)
            if self.bypass == "literal":
                # Everybody gets phi_t cur first; routed tokens are then set to what they have without it.
                z = build.emit("add", build.emit("gather", acc, route), z)
                everyone = build.emit("add", acc, self._phi(build, prefix, t, cur))
                acc = build.emit("scatter", everyone, z, route, mode="replace")
            else:
                acc = build.emit("scatter", acc, z, route)
            cur = acc
        return acc

    def _phi(self, build: Builder, prefix: str, t: int, x: str) -> str:
        return build.emit("weigh", x, parameter=f"{prefix}.phi{t}", init=0.0)

    def _route(self, build: Builder, w: str, t: int) -> str:
        if self.mode == "threshold":
            return build.emit("route", w, rule="threshold")
        share = 0.7 if self.ratios is None else self.ratios[t - 1]
        return build.emit("route", w, rule="topk", capacity=share, rounding="ceil")
