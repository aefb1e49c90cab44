"""Random programs for the depth tests: every op kind, forward and backward delays, shared keys, nested routes, pads."""

from __future__ import annotations

import random
from typing import Any

from depthpass.errors import VerifyError
from depthpass.ir import Op, Program, op, verify

WIDTH = 8


class Builder:
    """Grows a program op by op; values are kept by what may be done with them."""

    def __init__(self, rng: random.Random, blocks: int, max_delay: int) -> None:
        self.rng, self.blocks, self.max_delay = rng, blocks, max_delay
        self.ops: list[Op] = [op("embed", name="v0")]
        self.streams = ["v0"]
        self.pending: list[tuple[int, int]] = []
        self.slots: list[int] = []
        self.writers: list[tuple[int, int]] = []

    def emit(self, kind: str, *args: str, **attrs: Any) -> str:
        name = f"v{len(self.ops)}"
        self.ops.append(Op(kind, name, args).with_attrs(**attrs))
        return name

    def keep(self, value: str) -> None:
        self.streams.append(value)

    def recent(self) -> str:
        return self.streams[-1] if self.rng.random() < 0.75 else self.rng.choice(self.streams[-3:])

    def visit(self, x: str) -> str:
        index, slot = self.rng.randrange(self.blocks), len(self.slots)
        self.slots.append(slot)
        shared = [s for i, s in self.writers if i == index]
        if shared and self.rng.random() < 0.6:
            if self.rng.random() < 0.5:
                return self.emit("block", x, index=index, slot=slot, keys=self.rng.choice(shared))
            keys = self.rng.choice(shared)
            self.writers.append((index, slot))
            window = self.rng.randint(1, 3)
            return self.emit("block", x, index=index, slot=slot, keys=keys, gate="g", window=window)
        self.writers.append((index, slot))
        return self.emit("block", x, index=index, slot=slot)

    def back_edge(self) -> None:
        """A delay whose argument is chosen at the end, among later values, merged into the current stream."""
        at, tokens = len(self.ops), self.rng.randint(1, self.max_delay)
        late = self.emit("delay", "v0", tokens=tokens)
        self.pending.append((at, tokens))
        if self.rng.random() < 0.5:
            late = self.emit("linear", late, name=f"l{at}", out=WIDTH)
        self.keep(self.emit("add", self.streams[-1], late))

    def forward_edge(self) -> None:
        late = self.emit("delay", self.recent(), tokens=self.rng.randint(1, self.max_delay))
        if self.rng.random() < 0.3:
            late = self.emit("linear", late, self.recent(), name=f"l{len(self.ops)}", out=WIDTH)
        self.keep(self.emit("add", self.streams[-1], late))

    def routed(self) -> None:
        x = self.streams[-1]
        score = self.emit("linear", x, name=f"s{len(self.ops)}", out=1)
        route = self._route(score)
        for depth in range(self.rng.randint(1, 2)):
            sub = self.visit(self.emit("gather", x, route))
            x = self.emit("scatter", x, sub, route, mode=self.rng.choice(["add", "replace"]))
            if depth == 0 and self.rng.random() < 0.5:
                inner = self.emit("linear", sub, name=f"s{len(self.ops)}", out=1)
                route = self._route(inner, route)
        self.keep(x)

    def _route(self, *args: str) -> str:
        if self.rng.random() < 0.6:
            return self.emit("route", *args, rule="topk", capacity=0.5)
        return self.emit("route", *args, rule="threshold", threshold=0.5)

    def mix(self) -> None:
        gate = self.emit("act", self.emit("linear", self.recent(), name=f"g{len(self.ops)}", out=1), fn="sigmoid")
        self.keep(self.emit("mul", self.streams[-1], gate))

    def select(self) -> None:
        gate = self.emit("linear", self.recent(), name=f"e{len(self.ops)}", out=1)
        self.keep(self.emit("select", self.streams[-1], self.recent(), gate, gate, rule="cdf", cdf=0.9))

    def finish(self) -> Program:
        end = self.emit("norm", self.streams[-1])
        for at, tokens in self.pending:
            later = [v for v in self.streams if int(v[1:]) > at] or ["v0"]
            self.ops[at] = op("delay", self.rng.choice(later), name=f"v{at}", tokens=tokens)
        self.ops.append(Op("tap", "", (self.rng.choice(self.streams),)).with_attrs(name="inner"))
        self.ops.append(op("output", end))
        return verify(Program("Random", self.blocks, WIDTH, tuple(self.ops)))


def random_program(seed: int, *, routes: bool = True, pads: bool = True, max_delay: int = 5) -> Program:
    """A verified random program; the same for the same arguments."""
    rng = random.Random(seed)
    for _ in range(200):
        b = Builder(rng, rng.randint(1, 4), max_delay)
        kinds = ["visit"] * 6 + ["back"] * 3 + ["forward", "mix", "select", "zeros"] + ["routed"] * (2 * routes)
        pad_at = rng.choice([None, None, 0, 3]) if pads else None
        pad, trim = rng.randint(1, 3), rng.random() < 0.4
        # Trimmed in the middle, so that later visits, delays and pads read what the last pad has left.
        trim_at = pad_at + rng.randint(1, 5) if pad_at is not None and trim and rng.random() < 0.6 else None
        for i in range(rng.randint(3, 12)):
            if i == pad_at:
                b.streams = [b.emit("pad", b.streams[-1], tokens=pad)]
            if i == trim_at:
                b.streams = [b.emit("trim", b.streams[-1], tokens=pad)]
                if rng.random() < 0.3:
                    b.streams = [b.emit("pad", b.streams[-1], tokens=rng.randint(1, 2))]
                trim = False
            match rng.choice(kinds):
                case "visit":
                    b.keep(b.visit(b.recent()))
                case "back":
                    b.back_edge()
                case "forward":
                    b.forward_edge()
                case "routed":
                    b.routed()
                case "mix":
                    b.mix()
                case "select":
                    b.select()
                case "zeros" if pad_at is None:
                    b.keep(b.emit("add", b.emit("noise", std=1.0), b.recent()))
        if pad_at is not None and trim and b.streams[0] != "v0":
            b.streams.append(b.emit("trim", b.streams[-1], tokens=pad))
        try:
            return b.finish()
        except VerifyError:
            continue
    raise AssertionError(f"no valid program for seed {seed}")
