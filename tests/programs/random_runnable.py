"""Random programs that run on models, with every op kind of the IR."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from depthpass_lowering.supported import unsupported_ops

from depthpass.errors import VerifyError
from depthpass.ir import Program, op, verify

ACTS = ("sigmoid", "silu", "tanh", "gelu", "softmax")
"""Not relu: what it cuts off to zero is read and leaves no trace."""
KINDS = (
    "visit", "visit", "visit", "back", "back", "forward", "mix", "smooth", "state", "select", "routed", "routed", "asked",
    "exit", "choice", "tap", "echo",
)


class Grower:
    """Grows a program op by op from a stream that every token has."""

    def __init__(self, rng: random.Random, model: str, blocks: int, width: int, vocabulary: int) -> None:
        self.rng, self.model, self.blocks, self.width, self.vocabulary = rng, model, blocks, width, vocabulary
        self.ops = [op("embed", name="0")]
        self.pads = rng.choice((0, 0, 2))
        self.x = self.emit("pad", "0", tokens=self.pads, token=5) if self.pads else "0"
        self.streams, self.open = [self.x], []
        self.slots, self.writers, self.taps = 0, [], 0

    def emit(self, kind: str, *args: str, parameter: str | None = None, **attrs: Any) -> str:
        built = op(kind, *args, name=str(len(self.ops)), **attrs)
        self.ops.append(built.with_attrs(name=parameter) if parameter else built)
        return self.ops[-1].name

    def linear(self, *args: str, out: int | None = None) -> str:
        return self.emit("linear", *args, parameter=f"p{len(self.ops)}", out=out or self.width)

    def grow(self) -> None:
        getattr(self, self.rng.choice(KINDS))()
        self.streams.append(self.x)

    def earlier(self) -> str:
        return self.rng.choice(self.streams)

    # Visits -------------------------------------------------------------------------------------------------

    def visit(self) -> None:
        self.x = self.block(self.x, shared=True)

    def echo(self) -> None:
        """An early stream reads keys that were computed from a deeper one: what is deep comes through attention alone."""
        if self.writers:
            index, slot, _ = self.writers[-1]
            self.x = self.emit("block", self.streams[0], index=index, slot=self.slots, keys=slot)
            self.slots += 1

    def block(self, *args: str, shared: bool = False) -> str:
        index, rng = self.rng.randrange(self.blocks), self.rng
        attrs: dict[str, Any] = {}
        known = [s for i, s, whole in self.writers if i == index and whole]
        if shared and known and rng.random() < 0.6:
            kind = rng.choice(("keys", "gate", "past"))
            attrs = {"past" if kind == "past" else "keys": rng.choice(known)}
            if kind == "gate":
                source = rng.choice(("query", "hidden"))
                attrs |= {"gate": f"g{index}_{source}", "gate_input": source, "window": rng.randint(1, 3)}
        if rng.random() < 0.3:
            attrs |= rng.choice((
                {"lora": f"lora{len(self.ops)}", "lora_rank": 2}, {"modulate": f"m{len(self.ops)}"},
                {"modulate": f"t{index}", "clock": "clock", "step": rng.randint(0, 3)},
            ))
        parted = len(args) == 1 and not attrs.keys() & {"lora", "modulate"} and rng.random() < 0.3
        attrs |= {"part": "attention"} if parted else {}
        name = self.emit("block", *args, index=index, slot=self.slots, **attrs)
        if parted:
            point = self.emit("point", args[0], name, index=index)
            name = self.emit("ffn", name, point if rng.random() < 0.5 else self.emit("scale", point, by=0.7), index=index)
        if shared and not attrs.keys() & {"keys", "past"}:
            self.writers.append((index, self.slots, True))
        self.slots += 1
        return name

    # Streams ------------------------------------------------------------------------------------------------

    def back(self) -> None:
        """A delay whose argument is chosen at the end, among later values."""
        self.open.append(late := self.emit("delay", "?", tokens=self.rng.randint(1, 4)))
        self.x = self.emit("add", self.x, self.linear(late) if self.rng.random() < 0.5 else late)

    def forward(self) -> None:
        late = self.emit("delay", self.earlier(), tokens=self.rng.randint(1, 4))
        if self.rng.random() < 0.5:
            late = self.linear(late, self.earlier())
        self.x = self.emit("add", self.x, late)

    def mix(self) -> None:
        gate = self.emit("act", self.score(self.earlier()), fn="sigmoid")
        self.x = self.emit("mul", self.x, gate)

    def smooth(self) -> None:
        kind = self.rng.choice(("scale", "weigh", "rms", "gain", "act", "norm", "detach"))
        attrs = {"scale": {"by": -0.5}, "act": {"fn": self.rng.choice(ACTS)}}.get(kind, {})
        parameter = f"p{len(self.ops)}" if kind in ("weigh", "gain") else None
        self.x = self.emit("rms" if kind == "gain" else kind, self.x, parameter=parameter, **attrs)

    def state(self) -> None:
        if not self.pads:
            start = self.emit("noise", std=0.5, cut=3.0) if self.rng.random() < 0.5 else self.emit("zeros")
            self.x = self.emit("add", start, self.x)

    def select(self) -> None:
        other = self.block(self.x)
        gates = [self.emit("act", self.score(v), fn="sigmoid") for v in (self.x, other)]
        self.x = self.emit("select", self.x, other, *gates, rule="cdf", cdf=0.6)

    def tap(self) -> None:
        end = self.emit("trim", self.x, tokens=self.pads) if self.pads else self.x
        self.ops.append(op("tap", end, head=self.rng.random() < 0.5).with_attrs(name=f"inner{self.taps}"))
        self.ops[-1] = replace(self.ops[-1], name="")
        self.taps += 1

    # Routes -------------------------------------------------------------------------------------------------

    def score(self, x: str, out: int = 1) -> str:
        return self.linear(x, out=out)

    def route(self, score: str, *outer: str) -> str:
        rule = self.rng.choice(("topk", "threshold", "above"))
        attrs = {"topk": {"capacity": 0.5}}.get(rule, {"threshold": 0.1})
        written = self.emit("route", score, *outer, rule=rule, **attrs)
        if self.rng.random() < 0.3:
            self.ops.append(op("loss", score, rule=self.rng.choice(("bce", "z"))).with_attrs(name="l"))
        return written

    def routed(self) -> None:
        route, base = self.route(self.score(self.x)), self.rng.choice((self.x, self.earlier()))
        for again in range(self.rng.randint(1, 2)):
            y = self.block(self.emit("gather", base, route))
            base = self.emit("scatter", base, y, route, mode=self.rng.choice(("add", "replace")))
            if not again:
                route = self.route(self.score(base), route)
        self.x = base

    def asked(self) -> None:
        """Only the routed tokens ask; every token's keys are there. What chooses may be deeper than what is chosen."""
        base, by = self.rng.sample([self.x, self.earlier()], 2)
        route = self.route(self.score(by))
        y = self.block(base, route)
        self.x = self.emit("scatter", base, y, route, mode="add")

    def exit(self) -> None:
        """Tokens whose prediction has moved take another visit."""
        now = self.block(self.x)
        if self.rng.random() < 0.5:
            far = self.emit("distance", now, self.x, rule="state")
        else:
            logits = [self.emit("logits", self.emit("norm", v), width=self.vocabulary) for v in (now, self.x)]
            far = self.emit("distance", *logits, rule=self.rng.choice(("kl", "entropy")))
        route = self.emit("route", far, rule="threshold", threshold=0.01)
        y = self.block(self.emit("gather", now, route))
        self.x = self.emit("scatter", now, y, route, mode="replace")

    def choice(self) -> None:
        p = self.emit("act", self.score(self.x, 3), fn="softmax")
        route = self.emit("route", p, rule="choice", depth=2)
        weight = self.emit("gather", self.emit("pick", p, index=1), route)
        y = self.emit("mul", self.block(self.emit("gather", self.x, route)), weight)
        self.x = self.emit("scatter", self.x, y, route, mode="add")

    def finish(self) -> Program:
        for o in [o for o in self.ops if o.name in self.open]:
            later = [v for v in self.streams if int(v) > int(o.name)]
            at = self.ops.index(o)
            self.ops[at] = replace(o, args=(self.rng.choice(later or ["0" if not self.pads else "1"]),))
        end = self.emit("norm", self.x)
        if self.pads:
            end = self.emit("trim", end, tokens=self.pads)
        self.ops.append(op("output", end))
        unused = [i for i in range(self.blocks) if all(o.kind != "block" or o["index"] != i for o in self.ops)]
        head = [op("retire", index=i) for i in unused]
        used = sorted(set(range(self.blocks)) - set(unused))
        if used and self.rng.random() < 0.2:
            head.append(op("average", index=used[0], blocks=tuple(range(self.blocks))))
        return verify(Program(self.model, self.blocks, self.width, (*head, *self.ops)))


def runnable(seed: int, model: str, blocks: int, width: int, vocabulary: int) -> Program:
    """A random program that runs on a model; the same for the same arguments."""
    rng = random.Random(seed)
    for _ in range(300):
        grower = Grower(rng, model, blocks, width, vocabulary)
        try:
            for _ in range(rng.randint(2, 9)):
                grower.grow()
            program = grower.finish()
        except VerifyError:
            continue
        if not unsupported_ops(program):
            return program
    raise AssertionError(f"no valid program for seed {seed}")


def kinds_of(programs: list[Program]) -> set[str]:
    return {o.kind for p in programs for o in p}


