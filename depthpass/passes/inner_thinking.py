"""Inner Thinking Transformer (arXiv 2502.13842): extra routed steps inside single blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from depthpass.ir.program import Op, Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.positions import check_positions, positions
from depthpass.passes.streams import Builder, straight

_NEUTRAL = {"sigmoid": 0.5, "tanh": 0.0, "symmetric": 0.0}
"""Weight of a token whose score is 0: the threshold that ``mode="threshold"`` uses."""


@dataclass(frozen=True)
class InnerThinking(Pass):
    """Give chosen blocks K steps: one over all tokens, then K - 1 that only routed tokens take.

    For a block f with input X; every step routes all tokens anew (no token leaves for good):

        Y = f(X);  acc = phi_0 Y;  cur = Y
        step t: w = sigmoid(R_t cur);  acc[sel] += phi_t alpha_t w[sel] f(cur, queries=sel, keys=all);  cur = acc

    Only the queries and the MLP of the routed tokens are computed; keys and values come from all current states.

    rewrite:
        inner_thinking(blocks=[0], steps=2)
        `%1 = block 0 (%0) slot 0`
        ->
        `%1 = block 0 (%0) slot 0`
        `%2 = weigh itt.v0.phi0 (%1)`
        `%3 = linear itt.v0.router1 (%1) out 1 bias false` `%4 = act sigmoid (%3)`
        `%5 = route topk (%4) capacity 0.7 rounding ceil label itt.t1`
        `%6 = block 0 (%1, %5) slot 1` `%7 = gather (%4, %5)` `%8 = mul (%6, %7)`
        `%9 = weigh itt.v0.phi1 (%8) init 0.0` `%10 = scatter (%2, %9, %5)`

    Parameters: ``{scope}.v{visit}.phi{t}.weight`` (of the hidden width; phi_0 starts from 1, the others from 0: the step
    encodings) and ``{scope}.v{visit}.router{t}.weight``. Identity: the initial state.

    Args:
        steps: K, the paper's "x K": one full pass and K - 1 routed steps.
        ratios: share of tokens each of the K - 1 routed steps takes, rounded up; None = 0.7 for all. Only ``topk``.
        blocks: positions of the blocks that think; ``every_other`` one, from the second.
        mode: ``topk`` over the whole row (as published, not causal), or ``threshold``: a score of at least 0, that is
            w >= 0.5 (causal).
        alpha: factor of every routed step, or one for each.
        weight: w = sigmoid(s), tanh(s), or ``symmetric``, 2 sigmoid(s) - 1.
        bypass: tokens that a step does not take get ``none`` of it, or, read ``literally``, phi_t cur.
        keys: queries see the keys of ``all`` current states, or of the ``routed`` tokens only (cheaper).
        taps: return the scores, ``{scope}.v{visit}.t{t}``, and which tokens are taken, ``{scope}.v{visit}.t{t}.taken``.
        scope: first part of the parameter and tap names; ratios are set at run time by ``{scope}.t{t}``.
    """

    name: ClassVar[str] = "inner_thinking"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("steps",)
    loop_field: ClassVar[str | None] = "steps"

    steps: int = 4
    ratios: Sequence[float] | None = None
    blocks: Literal["every_other"] | Sequence[int] = "every_other"
    mode: Literal["topk", "threshold"] = "topk"
    alpha: float | Sequence[float] = 1.0
    weight: Literal["sigmoid", "tanh", "symmetric"] = "sigmoid"
    bypass: Literal["none", "literal"] = "none"
    keys: Literal["all", "routed"] = "all"
    taps: bool = False
    scope: str = "itt"

    def validate(self) -> None:
        n = self.name
        require(self.steps >= 1, f"{n}.steps", "at least 1", self.steps)
        check_positions(n, self.blocks)
        require(self.ratios is None or self.mode == "topk", f"{n}.ratios", "mode='topk' beside it", self.mode)
        if self.ratios is not None:
            require(len(self.ratios) == self.steps - 1, f"{n}.ratios", f"{self.steps - 1} shares", list(self.ratios),
                    "One for each step but the first.")
            require(all(0 < r <= 1 for r in self.ratios), f"{n}.ratios", "shares in (0, 1]", list(self.ratios))
        factors = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * (self.steps - 1)
        require(len(factors) == self.steps - 1, f"{n}.alpha", f"one factor, or {self.steps - 1}", list(factors))
        require(0 not in factors, f"{n}.alpha", "factors other than 0", list(factors))
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        chosen = positions(self.name, self.blocks, len(visits))
        build, x = Builder(program), visits[0].args[0]
        for p, v in enumerate(visits):
            x = build.visit(v, x)
            if p in chosen:
                x = self._think(build, v, p, x)
        return build.splice(visits, x)

    def _think(self, build: Builder, block: Op, position: int, y: str) -> str:
        prefix = f"{self.scope}.v{position}"
        acc, cur = build.emit("weigh", y, parameter=f"{prefix}.phi0"), y
        for t in range(1, self.steps):
            score = build.emit("linear", cur, parameter=f"{prefix}.router{t}", out=1, bias=False)
            w = self._weight(build, score)
            route = self._route(build, w, t)
            if self.taps:
                build.tap(f"{prefix}.t{t}", score, head=False)
                build.tap(f"{prefix}.t{t}.taken", route, head=False)
            if self.keys == "all":
                z = build.visit(block, cur, asks=route)
            else:
                z = build.visit(block, build.emit("gather", cur, route))
            z = build.emit("mul", z, build.emit("gather", w, route))
            alpha = self.alpha[t - 1] if isinstance(self.alpha, tuple) else self.alpha
            if alpha != 1:
                z = build.emit("scale", z, by=alpha)
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

    def _weight(self, build: Builder, score: str) -> str:
        if self.weight == "symmetric":  # 2 sigmoid(s) - 1 = tanh(s / 2)
            score = build.emit("scale", score, by=0.5)
        return build.emit("act", score, fn="sigmoid" if self.weight == "sigmoid" else "tanh")

    def _phi(self, build: Builder, prefix: str, t: int, x: str) -> str:
        return build.emit("weigh", x, parameter=f"{prefix}.phi{t}", init=0.0)

    def _route(self, build: Builder, w: str, t: int) -> str:
        label = f"{self.scope}.t{t}"
        if self.mode == "threshold":
            return build.emit("route", w, rule="threshold", threshold=_NEUTRAL[self.weight], label=label)
        share = 0.7 if self.ratios is None else self.ratios[t - 1]
        return build.emit("route", w, rule="topk", capacity=share, rounding="ceil", label=label)
