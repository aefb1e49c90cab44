"""Temporal middle-layer recurrence: what a middle layer has made of a token enters a lower layer at the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import Builder, check_scope, straight


@dataclass(frozen=True)
class T2MLR(Pass):
    """Mix the result of visit ``end`` at the last token into the input of visit ``start`` (T2MLR, arXiv 2607.15178).

    ``x_t <- i * x_t + r * R_{t-1}`` in front of visit ``start``, ``R_t = h_t (+ residual * R_{t-1})`` behind visit ``end``. The
    first real token of a row has no R and keeps its x. Every token is recurrent, prompts included, so a model decodes as it
    scores (the public code leaves prompt tokens out in ``generate``).

    rewrite:
        t2mlr(start=1, end=2, gate=constant, recurrent=0.5, input=0.5)
        `%2 = block 1 (%1) slot 1`  ->  `%2 = block 1 (i * %1 + r * delay 1 (%3)) slot 1`

    Args:
        start: first visit of the recurrence.
        end: its last visit.
        gate: ``learned``: r and i are sigmoids of linear maps of (x, R), per channel; ``rezero``: the same, and the mixture is
            added, ``x + tanh(a) i x + tanh(b) r R`` with two learned numbers that start as zero (the public code's default: the
            model starts as the stock model); ``constant``: two numbers.
        recurrent: r; of learned gates where it starts.
        input: i, likewise. r = 0 and i = 1 with constant gates leave the program as it is.
        init: standard deviation of the learned gates' weights.
        residual: share of the last R in the next one.
        rescaled: bring R back to a root mean square of 1, by a factor that no gradient flows through; not the first token's,
            as in the public code.
        limit: most that rescaling multiplies or divides by.
        scope: first part of the names of the new parameters.
    """

    name: ClassVar[str] = "t2mlr"
    numerics: ClassVar[Numerics] = "changing"

    start: int
    end: int
    gate: Literal["learned", "rezero", "constant"] = "learned"
    recurrent: float = 0.2
    input: float = 0.8
    init: float = 0.001
    residual: float = 0.0
    rescaled: bool = False
    limit: float = 5.0
    scope: str = "t2mlr"

    def validate(self) -> None:
        require(0 <= self.start <= self.end, "t2mlr.start", "visits 0 <= start <= end", f"{self.start}..{self.end}")
        for key in ("recurrent", "input"):
            value = getattr(self, key)
            inside = 0 <= value <= 1 if self.gate == "constant" else 0 < value < 1
            require(inside, f"t2mlr.{key}", f"a share in {'[0, 1]' if self.gate == 'constant' else '(0, 1)'}", value)
        require(self.init >= 0, "t2mlr.init", "a standard deviation of at least 0", self.init)
        require(self.limit >= 1, "t2mlr.limit", "a factor of at least 1", self.limit)
        require(self.scope.isidentifier(), "t2mlr.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        check_scope(self.name, self.scope, program)
        visits = straight(program, self.name)
        if self.end >= len(visits):
            raise PassError(f"t2mlr.end: expected a position in 0..{len(visits) - 1}, got {self.end}.")
        if self.gate == "constant" and (self.recurrent, self.input) == (0, 1):
            return program
        stack = visits[self.start : self.end + 1]
        build, x = Builder(program), stack[0].args[0]
        back = build.emit("delay", x, tokens=1)
        h = self._mix(build, x, back)
        for visit in stack:
            h = build.visit(visit, h)
        kept = h if not self.residual else build.emit("add", h, build.emit("scale", back, by=self.residual))
        if self.rescaled:
            kept = self._rescaled(build, h, kept, back)
        # The delay reads what is made after it.
        return build.splice(stack, h).map_ops(lambda o: replace(o, args=(kept,)) if o.name == back else o)

    def _rescaled(self, build: Builder, h: str, kept: str, back: str) -> str:
        """``kept`` brought back to 1 where R is there: h - h + rescaled. The first token's is h, as in the public code."""
        one = build.emit("scale", build.emit("act", build.emit("scale", back, by=0.0), fn="sigmoid"), by=2.0)
        scaled = build.emit("mul", build.emit("rescale", kept, limit=self.limit), one)
        gone = build.emit("scale", build.emit("mul", h, one), by=-1.0)
        return build.emit("add", h, gone, scaled)

    def _mix(self, build: Builder, x: str, back: str) -> str:
        """``i * x + r * R``; where R is absent x alone, so i is written as 1 minus what is taken away."""
        if self.gate == "constant":
            half = build.emit("act", build.emit("scale", back, by=0.0), fn="sigmoid")
            taken = build.emit("scale", build.emit("mul", x, half), by=2.0 * (self.input - 1.0))
            return build.emit("add", x, taken, build.emit("scale", back, by=self.recurrent))
        if self.gate == "rezero":
            parts = (("recurrent", back, self.recurrent), ("input", x, self.input))
            return build.emit("add", x, *(self._rezero(build, name, of, self._gate(build, name, x, back, start))
                                          for name, of, start in parts))
        gates = [self._gate(build, name, x, back, start) for name, start in (
            ("recurrent", self.recurrent), ("forget", 1.0 - self.input))]
        taken = build.emit("scale", build.emit("mul", x, gates[1]), by=-1.0)
        return build.emit("add", x, taken, build.emit("mul", back, gates[0]))

    def _rezero(self, build: Builder, name: str, of: str, gate: str) -> str:
        """``tanh(a) gate of``, a being one learned number that starts as zero."""
        half = build.emit("act", build.emit("zeros", width=1, pads=build.pads), fn="sigmoid")
        share = build.emit("weigh", build.emit("scale", half, by=2.0), parameter=f"{self.scope}.{name}.share", init=0.0)
        return build.emit("mul", build.emit("mul", of, gate), build.emit("act", share, fn="tanh"))

    def _gate(self, build: Builder, name: str, x: str, back: str, start: float) -> str:
        """A sigmoid of a linear map of (x, R) that begins near ``start``."""
        width = build.program.width
        score = build.emit("linear", x, back, parameter=f"{self.scope}.{name}", out=width, init=self.init)
        return build.emit("act", build.emit("add", score, self._offset(build, score, start)), fn="sigmoid")

    def _offset(self, build: Builder, score: str, start: float) -> str:
        """The logit of ``start`` as a stream that is there where ``score`` is: twice the half that a sigmoid gives of 0."""
        from math import log

        half = build.emit("act", build.emit("scale", score, by=0.0), fn="sigmoid")
        return build.emit("scale", half, by=2.0 * log(start / (1.0 - start)))
