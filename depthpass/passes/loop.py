"""Looped stacks: prelude, core repeated, coda; with injection, damping, shared keys, exits and taps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.limits import check_program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.exits import Exits
from depthpass.passes.layer_program import check_range
from depthpass.passes.streams import Builder, check_scope, modulation, straight, with_slots
from depthpass.passes.times import SHOWN, count_at, draw


@dataclass(frozen=True)
class Loop(Pass):
    """Run the visits [start, end) ``times`` times between what stands before (prelude) and after (coda).

        e = prelude(x); s = init(e)
        for t in range(T): s = core(inject(s, e))
        y = coda(s)

    Covers plain loops, damped loops (arXiv 2605.23872: s += (core(s) - s) / T), Huginn (arXiv 2502.05171:
    :meth:`huginn`), Ouro (arXiv 2510.25741: ``normalize="loop", exit=q``), relaxed
    recursive models (arXiv 2410.20672: ``lora_rank``) and timestep-encoded loops (arXiv 2410.01405: ``timestep``).

    rewrite:
        loop(start=1, end=3, times=2)
        `0 1 2 3`  ->  `0 1 2 1 2 3`

    Identity: ``times`` = 1 (all other options at their defaults; ``damped`` and ``inject`` add no arithmetic to it).
    With ``inject="concat"`` the adapter starts as [0, I] on (s, e), so every iteration starts as core(e) and the new
    model equals the stock model at any ``times``. LoRA, modulation and exit gates start without effect.

    Parameters, under ``scope``: ``inject``, ``exit``, ``t{t}.v{visit}.lora``, ``t{t}.v{visit}.scale``,
    ``v{visit}.time`` and ``clock`` (shared by all iterations).

    Args:
        start: first position of the core.
        end: one past its last position; None = the end of the stack.
        times: T. A range ``[low, high]`` is drawn from for every call in training mode, as in Huginn:
            r ~ Poisson(LogNormal(ln mean - sigma^2/2, sigma)) + 1, clipped to the range; evaluation takes ``eval_times``.
            An expression in n, the real tokens of a row, such as ``ceil(2*log2(n)**1)`` gives each row its own T (at least
            1); a cache holds rows of one T and refuses tokens that would change it.
        mean: of the rate that is drawn; None = the middle of the range less one, so that r is in the middle on average.
        sigma: standard deviation of its logarithm.
        eval_times: T outside of training when it is drawn; None = the rounded mean plus one.
        bptt: gradients flow through the last so many iterations only: the state that enters them is detached. (Keys
            that iterations share stay attached.)
        damped: add 1/T of the change of each iteration only (True), or this part of it.
        inject: give e to every iteration: ``add`` it to s, ``concat`` both through a learned adapter, or ``bounded``:
            a s + b e with a learned in (0, 1) for every channel, so that what earlier iterations left cannot grow by
            being carried on (Parcae, arXiv 2604.12946); a = sigmoid(w / 2) and b start as 1/2.
        state: what the loop starts from: its ``input`` e, ``zeros`` or ``noise``. With ``add`` and ``input`` the
            first iteration already reads e, and nothing is added to it.
        noise_std: standard deviation of the noise.
        noise_cut: draw the noise from a normal distribution cut off at so many ``noise_std``; None = from a whole one.
        kv: keys that iteration t reads: its ``own`` slots, those of the ``first`` iteration, or, of the tokens of earlier
            calls, those of the ``last`` iteration or (``mod:k``) of the last one congruent to t modulo k; one slot per
            block (k of them) then outlives a call. ``last`` and ``mod:k`` score a whole row as ``own`` does, and decode
            another function. ``latest``, beside an exit that skips: those of iteration t, and of tokens that left before it
            those of the last one that they took (Huginn's latest and available).
        taps: hand out what the model would give after 1, 2, .. T iterations, as logits called ``{scope}.t{t}``; the
            coda runs again for each. (With ``damped`` iteration t of this T, which is not a run with T = t.)
        exit: let tokens leave the loop early, at this value of ``criterion``.
        criterion: ``cdf``: a learned gate gives an exit probability after each iteration; a token leaves when their
            cumulative probability reaches ``exit`` (Ouro's q). Huginn's compare an iteration with the one before; a token
            leaves when the distance is below ``exit``: ``state``: |s_t - s_(t-1)| / |s_t|, or ``cosine``: 1 - cos(s_t,
            s_(t-1)), s_0 the state that the loop starts from; of p_t, what coda and head make of s_t, ``kl``: KL(p_(t-1) ||
            p_t), p_0 uniform, or ``entropy``: |H(p_t) - H(p_(t-1))|, from the second iteration on. ``argmax``: it leaves when
            ``exit`` (a whole number) iterations in a row have not changed its most likely token. (The coda of a decision
            sees the earlier tokens that took the same iteration.)
        skip: tokens that left take no further iteration: no work, and no keys in it, so that in iteration t (with
            ``kv="own"``) a token sees the earlier tokens that ran iteration t. False (``cdf`` only): run all iterations
            with all keys and pick states afterwards; with ``taps`` also hand out the gates' probabilities
            ``{scope}.t{t}.exit``, to train them.
        lora_rank: rank of a LoRA of its own for every visit of the core.
        timestep: modulate the visits of the core by the iteration number t (adaLN): what attention and MLP read is
            scaled by 1 + s(t), what they add is gated. ``identity`` (or True) gates with 1 + g in iteration 0 and with g
            in later ones, so that the model starts as the stock model at any ``times``; ``zero`` gates with g always,
            as published: the core starts as the identity, for training from scratch.
        scales: give every visit of the core scales and gates of its own, as plain parameters, all starting as 1.
        residual: ``1/n``: the branches of the core's visits, attention and MLP, add 1/T of what they do (arXiv 2606.18524),
            T being the loop count that runs, plus a learned part of it for every block and channel that starts as zero.
        normalize: apply the stock final norm only at the end, or to s between iterations as well (Ouro).
        out_norm: apply it to s before the coda as well (Huginn).
        scope: first part of the parameter and tap names; set it to apply the pass twice.
    """

    name: ClassVar[str] = "loop"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("times",)
    loop_field: ClassVar[str | None] = "times"

    start: int = 0
    end: int | None = None
    times: int | tuple[int, int] | str = 2
    damped: bool | float = False
    inject: Literal["add", "concat", "bounded"] | None = None
    state: Literal["input", "zeros", "noise"] = "input"
    noise_std: float = 1.0
    noise_cut: float | None = None
    kv: str = "own"
    taps: bool = False
    exit: float | None = None
    criterion: Literal["cdf", "state", "cosine", "kl", "entropy", "argmax"] = "cdf"
    skip: bool = True
    lora_rank: int | None = None
    timestep: bool | Literal["identity", "zero"] = False
    scales: bool = False
    residual: Literal["full", "1/n"] = "full"
    normalize: Literal["last", "loop"] = "last"
    out_norm: bool = False
    scope: str = "loop"
    mean: float | None = None
    sigma: float = 0.5
    eval_times: int | None = None
    bptt: int | None = None

    @classmethod
    def huginn(cls, start: int, end: int | None = None, **overrides: Any) -> Loop:
        """The loop of Huginn's public code: e and s through an adapter in every iteration, the final norm before the coda,
        s_0 of standard deviation sqrt(2/5), cut off at three of them; with a ``mean``, so many iterations in evaluation."""
        mean = overrides.get("mean")
        evaluated = {} if mean is None else {"eval_times": max(1, round(mean))}
        return cls(**{"start": start, "end": end, "inject": "concat", "state": "noise", "noise_std": math.sqrt(2 / 5),
                      "noise_cut": 3.0, "out_norm": True, **evaluated, **overrides})

    def validate(self) -> None:
        require(self.start >= 0, "loop.start", "a position of at least 0", self.start)
        require(self.end is None or self.end > self.start, "loop.end", f"a position above start={self.start}", self.end,
                "Ranges are half-open.")
        self._check_times()
        known = isinstance(self.damped, bool) or 0 < self.damped <= 2
        require(known, "loop.damped", "True, False or a part in (0, 2]", self.damped)
        require(self.state == "input" or self.inject is not None, "loop.inject", f"'add', 'concat' or 'bounded' with state="
                f"{self.state!r}", self.inject, "Without it the loop would not see its input at all.")
        require(self.noise_std > 0, "loop.noise_std", "a positive number", self.noise_std)
        cut = self.noise_cut
        require(cut is None or 0 < cut < math.inf, "loop.noise_cut", "a positive number", cut)
        for name, default in (("noise_std", 1.0), ("noise_cut", None)):
            require(getattr(self, name) == default or self.state == "noise", f"loop.{name}", "state='noise' beside it",
                    self.state)
        kind, _, count = self.kv.partition(":")
        known = count.isdigit() and int(count) > 0 if kind == "mod" else kind in ("own", "first", "last", "latest") and not count
        require(known, "loop.kv", "own, first, last, latest or mod:k", self.kv)
        require(kind != "latest" or (self.exit is not None and self.skip), "loop.kv", "another policy without an exit that "
                "skips visits", self.kv, "Every token takes all iterations then: kv='own' is the same.")
        self._validate_exit()
        require(self.lora_rank is None or self.lora_rank >= 1, "loop.lora_rank", "at least 1", self.lora_rank)
        require(not (self.timestep and self.scales), "loop.scales", "False with a timestep", self.scales,
                "A time encoding already gives every visit scales and gates.")
        require(self.residual == "full" or not self.timestep, "loop.residual", "'full' with a timestep", self.residual,
                "A time encoding already gives every visit gates.")
        require(self.scope.isidentifier(), "loop.scope", "a plain name of letters, digits and _", self.scope)

    def _check_times(self) -> None:
        times = self.times
        if isinstance(times, tuple):
            low, high = times
            require(1 <= low <= high, "loop.times", "a range [low, high] with 1 <= low <= high", list(times))
        elif isinstance(times, str):
            count_at(times, SHOWN)
            for name in ("taps", "exit", "lora_rank", "scales"):
                value = getattr(self, name)
                require(not value, f"loop.{name}", f"nothing beside times={times!r}", value,
                        "Rows of one batch would have different ones. Use a number or a range.")
        else:
            require(times >= 1, "loop.times", "at least 1", times)
        for name in ("mean", "eval_times"):
            value = getattr(self, name)
            require(value is None or isinstance(times, tuple), f"loop.{name}", "a range of times beside it", times)
        require(self.sigma == 0.5 or isinstance(times, tuple), "loop.sigma", "a range of times beside it", times)
        require(self.mean is None or self.mean > 0, "loop.mean", "a positive number", self.mean)
        require(self.sigma >= 0, "loop.sigma", "at least 0", self.sigma)
        require(self.eval_times is None or self.eval_times >= 1, "loop.eval_times", "at least 1", self.eval_times)
        require(self.bptt is None or self.bptt >= 1, "loop.bptt", "at least 1 iteration", self.bptt)

    @property
    def varies(self) -> Literal["drawn", "length"] | None:
        return "drawn" if isinstance(self.times, tuple) else "length" if isinstance(self.times, str) else None

    def with_loops(self, times: int | tuple[int, int] | str) -> Self:
        """Another T; what belongs to a range of them goes with it."""
        if isinstance(times, tuple | list | range):
            return replace(self, times=times)
        return replace(self, times=times, mean=None, sigma=0.5, eval_times=None)

    def settled(self, *, tokens: int | None = None, drawn: bool = False, most: bool = False) -> Self:
        if isinstance(self.times, int):
            return self
        if isinstance(self.times, str):
            return replace(self, times=count_at(self.times, SHOWN if tokens is None else tokens))
        low, high = self.times
        # Poisson(0) + 1 = 1: a mean of next to nothing stands for ranges around 1.
        mean = max((low + high) / 2 - 1, 1e-6) if self.mean is None else self.mean
        fixed = self.eval_times or min(max(round(mean) + 1, low), high)
        times = max(high, fixed) if most else draw(mean, self.sigma, low, high) if drawn else fixed
        return replace(self, times=times, mean=None, sigma=0.5, eval_times=None)

    def _least(self) -> int:
        """The smallest count that can occur."""
        return self.times if isinstance(self.times, int) else self.times[0] if isinstance(self.times, tuple) else 1

    def _validate_exit(self) -> None:
        if self.exit is None:
            require(self.criterion == "cdf", "loop.exit", f"a value to leave at beside criterion={self.criterion!r}", None)
            require(self.skip, "loop.exit", "a value to leave at beside skip=False", None)
            return
        cdf = self.criterion == "cdf"
        require(0 < self.exit <= (1 if cdf else math.inf), "loop.exit", "a probability in (0, 1]" if cdf else
                "a positive distance", self.exit)
        if self.criterion == "argmax":
            require(self.exit == int(self.exit), "loop.exit", "a whole number of iterations with criterion='argmax'", self.exit)
        least = {"entropy": 3, "argmax": int(self.exit) + 2}.get(self.criterion, 2)
        require(self._least() >= least, "loop.times", "at least 2 with an exit" if least == 2 else
                f"at least {least} with criterion={self.criterion!r}", self.times,
                "" if least == 2 else "It compares iterations, and there must be one left to skip.")
        require(cdf or self.skip, "loop.skip", f"True with criterion={self.criterion!r}", self.skip)
        require(not self.skip or self.kv in ("own", "first", "latest"), "loop.kv", "'own', 'first' or 'latest' with an exit "
                "that skips visits",
                self.kv, "The slot of a later iteration does not hold the tokens that left before it.")

    def apply(self, program: Program, ctx: Context) -> Program:
        if not isinstance(self.times, int):
            return self.settled().apply(program, ctx)
        visits = straight(program, self.name)
        end = len(visits) if self.end is None else self.end
        check_range("loop", self.start, end, len(visits))
        check_scope("loop", self.scope, program)
        prelude, core, coda = visits[: self.start], visits[self.start : end], visits[end:]
        build = Builder(program)
        x = visits[0].args[0]
        for v in prelude:
            x = build.visit(v, x)
        exits = self._exits(build, ctx, coda)
        states = self._iterate(build, core, x, exits)
        s = states[-1]
        if self.exit is not None and exits is None:
            gates = [self._gate(build, state) for state in states]
            s = build.emit("select", *states, *gates, rule="cdf", cdf=self.exit)
            for t, gate in enumerate(gates if self.taps else (), 1):
                build.tap(f"{self.scope}.t{t}.exit", gate, head=False)
        y = build.norm(s) if self.out_norm else s
        for v in coda:
            y = build.visit(v, y)
        program = build.splice(visits, y)
        return self._tapped(program, states, s) if self.taps else program

    def _exits(self, build: Builder, ctx: Context, coda: tuple[Op, ...]) -> Exits | None:
        """The routes of an exit that skips visits; None without one."""
        if self.exit is None or not self.skip:
            return None
        told = ctx.facts.get("vocab_size")
        vocabulary = told if isinstance(told, int) else None
        if self.criterion in ("kl", "entropy") and vocabulary is None:
            raise PassError(f"loop.criterion: {self.criterion!r} needs the size of the model's vocabulary, got {told!r} "
                            f"for {ctx.model}. Use criterion='state' or 'cdf'.")
        return Exits(build, self.criterion, self.exit, f"{self.scope}.exit", vocabulary, coda, self.out_norm)

    def _iterate(self, build: Builder, core: tuple[Op, ...], e: str, exits: Exits | None) -> list[str]:
        """All iterations; the states after each, of every token."""
        s, count = e, cast(int, self.times)  # settled by apply
        if self.state != "input":
            s = build.emit("zeros", pads=build.pads) if self.state == "zeros" else self._noise(build)
        states: list[str] = []
        slots: list[int] = []
        grid: list[list[str]] = []
        # Of every block the input that each token had in the last iteration that it took.
        inputs: list[str] = [""] * len(core)
        for t in range(count):
            whole, before, input_ = s, s, e
            if exits is not None:
                s = before = exits.enter(s)
                input_ = exits.enter(e) if self.inject else e
            if t and self.normalize == "loop":
                s = build.norm(s)
            if t and count - t == self.bptt:
                s = build.emit("detach", s)
            x = self._injected(build, s, input_, exits)
            grid.append([])
            for p, v in enumerate(core):
                shared = {"keys": slots[p]} if t and self.kv == "first" else {}
                operands: dict[str, Any] = shared | modulation("loop", v, self._operands(t, self.start + p))
                if self.kv == "latest" and exits is not None:
                    inputs[p] = exits.put(inputs[p], x)
                    x = build.visit(v, inputs[p], asks=exits.route, **operands)
                else:
                    x = build.visit(v, x, **operands)
                grid[t].append(x)
                if t == 0:
                    slots.append(build.slot_of(x))
            if self.damped and (count > 1 or self.damped is not True):
                change = build.emit("add", x, build.emit("scale", s, by=-1.0))
                part = 1.0 / count if self.damped is True else self.damped
                x = build.emit("add", s, build.emit("scale", change, by=part))
            if exits is not None:
                done = exits.put(whole, x)
                if t < count - 1:
                    exits.leave(x, before, t == count - 2)
                x = done
            states.append(s := x)
        self._keep_last(build, grid)
        return states

    def _noise(self, build: Builder) -> str:
        cut: dict[str, Any] = {} if self.noise_cut is None else {"cut": float(self.noise_cut)}
        return build.emit("noise", std=self.noise_std, pads=build.pads, **cut)

    def _keep_last(self, build: Builder, grid: list[list[str]]) -> None:
        """``last`` and ``mod:k``: a visit reads earlier calls' entries in the slot of the iteration that keeps its own."""
        if self.kv in ("own", "first", "latest"):
            return
        k, last = int(self.kv.removeprefix("mod:")) if self.kv != "last" else 1, len(grid) - 1
        for t, names in enumerate(grid):
            if (kept := last - (last - t) % k) != t:
                for name, keeper in zip(names, grid[kept]):
                    build.set(name, past=build.slot_of(keeper))

    def _injected(self, build: Builder, s: str, e: str, exits: Exits | None) -> str:
        if self.inject == "concat":
            width = build.program.width
            return build.emit("linear", s, e, parameter=f"{self.scope}.inject", out=width, identity=True)
        if self.inject == "bounded":
            # A half everywhere, as a stream that learned vectors can be made of.
            half = build.emit("act", build.emit("zeros", pads=build.pads), fn="sigmoid")
            kept = build.emit("act", build.emit("weigh", half, parameter=f"{self.scope}.keep", init=0.0), fn="sigmoid")
            kept = kept if exits is None else exits.enter(kept)
            given = build.emit("weigh", e, parameter=f"{self.scope}.inject", init=0.5)
            return build.emit("add", build.emit("mul", kept, s), given)
        return build.emit("add", s, e) if self.inject == "add" and s != e else s

    def _operands(self, t: int, visit: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.lora_rank is not None:
            found |= {"lora": f"{self.scope}.t{t}.v{visit}.lora", "lora_rank": self.lora_rank}
        if self.timestep:
            base = 0.0 if t or self.timestep == "zero" else 1.0
            found |= {"modulate": f"{self.scope}.v{visit}.time", "clock": f"{self.scope}.clock", "step": t, "base": base}
        if self.scales:
            found |= {"modulate": f"{self.scope}.t{t}.v{visit}.scale"}
        if self.residual == "1/n":
            named = found.get("modulate", f"{self.scope}.v{visit}.scale")
            found |= {"modulate": named, "base": 1.0 / cast(int, self.times)}
        return found

    def _gate(self, build: Builder, state: str) -> str:
        score = build.emit("linear", build.norm(state), parameter=f"{self.scope}.exit", out=1)
        return build.emit("act", score, fn="sigmoid")

    def _tapped(self, program: Program, states: list[str], end: str) -> Program:
        """Tap what the program would give if it ended after each iteration: its tail is copied for all but the last."""
        at = program.index[end] + 1
        tail = [o for o in program.ops[at:-1] if o.kind != "tap"]
        new: list[Op] = []
        visits = len(program.visits) + len(states) * sum(o.kind == "block" for o in tail)
        check_program(visits, len(program.ops) + len(states) * len(tail), "loop.taps")
        names = iter(program.fresh(len(states) * len(tail)))
        slot = 1 + max(o["slot"] for o in program.visits)
        for t, state in enumerate(states, 1):
            copied = {end: state}
            value = program.output
            if state != end:
                for o in tail:
                    copied[o.name] = next(names)
                    copy = replace(o, name=copied[o.name], args=tuple(copied.get(a, a) for a in o.args), note="")
                    if o.kind == "block":
                        copy, slot = copy.with_attrs(slot=slot), slot + 1
                    new.append(copy)
                value = copied[value]
            new.append(op("tap", value, head=True).with_attrs(name=f"{self.scope}.t{t}"))
        return with_slots(replace(program, ops=(*program.ops[:-1], *new, program.ops[-1])))
