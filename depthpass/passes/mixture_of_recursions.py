"""Mixture-of-Recursions (arXiv 2507.10524): a shared stack that every token runs as often as a router says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.layer_program import check_range
from depthpass.passes.streams import Builder, straight


@dataclass(frozen=True)
class MixtureOfRecursions(Pass):
    """Run the visits [start, end) up to R times per token; recursion r takes only tokens that r - 1 took.

    With s = theta_r H, w = alpha sigmoid(s) and A_r the active tokens (expert choice):

        H[i] <- H[i] + w[i] Stack(H)[i]   for i in A_r;   unchanged otherwise

    A_r are the top-k of A_(r-1) with k = capacity_r times the tokens of the row (training as published, not causal),
    or those of A_(r-1) with sigmoid(s) >= 0.5 (causal, decodes as it scores).

    rewrite:
        mixture_of_recursions(start=1, end=2, recursions=2), on three blocks
        `0 1 2`  ->  `0`, H = H + w1 block 1 (H), H[A_2] += w2 block 1 (H[A_2]), `2`

    Parameters: ``{scope}.r{r}.router.weight`` (one score, no bias), and ``{scope}.r{r}.strength.weight`` with
    ``combine="delta"``. Identity: none with the paper's combine; ``delta`` starts exactly as the stock model.

    Args:
        start: first position of the shared stack. The default 1 keeps the first and the last visit to themselves
            (Middle-Cycle); start=0 with ``end`` = all visits is Cycle.
        end: one past its last position; None = all but the last visit.
        recursions: R.
        mode: ``topk`` or ``threshold``.
        capacity: share of a row's tokens for each recursion, not growing; None = (R - r + 1) / R. Only ``topk``.
        kv: every recursion has its ``own`` slots, which hold its active tokens only, or reads the keys of the ``first``
            one, which then runs for every token.
        alpha: factor of the router's sigmoid.
        combine: ``paper`` as above; ``delta``: H = Stack(H) in recursion 1 and H + w (Stack(H) - H) after it, with a
            learned strength that starts from 0 in place of alpha.
        taps: hand out the router scores s_r, called ``{scope}.r{r}``, for the auxiliary loss.
        scope: first part of the parameter and tap names.
    """

    name: ClassVar[str] = "mixture_of_recursions"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("recursions",)
    loop_field: ClassVar[str | None] = "recursions"

    start: int = 1
    end: int | None = None
    recursions: int = 3
    mode: Literal["topk", "threshold"] = "topk"
    capacity: tuple[float, ...] | None = None
    kv: Literal["own", "first"] = "own"
    alpha: float = 0.1
    combine: Literal["paper", "delta"] = "paper"
    taps: bool = False
    scope: str = "mor"

    def validate(self) -> None:
        n, caps = self.name, self.capacity
        require(self.start >= 0, f"{n}.start", "a position of at least 0", self.start)
        require(self.end is None or self.end > self.start, f"{n}.end", f"a position above start={self.start}", self.end,
                "Ranges are half-open.")
        require(self.recursions >= 1, f"{n}.recursions", "at least 1", self.recursions)
        require(self.alpha != 0, f"{n}.alpha", "a factor other than 0", self.alpha)
        require(self.alpha == 0.1 or self.combine == "paper", f"{n}.alpha", "combine='paper' beside it", self.combine)
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)
        if caps is None:
            return
        require(self.mode == "topk", f"{n}.capacity", "mode='topk' beside it", self.mode)
        require(len(caps) == self.recursions, f"{n}.capacity", f"{self.recursions} shares", list(caps))
        require(all(0 < c <= 1 for c in caps), f"{n}.capacity", "shares in (0, 1]", list(caps))
        require(list(caps) == sorted(caps, reverse=True), f"{n}.capacity", "shares that do not grow", list(caps),
                "A token that left does not come back.")
        require(caps[0] == 1 or (self.kv == "own" and self.combine == "paper"), f"{n}.capacity",
                "a first share of 1 with kv='first' or combine='delta'", list(caps))

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        end = len(visits) - 1 if self.end is None else self.end
        check_range(self.name, self.start, end, len(visits))
        if end <= self.start:
            raise PassError(f"{self.name}.start: expected a position below end={end}, got {self.start}: the program "
                            f"has {len(visits)} visits. Set end, or start=0 for Cycle.")
        build, x = Builder(program), visits[0].args[0]
        for v in visits[: self.start]:
            x = build.visit(v, x)
        x = self._recursions(build, visits[self.start : end], x)
        for v in visits[end:]:
            x = build.visit(v, x)
        return build.splice(visits, x)

    def _recursions(self, build: Builder, stack: tuple[Op, ...], x: str) -> str:
        slots: list[int] = []
        active = ""
        for r in range(1, self.recursions + 1):
            if r == 1 and self.combine == "delta":
                x = self._stack(build, stack, x, slots, first=True)
                continue
            score = build.emit("linear", x, parameter=f"{self.scope}.r{r}.router", out=1, bias=False)
            if self.taps:
                build.tap(f"{self.scope}.r{r}", score, head=False)
            chance = build.emit("act", score, fn="sigmoid")
            active = self._route(build, chance, active, r)
            if not active:
                y = self._stack(build, stack, x, slots, first=True)
                x = build.emit("add", x, build.emit("mul", y, self._weight(build, chance, r)))
                continue
            h = build.emit("gather", x, active)
            y = self._stack(build, stack, h, slots, first=r == 1)
            if self.combine == "delta":
                y = build.emit("add", y, build.emit("scale", h, by=-1.0))
            w = self._weight(build, build.emit("gather", chance, active), r)
            x = build.emit("scatter", x, build.emit("mul", y, w), active)
        return x

    def _route(self, build: Builder, chance: str, active: str, r: int) -> str:
        """Route of the tokens that take recursion r, nested in those of the one before; empty when all tokens do."""
        nest = (active,) if active else ()
        if self.mode == "threshold":
            # Later recursions read the keys of the first one at every token, so it must run for every token.
            everyone = r == 1 and self.kv == "first"
            return "" if everyone else build.emit("route", chance, *nest, rule="threshold")
        capacity = self.capacity[r - 1] if self.capacity else (self.recursions - r + 1) / self.recursions
        everyone = capacity == 1 and not active
        return "" if everyone else build.emit("route", chance, *nest, rule="topk", capacity=capacity)

    def _weight(self, build: Builder, chance: str, r: int) -> str:
        if self.combine == "delta":
            return build.emit("weigh", chance, parameter=f"{self.scope}.r{r}.strength", init=0.0)
        return chance if self.alpha == 1 else build.emit("scale", chance, by=self.alpha)

    def _stack(self, build: Builder, stack: tuple[Op, ...], x: str, slots: list[int], *, first: bool) -> str:
        for p, v in enumerate(stack):
            x = build.visit(v, x, **({} if first or self.kv == "own" else {"keys": slots[p]}))
            if first:
                slots.append(build.slot_of(x))
        return x
