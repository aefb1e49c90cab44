"""Random valid programs and specs for property tests (needs hypothesis, part of the ``dev`` extra)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from depthpass.ir.ops import ACTIVATIONS
from depthpass.ir.program import Op, Program, op
from depthpass.passes.turboconn import TurboConn

FEATURES = (
    "repeat", "bridge", "delay", "elementwise", "concat", "state", "keys", "past", "gate", "operands", "threshold",
    "choice", "topk", "nest", "select", "pad", "tap", "norm",
)
"""What a random program may contain; ``bridge`` is a delay of a later value, ``delay`` one of an earlier value,
``state`` zeros and noise, ``operands`` per-visit LoRA and modulation, ``nest`` a route inside a route."""

MAX_DELAY = 5


@st.composite
def programs(
    draw: st.DrawFn, features: Collection[str] = FEATURES, *, max_blocks: int = 4, max_steps: int = 8, width: int = 8
) -> Program:
    """Valid programs: every one passes ``verify``.

    Args:
        features: what they may contain, out of :data:`FEATURES`; blocks, in any number, always may occur.
        max_blocks: largest number of physical blocks.
        max_steps: largest number of random steps; a step inserts one to about ten ops.
        width: width of the hidden stream.
    """
    unknown = set(features) - set(FEATURES)
    if unknown:
        raise ValueError(f"unknown features {sorted(unknown)}; known: {', '.join(FEATURES)}.")
    blocks = draw(st.integers(1, max_blocks))
    builder = _Builder(draw, frozenset(features), blocks, width)
    for _ in range(draw(st.integers(0, max_steps))):
        builder.step()
    return builder.finish()


@st.composite
def turboconns(draw: st.DrawFn, visits: int) -> TurboConn:
    """TurboConn passes that can be applied to a program with so many visits (at least two)."""
    pairs = [(s, d) for s in range(visits) for d in range(s)]
    bridges = draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=4, unique=True))
    return TurboConn(
        bridges=tuple(bridges),
        group=draw(st.integers(1, MAX_DELAY)),
        rank=draw(st.none() | st.integers(1, 4)),
        alpha=draw(st.sampled_from((100.0, 1.0, 30.0))),
        write=draw(st.sampled_from(("output", "input"))),
    )


class _Builder:
    """Grows a program op by op; every intermediate stream it remembers is total and has all tokens."""

    def __init__(self, draw: st.DrawFn, features: frozenset[str], blocks: int, width: int) -> None:
        self.draw, self.features, self.blocks, self.width = draw, features, blocks, width
        self.ops: list[Op] = []
        self.count = 0
        self.open: list[tuple[str, int | None]] = []  # delays of values still to come, and the rank of their Down
        self.pads = draw(st.sampled_from((0, 0, 2))) if "pad" in features else 0
        self.stream = self.emit("embed")
        if self.pads:
            self.stream = self.emit("pad", self.stream, tokens=self.pads)
        self.total = [self.stream]  # total streams of the hidden width over all tokens
        self.writers: list[Op] = []  # visits over all tokens that write a slot

    def emit(self, kind: str, *args: str, parameter: str | None = None, **attrs: Any) -> str:
        built = op(kind, *args, name=str(self.count), **attrs)
        self.ops.append(built.with_attrs(name=parameter) if parameter else built)
        self.count += 1
        return self.ops[-1].name

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def fresh_parameter(self) -> str:
        return f"p{self.count}"

    def step(self) -> None:
        """Insert one random feature and go on from its result."""
        routes = self.features & {"threshold", "choice", "topk"}
        simple = self.features & {
            "bridge", "delay", "elementwise", "concat", "select", "tap", "norm"
        } | ({"state"} if "state" in self.features and not self.pads else set())
        what = self.pick("visit", "visit", *sorted(simple), *(["route"] if routes else []))
        if what == "route":
            self.stream = self.routed(self.stream, None, sorted(routes))
        else:
            self.stream = getattr(self, what)(self.stream)
        self.total.append(self.stream)

    def visit(self, x: str, *, shared: bool = True) -> str:
        used = {o["index"] for o in self.ops if o.kind == "block"}
        free = [b for b in range(self.blocks) if b not in used]
        index = self.pick(*(range(self.blocks) if "repeat" in self.features or not free else free))
        attrs: dict[str, Any] = {}
        writers = [w["slot"] for w in self.writers if w["index"] == index]
        if shared and writers and "keys" in self.features and self.draw(st.booleans()):
            attrs["keys"] = self.pick(*writers)
            if "gate" in self.features and self.draw(st.booleans()):
                source, start = self.pick("query", "hidden"), self.pick(0.0, 3.0)
                attrs |= {"gate": f"g{index}_{source}_{start:.0f}", "window": self.draw(st.integers(1, 4)),
                          "gate_input": source, "gate_init": start}
        elif shared and (kept := self.whole(index)) and "past" in self.features and self.draw(st.booleans()):
            attrs["past"] = self.pick(*kept)
        if "operands" in self.features and self.draw(st.booleans()):
            timed = {"clock": "clock", "step": self.pick(0, 3), "base": self.pick(0.0, 1.0)}
            attrs |= self.pick(
                {"lora": self.fresh_parameter(), "lora_rank": 2}, {"modulate": self.fresh_parameter()},
                {"modulate": f"m{index}", **timed},
            )
        slot = sum(o.kind == "block" for o in self.ops)
        name = self.emit("block", x, index=index, slot=slot, **attrs)
        if (shared and not {"keys", "past"} & attrs.keys()) or "gate" in attrs:
            self.writers.append(self.ops[-1])
        return name

    def whole(self, index: int) -> list[int]:
        """Slots of a block that keep every token."""
        return [w["slot"] for w in self.writers if w["index"] == index and w["gate"] is None]

    def bridge(self, x: str) -> str:
        rank = self.draw(st.none() | st.integers(1, 4))
        low = self.emit("delay", "?", tokens=self.draw(st.integers(1, MAX_DELAY)))
        self.open.append((low, rank))
        if self.draw(st.booleans()):
            low = self.emit("scale", low, by=0.5)
        return self.emit("add", x, self.emit("linear", low, parameter=self.fresh_parameter(), out=self.width))

    def delay(self, x: str) -> str:
        old = self.pick(*self.total)
        for _ in range(self.draw(st.integers(1, 2))):
            old = self.emit("delay", old, tokens=self.draw(st.integers(1, MAX_DELAY)))
        return self.emit("add", self.emit("scale", x, by=0.5), old)

    def elementwise(self, x: str) -> str:
        kind = self.pick("scale", "weigh", "rms", "rms_gain", "act", "gated", "sum", "detach")
        if kind == "scale":
            return self.emit("scale", x, by=self.pick(-1.0, 0.25))
        if kind == "act":
            # There is no real root of what is below zero, and what is near it has no reciprocal.
            return self.emit("act", x, fn=self.pick(*(f for f in ACTIVATIONS if f not in ("sqrt", "reciprocal", "exp"))))
        if kind == "detach":
            return self.emit("detach", x)
        if kind == "gated":
            return self.emit("mul", x, self.score(x))
        if kind == "sum":
            return self.emit("add", x, self.pick(*self.total), self.pick(*self.total))
        return self.emit(kind.removesuffix("_gain"), x, parameter=None if kind == "rms" else self.fresh_parameter())

    def concat(self, x: str) -> str:
        return self.emit("linear", x, self.pick(*self.total), parameter=self.fresh_parameter(), out=self.width,
                         bias=self.draw(st.booleans()), identity=self.draw(st.booleans()))

    def state(self, x: str) -> str:
        start = self.emit("noise", std=0.5) if self.draw(st.booleans()) else self.emit("zeros")
        return self.emit("add", start, x)

    def select(self, x: str) -> str:
        other = self.visit(x)
        return self.emit("select", x, other, self.score(x), self.score(other), rule="cdf", cdf=0.5)

    def tap(self, x: str) -> str:
        self.ops.append(op("tap", x, head=self.draw(st.booleans())).with_attrs(name=f"t{len(self.ops)}"))
        return x

    def norm(self, x: str) -> str:
        return self.emit("norm", x)

    def score(self, x: str) -> str:
        raw = self.emit("linear", x, parameter=self.fresh_parameter(), out=1, bias=False)
        return self.emit("act", raw, fn="sigmoid")

    def routed(self, x: str, outer: str | None, rules: list[str]) -> str:
        """Route, visit, perhaps route again inside, scatter back onto ``x``."""
        rule = self.pick(*rules)
        nest = (outer,) if outer else ()
        if rule == "choice":
            scores = self.emit("linear", x, parameter=self.fresh_parameter(), out=3)
            route = self.emit("route", scores, *nest, rule=rule, depth=self.draw(st.integers(1, 3)))
        elif rule == "topk":
            route = self.emit("route", self.score(x), *nest, rule=rule, capacity=self.pick(0.25, 1.0))
        else:
            route = self.emit("route", self.score(x), *nest, rule=rule, threshold=self.pick(0.5, 0.4))
        y = self.emit("gather", x, route)
        for _ in range(self.draw(st.integers(0, 2))):
            y = self.visit(y, shared=False)
        if self.draw(st.booleans()):
            y = self.emit("mul", y, self.emit("gather", self.score(x), route))
        x = self.emit("scatter", x, y, route, mode=self.pick("add", "replace"))
        if outer is None and "nest" in self.features and self.draw(st.booleans()):
            x = self.routed(x, route, rules)
        return x

    def finish(self) -> Program:
        """Close the open delays with streams of the program, then end it."""
        end = self.stream
        if self.pads:
            end = self.emit("trim", end, tokens=self.pads)
        self.ops.append(op("output", self.emit("norm", end)))
        program = Program("RandomModel", self.blocks, self.width, tuple(self.ops))
        for low, rank in self.open:
            source = self.pick(*self.total)
            if rank is not None:
                (down,) = program.fresh()
                new = op("linear", source, name=down, out=rank).with_attrs(name=f"down{down}")
                program, source = program.insert_after(source, [new]), down
            program = program.map_ops(lambda o, low=low, s=source: replace(o, args=(s,)) if o.name == low else o)
        return program.renumbered()
