"""The iterations of a loop: what each of them reads, runs and hands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from depthpass.ir.program import Op, Program
from depthpass.passes.base import Context
from depthpass.passes.exits import Exits, exits_of
from depthpass.passes.injection import injected, queried
from depthpass.passes.layer_program import check_range
from depthpass.passes.loop_taps import tapped
from depthpass.passes.streams import Builder, check_scope, modulation, straight

if TYPE_CHECKING:
    from depthpass.passes.loop import Loop

ANCHORED = 8
"""Iterations with keys of their own under ``kv="anchor"``, as in Huginn's public code."""


@dataclass
class Iterations:
    """Emits the iterations of a loop."""

    loop: Loop
    build: Builder

    def run(self, core: tuple[Op, ...], e: str, exits: Exits | None) -> list[str]:
        """All iterations; the states after each, of every token."""
        loop, build = self.loop, self.build
        s, count = e, cast(int, loop.times)  # settled by apply
        if loop.state != "input":
            s = build.emit("zeros", pads=build.pads) if loop.state == "zeros" else self._noise()
        states: list[str] = []
        slots: list[int] = []
        grid: list[list[str]] = []
        # Of every block the input that each token had in the last iteration that it took.
        inputs: list[str] = [""] * len(core)
        for t in range(count):
            whole, before, input_ = s, s, e
            if exits is not None:
                s = before = exits.enter(s)
                input_ = exits.enter(e) if loop.inject else e
            if t and loop.normalize == "loop":
                s = build.norm(s)
            if t and count - t == loop.bptt:
                s = build.emit("detach", s)
            x = injected(loop, build, s, input_, exits)
            grid.append([])
            for p, v in enumerate(core):
                shared = {"keys": slots[p]} if t and loop.kv == "first" else {}
                operands: dict[str, Any] = shared | modulation("loop", v, self._operands(t, loop.start + p))
                if t and loop.inject == "attention":
                    x = queried(build, v, x, s)
                elif loop.kv == "latest" and exits is not None:
                    inputs[p] = exits.put(inputs[p], x)
                    x = build.visit(v, inputs[p], asks=exits.route, **operands)
                else:
                    x = build.visit(v, x, **operands)
                grid[t].append(x)
                if t == 0:
                    slots.append(build.slot_of(x))
            if loop.damped and (count > 1 or loop.damped is not True):
                change = build.emit("add", x, build.emit("scale", s, by=-1.0))
                part = 1.0 / count if loop.damped is True else loop.damped
                x = build.emit("add", s, build.emit("scale", change, by=part))
            if exits is not None:
                done = exits.put(whole, x)
                if t < count - 1:
                    exits.leave(x, before, t == count - 2)
                x = done
            states.append(s := x)
        self._keep_last(grid)
        return states

    def _noise(self) -> str:
        cut: dict[str, Any] = {} if self.loop.noise_cut is None else {"cut": float(self.loop.noise_cut)}
        return self.build.emit("noise", std=self.loop.noise_std, pads=self.build.pads, **cut)

    def _keep_last(self, grid: list[list[str]]) -> None:
        """``last``, ``mod:k``, ``anchor:k``: a visit reads earlier calls' entries in the slot of one that keeps its own."""
        kind, _, k = self.loop.kv.partition(":")
        last = len(grid) - 1
        for t, names in enumerate(grid):
            anchored = t if t < int(k or ANCHORED) else last
            kept = {"last": last, "mod": last - (last - t) % int(k or 1), "anchor": anchored}.get(kind, t)
            if kept != t:
                for name, keeper in zip(names, grid[kept]):
                    self.build.set(name, past=self.build.slot_of(keeper))

    def _operands(self, t: int, visit: int) -> dict[str, Any]:
        loop, operands = self.loop, dict[str, Any]()
        if loop.lora_rank is not None:
            operands |= {"lora": f"{loop.scope}.t{t}.v{visit}.lora", "lora_rank": loop.lora_rank}
        if loop.timestep:
            base = 0.0 if t or loop.timestep == "zero" else 1.0
            operands |= {"modulate": f"{loop.scope}.v{visit}.time", "clock": f"{loop.scope}.clock", "step": t, "base": base}
        if loop.scales:
            operands |= {"modulate": f"{loop.scope}.t{t}.v{visit}.scale"}
        if loop.residual == "1/n":
            named = operands.get("modulate", f"{loop.scope}.v{visit}.scale")
            operands |= {"modulate": named, "base": 1.0 / cast(int, loop.times)}
        return operands

    def gate(self, state: str) -> str:
        score = self.build.emit("linear", self.build.norm(state), parameter=f"{self.loop.scope}.exit", out=1)
        return self.build.emit("act", score, fn="sigmoid")


def looped(loop: Loop, program: Program, ctx: Context) -> Program:
    """The program with its visits ``loop.start .. loop.end`` run ``loop.times`` times, a number.

    Raises:
        PassError: the program is no straight stack, does not have the range, or nobody knows its vocabulary.
    """
    visits = straight(program, loop.name)
    end = len(visits) if loop.end is None else loop.end
    check_range("loop", loop.start, end, len(visits))
    check_scope("loop", loop.scope, program)
    prelude, core, coda = visits[: loop.start], visits[loop.start : end], visits[end:]
    build, x = Builder(program), visits[0].args[0]
    for v in prelude:
        x = build.visit(v, x)
    exits = exits_of(loop, build, ctx, coda)
    iterations = Iterations(loop, build)
    states = iterations.run(core, x, exits)
    s = states[-1]
    if loop.exit is not None and exits is None:
        gates = [iterations.gate(state) for state in states]
        s = build.emit("select", *states, *gates, rule="cdf", cdf=loop.exit)
        for t, gate in enumerate(gates if loop.taps else (), 1):
            build.tap(f"{loop.scope}.t{t}.exit", gate, head=False)
    y = build.norm(s) if loop.out_norm else s
    for v in coda:
        y = build.visit(v, y)
    program = build.splice(visits, y)
    return tapped(loop.scope, program, states, s) if loop.taps else program
