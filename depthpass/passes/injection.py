"""What an iteration of a loop gets besides its own state: the prelude's result, or the state of the iteration before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.passes.builder import Builder

if TYPE_CHECKING:
    from depthpass.ir.program import Op
    from depthpass.passes.exits import Exits
    from depthpass.passes.loop import Loop


def injected(loop: Loop, build: Builder, s: str, e: str, exits: Exits | None) -> str:
    """What an iteration runs on, given the state before it and the prelude's result."""
    if loop.inject == "attention":
        return e
    if loop.inject == "concat":
        width = build.program.width
        return build.emit("linear", s, e, parameter=f"{loop.scope}.inject", out=width, identity=True)
    if loop.inject == "bounded":
        # A half everywhere, as a stream that learned vectors can be made of.
        half = build.emit("act", build.emit("zeros", pads=build.pads), fn="sigmoid")
        kept = build.emit("act", build.emit("weigh", half, parameter=f"{loop.scope}.keep", init=0.0), fn="sigmoid")
        kept = kept if exits is None else exits.enter(kept)
        given = build.emit("weigh", e, parameter=f"{loop.scope}.inject", init=0.5)
        return build.emit("add", build.emit("mul", kept, s), given)
    return build.emit("add", s, e) if loop.inject == "add" and s != e else s


def queried(build: Builder, like: Op, x: str, s: str) -> str:
    """A visit on x whose queries are those of the state s.

    a = x + Attention(queries of s, keys and values of x), then the block's network on a, or on x where the two run side by side.
    """
    a = build.visit(like, s, asks=x, memory=True, part="attention")
    base = build.emit("add", x, build.emit("add", a, build.emit("scale", s, by=-1.0)))
    point = build.emit("point", x, base, index=like["index"])
    return build.emit("ffn", base, point, index=like["index"])
