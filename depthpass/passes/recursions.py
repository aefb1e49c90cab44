"""The recursions of a shared stack: routers, visits of the tokens they take, and how results are put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthpass.ir.program import Op
from depthpass.passes.streams import Builder
from depthpass.passes.thresholds import threshold_of

if TYPE_CHECKING:
    from depthpass.passes.mixture_of_recursions import MixtureOfRecursions

_LOSS_Z = {"expert": 0.0, "token": 1e-5}


class Recursions:
    """Emits the recursions of one stack.

    Args:
        prefix: of its parameter and tap names.
    """

    def __init__(self, spec: MixtureOfRecursions, build: Builder, stack: tuple[Op, ...], prefix: str) -> None:
        self.spec, self.build, self.stack, self.prefix = spec, build, stack, prefix
        self.slots: list[int] = []
        self.z = _LOSS_Z[spec.router] if spec.z is None else spec.z

    def run(self, x: str) -> str:
        return self.by_token(x) if self.spec.router == "token" else self.by_expert(x)

    def visits(self, x: str, r: int) -> str:
        """The stack once, as recursion r."""
        first = r == 1
        for p, v in enumerate(self.stack):
            shares = not first and self.spec.kv != "recursion"
            keys: dict[str, Any] = {"keys": self.slots[p], "update": self.spec.kv == "updated"} if shares else {}
            x = self.build.visit(v, x, **keys)
            if first:
                self.slots.append(self.build.slot_of(x))
        return x

    def tap(self, name: str, value: str) -> None:
        if self.spec.taps:
            self.build.tap(f"{self.prefix}.{name}", value, head=False)

    def by_expert(self, x: str) -> str:
        spec, build = self.spec, self.build
        active = ""
        for r in range(1, spec.recursions + 1):
            if r == 1 and spec.combine == "delta":
                x = self.visits(x, 1)
                continue
            score = build.emit("linear", x, parameter=f"{self.prefix}.r{r}.router", out=1, bias=False)
            self.tap(f"r{r}", score)
            chance = build.emit("act", score, fn="sigmoid")
            active = self.expert_route(chance, active, r)
            judged = (score, active) if active else (score,)
            build.loss("z", f"{spec.scope}.z", self.z, *judged)
            if spec.mode == "topk":
                build.loss("bce", f"{spec.scope}.aux", spec.aux, *judged)
            if not active:
                x = build.emit("add", x, build.emit("mul", self.visits(x, r), self.weight(chance, r)))
                continue
            self.tap(f"r{r}.taken", active)
            h = build.emit("gather", x, active)
            y = self.visits(h, r)
            if spec.combine == "delta":
                y = build.emit("add", y, build.emit("scale", h, by=-1.0))
            w = self.weight(build.emit("gather", chance, active), r)
            x = build.emit("scatter", x, build.emit("mul", y, w), active)
        return x

    def expert_route(self, chance: str, active: str, r: int) -> str:
        """Route of the tokens that take recursion r, nested in those of the one before; empty when all tokens do."""
        spec, nest, label = self.spec, (active,) if active else (), f"{self.spec.scope}.r{r}"
        if spec.mode == "threshold":
            # Later recursions read the keys of the first one at every token, so it must run for every token.
            everyone = r == 1 and spec.kv != "recursion"
            return "" if everyone else self.build.emit(
                "route", chance, *nest, rule="threshold", threshold=threshold_of(self.build, spec.threshold), label=label
            )
        capacity = spec.capacity[r - 1] if spec.capacity else (spec.recursions - r + 1) / spec.recursions
        everyone = r == 1 and capacity == 1
        return "" if everyone else self.build.emit("route", chance, *nest, rule="topk", capacity=capacity, label=label)

    def weight(self, chance: str, r: int) -> str:
        if self.spec.combine == "delta":
            return self.build.emit("weigh", chance, parameter=f"{self.prefix}.r{r}.strength", init=0.0)
        return chance if self.spec.alpha == 1 else self.build.emit("scale", chance, by=self.spec.alpha)

    def by_token(self, x: str) -> str:
        spec, build = self.spec, self.build
        score = build.emit("linear", x, parameter=f"{self.prefix}.router", out=spec.recursions, bias=False)
        build.loss("z", f"{spec.scope}.z", self.z, score)
        p = build.emit("act", score, fn="softmax")
        self.tap("p", p)
        free = spec.balancing == "loss_free"
        if not free:
            build.loss("balance", f"{spec.scope}.balance", spec.balance, p)
        # State and weight of every token at the depth it has reached so far.
        state, weight, active = self.visits(x, 1), build.emit("pick", p, index=0), ""
        for r in range(2, spec.recursions + 1):
            bias: dict[str, Any] = {}
            if free:
                bias = {"bias": f"{self.prefix}.balance"} | ({"rate": spec.rate} if r == 2 and spec.rate else {})
            active = build.emit("route", p, *((active,) if active else ()), rule="choice", depth=r,
                                label=f"{spec.scope}.r{r}", **bias)
            self.tap(f"r{r}.taken", active)
            y = self.visits(build.emit("gather", state, active), r)
            state = build.emit("scatter", state, y, active, mode="replace")
            here = build.emit("gather", build.emit("pick", p, index=r - 1), active)
            weight = build.emit("scatter", weight, here, active, mode="replace")
        return build.emit("add", x, build.emit("mul", state, weight))
