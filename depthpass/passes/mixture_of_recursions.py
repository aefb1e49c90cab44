"""Mixture-of-Recursions (arXiv 2507.10524): a shared stack that every token runs as often as a router says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.layer_program import check_range
from depthpass.passes.sharing import Shared, Sharing, Start, shared_stack
from depthpass.passes.streams import Builder, straight
from depthpass.passes.thresholds import check_thresholds, threshold_of

_EXPERT = {"mode": "topk", "capacity": None, "alpha": 0.1, "combine": "paper", "aux": 1e-3, "threshold": 0.5}
_TOKEN = {"balance": 0.1, "balancing": "loss", "rate": 1e-3}
_LOSS_Z = {"expert": 0.0, "token": 1e-5}


@dataclass(frozen=True)
class MixtureOfRecursions(Pass):
    """Run a shared stack up to R times per token; recursion r takes only tokens that r - 1 took.

    Expert choice, with s = theta_r H, w = alpha sigmoid(s) and A_r the active tokens:

        H[i] <- H[i] + w[i] Stack(H)[i]   for i in A_r;   unchanged otherwise

    A_r are the top-k of A_(r-1) with k = capacity_r times the tokens of the row (training as published, not causal),
    or those of A_(r-1) with sigmoid(s) >= 0.5 (causal, decodes as it scores). Token choice, with p = softmax(theta H):

        depth = argmax(p) + 1;   H <- H + p[depth] Stack^depth(H)

    **Which stack.** Without ``start`` and ``end`` a model of L unique layers becomes one with a shared stack of
    b = (L - 2) / R (``middle_*``) or L / R blocks. The blocks that stay are the stock model's own modules, visited R
    times, so their weights are one tensor; the blocks that no visit runs any more keep their stock names in the state
    dict and are frozen. Only ``init="average"`` makes new weights; the given model never changes. With ``start`` or
    ``end`` the model keeps all its layers and the visits [start, end) are repeated.

    rewrite:
        mixture_of_recursions(start=1, end=2, recursions=2), on three blocks
        `0 1 2`  ->  `0`, H = H + w1 block 1 (H), H[A_2] += w2 block 1 (H[A_2]), `2`

    Parameters: ``{scope}.r{r}.router.weight`` (one score, no bias), and ``{scope}.r{r}.strength.weight`` with
    ``combine="delta"``; ``{scope}.router.weight`` for token choice, with loss-free balancing also the buffer
    ``{scope}.balance.bias``. With ``sequence`` each block has its own, under ``{scope}.s{j}``. Identity: none with the
    paper's combine; ``delta`` with start and end starts exactly as the stock model.

    Args:
        recursions: R.
        sharing: ``middle_cycle``, ``cycle``: the stack R times; ``middle_sequence``, ``sequence``: each of its blocks R
            times before the next one, routed for itself. ``middle_*``: the first and the last layer are not shared.
        init: the shared blocks are the layers at regular steps from first to last (``stepwise``), the ``first`` or
            ``last`` b, or the ``average`` of the layers that are tied. Steps are rounded as in the public code: halves to
            the even layer number.
        start: first position of a stack that is repeated as it is; None with ``end`` given = 1.
        end: one past its last position; None with ``start`` given = all but the last visit.
        router: ``expert`` (a router per recursion chooses tokens) or ``token`` (a token chooses its depth at once).
        kv: every ``recursion`` has its own slots, which hold its active tokens only; ``shared``: all read the keys of
            the first one, which then runs for every token; ``updated``: so, but with an active token's own keys in the place
            of its first ones (``update_cache`` of the public code).
        mode: expert choice by ``topk`` or ``threshold``.
        capacity: share of a row's tokens for each recursion, not growing; None = (R - r + 1) / R. Only ``topk``.
        threshold: what sigmoid(s) has to reach in mode ``threshold``; a list has one for every router in program order
            (``depthpass.calibrate`` sets them).
        alpha: factor of the expert router's sigmoid.
        combine: ``paper`` as above; ``delta``: H = Stack(H) in recursion 1 and H + w (Stack(H) - H) after it, with a
            learned strength that starts from 0 in place of alpha. Expert choice.
        aux: coefficient of the loss ``{scope}.aux``: every expert router's cross-entropy against who was taken, over
            those it chose from, summed over r. Mode ``topk``: a threshold chooses by itself.
        balance: coefficient of the token router's loss ``{scope}.balance``, R sum_j f_j mean(p_j).
        balancing: ``loss`` as above, or ``loss_free``: a bias for the choice alone, moved by ``rate`` after each
            training pass towards depths chosen by fewer tokens than the mean.
        rate: step of that bias.
        z: coefficient of the loss ``{scope}.z``, the squared logsumexp of the scores, for every expert router over the
            tokens that it chose from, summed over r; None = 0 (expert), 1e-5 (token).
        taps: hand out scores, ``{scope}.r{r}`` (token choice: the probabilities ``{scope}.p``), and who is taken,
            ``{scope}.r{r}.taken``.
        scope: first part of the parameter, loss and tap names.
    """

    name: ClassVar[str] = "mixture_of_recursions"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("recursions",)
    loop_field: ClassVar[str | None] = "recursions"

    recursions: int = 3
    sharing: Sharing = "middle_cycle"
    init: Start = "stepwise"
    start: int | None = None
    end: int | None = None
    router: Literal["expert", "token"] = "expert"
    kv: Literal["recursion", "shared", "updated"] = "recursion"
    mode: Literal["topk", "threshold"] = "topk"
    capacity: Sequence[float] | None = None
    threshold: float | Sequence[float] = 0.5
    alpha: float = 0.1
    combine: Literal["paper", "delta"] = "paper"
    aux: float = 1e-3
    balance: float = 0.1
    balancing: Literal["loss", "loss_free"] = "loss"
    rate: float = 1e-3
    z: float | None = None
    taps: bool = False
    scope: str = "mor"

    def validate(self) -> None:
        n = self.name
        require(self.start is None or self.start >= 0, f"{n}.start", "a position of at least 0", self.start)
        first = 1 if self.start is None else self.start
        require(self.end is None or self.end > first, f"{n}.end", f"a position above start={first}", self.end,
                "Ranges are half-open.")
        require(self.init == "stepwise" or not self.keeps_layers, f"{n}.init", "no start and end beside it", self.init,
                "With them the model keeps its own layers and nothing is shared anew.")
        require(self.recursions >= 1, f"{n}.recursions", "at least 1", self.recursions)
        other, of = (_EXPERT, "expert") if self.router == "token" else (_TOKEN, "token")
        for field, default in other.items():
            require(getattr(self, field) == default, f"{n}.{field}", f"router={of!r} beside it", getattr(self, field))
        require(self.alpha != 0, f"{n}.alpha", "a factor other than 0", self.alpha)
        require(self.alpha == 0.1 or self.combine == "paper", f"{n}.alpha", "combine='paper' beside it", self.combine)
        several = not isinstance(self.threshold, float | int)
        for value in (self.threshold,) if isinstance(self.threshold, float | int) else self.threshold:
            require(0 <= value <= 1 if several else 0 < value < 1, f"{n}.threshold", "a number between 0 and 1", value)
        require(self.threshold == 0.5 or self.mode == "threshold", f"{n}.threshold", "mode='threshold' beside it",
                self.mode)
        for field in ("aux", "balance", "rate", "z"):
            require((getattr(self, field) or 0) >= 0, f"{n}.{field}", "a number of at least 0", getattr(self, field))
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)
        self._check_capacity()

    def _check_capacity(self) -> None:
        n, caps = self.name, self.capacity
        if caps is None:
            return
        require(self.mode == "topk", f"{n}.capacity", "mode='topk' beside it", self.mode)
        require(len(caps) == self.recursions, f"{n}.capacity", f"{self.recursions} shares", list(caps))
        require(all(0 < c <= 1 for c in caps), f"{n}.capacity", "shares in (0, 1]", list(caps))
        require(list(caps) == sorted(caps, reverse=True), f"{n}.capacity", "shares that do not grow", list(caps),
                "A token that left does not come back.")
        require(caps[0] == 1 or self.kv == "recursion", f"{n}.capacity", f"a first share of 1 with kv={self.kv!r}", list(caps),
                "Later recursions read the keys of the first one at every token, so it runs for every token.")
        require(caps[0] == 1 or self.combine == "paper", f"{n}.capacity", "a first share of 1 with combine='delta'",
                list(caps))

    @property
    def keeps_layers(self) -> bool:
        """Whether the model keeps all its own layers."""
        return self.start is not None or self.end is not None

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        plan = self._range(visits) if self.keeps_layers else shared_stack(
            self.name, visits, self.recursions, self.sharing, self.init
        )
        build, x = Builder(program), visits[0].args[0]
        build.ops += plan.directives
        for v in plan.before:
            x = build.visit(v, x)
        for j, stack in enumerate(plan.stacks):
            prefix = f"{self.scope}.s{j}" if self.sharing.endswith("sequence") else self.scope
            x = _Recursions(self, build, stack, prefix).run(x)
        for v in plan.after:
            x = build.visit(v, x)
        check_thresholds(self.name, build, self.threshold if self.mode == "threshold" else 0.5)
        return build.splice(visits, x)

    def _range(self, visits: tuple[Op, ...]) -> Shared:
        start = 1 if self.start is None else self.start
        end = len(visits) - 1 if self.end is None else self.end
        check_range(self.name, start, end, len(visits))
        if end <= start:
            raise PassError(f"{self.name}.start: expected a position below end={end}, got {start}: the program "
                            f"has {len(visits)} visits. Set end, or start=0 for Cycle.")
        stack = visits[start:end]
        stacks = tuple((v,) for v in stack) if self.sharing.endswith("sequence") else (stack,)
        return Shared(visits[:start], stacks, visits[end:])


class _Recursions:
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
