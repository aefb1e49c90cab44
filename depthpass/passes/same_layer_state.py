"""Same-layer states: what a block has made of a token enters the feed-forward network of the same block at the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from math import log
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import check_scope, check_whole


@dataclass(frozen=True)
class SameLayerState(Pass):
    """Blend a state of every block at the token before into what its feed-forward network reads (SST, arXiv 2605.00206).

        a_i = x_i + Attention(x)_i;   p_i = what the network reads, a_i (x_i where the branches run beside each other)
        m_i = p_i + alpha (s_(i-1) - p_i);   y_i = a_i + FFN(m_i);   s_i = y_i

    The state never leaves its block, so attention runs over all tokens at once and only the networks are serial: a row of n
    tokens is L + n - 1 deep. The row's first token has m = p. The paper's abstract says a nonlinear recurrence of the
    feed-forward network with a learned blend; where the state is taken and what it enters are options here.

    rewrite:
        same_layer_state(start=1, end=2)
        `%2 = block 1 (%1) slot 1`  ->  `%2 = block 1 (%1) slot 1 part attention` `%3 = point 1 (%1, %2)` `%4 = delay 1 (%9)`
                                        .. `%9 = ffn 1 (%2, %8)`

    Parameters, under ``scope``: ``v{visit}.share``, the logit of alpha for every channel, less where it starts. Identity:
    ``blend="constant", share=0``.

    Args:
        start: first visit with a state.
        end: one past the last of them; None = to the end.
        blend: alpha: ``learned`` for every channel of every visit, or a ``constant``.
        share: alpha; of a learned one where it starts.
        state: s: the block's result (``stream``), or what its network adds (``ffn``).
        into: the blend is what the network alone reads (``ffn``), or also the stream that its result is added to (``stream``).
        scope: first part of the names of the new parameters.
    """

    name: ClassVar[str] = "same_layer_state"
    numerics: ClassVar[Numerics] = "changing"

    start: int = 0
    end: int | None = None
    blend: Literal["learned", "constant"] = "learned"
    share: float = 0.1
    state: Literal["stream", "ffn"] = "stream"
    into: Literal["ffn", "stream"] = "ffn"
    scope: str = "state"

    def validate(self) -> None:
        n = self.name
        require(self.start >= 0, f"{n}.start", "a position of at least 0", self.start)
        require(self.end is None or self.end > self.start, f"{n}.end", f"a position above {self.start}", self.end)
        learned = self.blend == "learned"
        inside = 0 < self.share < 1 if learned else 0 <= self.share <= 1
        require(inside, f"{n}.share", f"a share in {'(0, 1)' if learned else '[0, 1]'}", self.share)
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        check_scope(self.name, self.scope, program)
        visits = program.visits
        end = len(visits) if self.end is None else self.end
        if end > len(visits) or self.start >= end:
            raise PassError(f"{self.name}.end: expected positions in 0..{len(visits)}, got {self.start}..{end}.")
        if self.blend == "constant" and not self.share:
            return program
        check_whole(self.name, program, range(self.start, end))
        ops, names = [], map(str, count(int(program.fresh()[0])))
        positions = {v.name: p for p, v in enumerate(visits) if self.start <= p < end}
        for o in program.ops:
            ops += self._visit(o, positions[o.name], names) if o.name in positions else [o]
        return replace(program, ops=tuple(ops))

    def _visit(self, visit: Op, position: int, names) -> list[Op]:
        """The ops of a visit with its state; the last one has the visit's name."""
        if visit["part"] != "whole" or visit["lora"] or visit["modulate"]:
            raise PassError(f"{self.name}: expected visits of whole blocks without a LoRA or scales of their own, got "
                            f"%{visit.name}. Leave lora_rank, timestep and scales out.")
        ops: list[Op] = []

        def emit(kind: str, *args: str, name: str = "", parameter: str = "", **attrs) -> str:
            emitted = op(kind, *args, name=name or next(names), **attrs)
            ops.append(emitted.with_attrs(name=parameter) if parameter else emitted)
            return emitted.name

        a = next(names)
        ops.append(replace(visit, name=a).with_attrs(part="attention"))
        point = emit("point", visit.args[0], a, index=visit["index"])
        kept = visit.name if self.state == "stream" else next(names)
        back = emit("delay", kept, tokens=1)
        change = emit("mul", emit("add", back, emit("scale", point, by=-1.0)), self._alpha(emit, back, position))
        blend = emit("add", point, change)
        base = a if self.into == "ffn" else emit("add", a, change)
        y = emit("ffn", base, blend, name=visit.name, index=visit["index"])
        if self.state == "ffn":
            emit("add", y, emit("scale", base, by=-1.0), name=kept)
        return ops

    def _alpha(self, emit, back: str, position: int) -> str:
        """The blend, absent where the state is: a stream of zeros through a sigmoid is a half everywhere."""
        half = emit("act", emit("scale", back, by=0.0), fn="sigmoid")
        if self.blend == "constant":
            return emit("scale", half, by=2.0 * self.share)
        one = emit("scale", half, by=2.0)
        logit = emit("weigh", one, parameter=f"{self.scope}.v{position}.share", init=0.0)
        start = emit("scale", one, by=log(self.share / (1.0 - self.share)))
        return emit("act", emit("add", logit, start), fn="sigmoid")
