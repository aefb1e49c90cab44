"""Temporal middle-layer recurrence: what a middle layer has made of a token enters a lower layer at the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass
from depthpass.passes.streams import Builder, check_scope, straight
from depthpass.passes.t2mlr_mixing import Mixing
from depthpass.passes.t2mlr_options import check_t2mlr
from depthpass.passes.t2mlr_terms import one


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
            model starts as the stock model); ``coupled``: i = 1 - r; ``variance``: sqrt(r) and sqrt(1 - r); ``concat``: a linear
            map of (R, x) that starts as x; ``constant``: two numbers; ``weight``: one learned number, (1 - a) x + a R, kept in
            [0, 1]; ``exponential``: ``a x + sqrt(1 - a^2) i R`` with a = exp(-8 softplus(L) r), L learned for every channel.
        recurrent: r; of learned gates where it starts.
        input: i, likewise. r = 0 and i = 1 with constant gates leave the program as it is.
        reads: what learned gates read: ``both``, or the ``stream`` x alone.
        layers: linear maps of a learned gate, one behind the other.
        hidden: width between them; None = the model's.
        activation: between them.
        normalized: r and i are divided by their sum, through which no gradient flows.
        added: the mixture of ``coupled`` and ``variance`` is added to x by a learned share, ``x + tanh(a) (..)``, from zero on.
        per_channel: learned shares of what is added are one number per channel.
        project: R passes a learned linear map, which starts as the identity, before it is mixed in; a width: it passes
            ``R + s V gelu(U R)`` of that width, s starting as 1e-4.
        normed: ``streams``: x and R are normed with learned gains before gates read and mix them; ``mixture``: the mixture is
            rescaled, as R is by ``rescaled``, before it is added; ``both``.
        norm: of the streams: ``rms``, or ``layer`` (less the mean, with a learned shift).
        init: standard deviation of the learned gates' weights.
        residual: share of the last R in the next one.
        rescaled: bring R back to a root mean square of 1, by a factor that no gradient flows through; not the first token's,
            as in the public code.
        limit: most that rescaling multiplies or divides by.
        into: what the residual is part of: R alone (``memory``), or the stream behind visit ``end``, which R is then
            (``stream``: the public code's skip to the last layer; rescaled is the residual alone).
        detached: what no gradient flows through: ``residual``: the last R in the next one; ``all``: any R.
        scope: first part of the names of the new parameters.
    """

    name: ClassVar[str] = "t2mlr"
    numerics: ClassVar[Numerics] = "changing"

    start: int
    end: int
    gate: Literal["learned", "rezero", "coupled", "variance", "concat", "constant", "weight", "exponential"] = "learned"
    recurrent: float = 0.2
    input: float = 0.8
    reads: Literal["both", "stream"] = "both"
    layers: int = 1
    hidden: int | None = None
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    normalized: bool = False
    added: bool = False
    per_channel: bool = False
    project: bool | int = False
    normed: Literal["none", "streams", "mixture", "both"] = "none"
    norm: Literal["rms", "layer"] = "rms"
    init: float = 0.001
    residual: float = 0.0
    rescaled: bool = False
    limit: float = 5.0
    into: Literal["memory", "stream"] = "memory"
    detached: Literal["none", "residual", "all"] = "none"
    scope: str = "t2mlr"

    def validate(self) -> None:
        check_t2mlr(self)

    def apply(self, program: Program, ctx: Context) -> Program:
        check_scope(self.name, self.scope, program)
        visits = straight(program, self.name)
        if self.end >= len(visits):
            raise PassError(f"t2mlr.end: expected a position in 0..{len(visits) - 1}, got {self.end}.")
        if (self.gate, self.recurrent, self.input, self.normed, self.into) == ("constant", 0, 1, "none", "memory"):
            return program
        stack = visits[self.start : self.end + 1]
        build, x = Builder(program), stack[0].args[0]
        last = build.emit("delay", x, tokens=1)
        back = build.emit("detach", last) if self.detached == "all" else last
        h = Mixing(self, build, x, self._projected(build, back)).emit()
        for visit in stack:
            h = build.visit(visit, h)
        kept = h
        if self.residual:
            kept = build.emit("add", h, self._residual(build, back))
        if self.into == "stream":
            h = kept
        elif self.rescaled:
            kept = self._rescaled(build, h, kept, back)
        # The delay reads what is made after it.
        return build.splice(stack, h).map_ops(lambda o: replace(o, args=(kept,)) if o.name == last else o)

    def _projected(self, build: Builder, back: str) -> str:
        if not self.project:
            return back
        name, width = f"{self.scope}.project", build.program.width
        if self.project is True:
            return build.emit("linear", back, parameter=name, out=width, bias=False, identity=True)
        # Near orthogonal, as the public code's are.
        low, high = (dict(out=out, bias=False, init=max(width, self.project) ** -0.5) for out in (self.project, width))
        inner = build.emit("act", build.emit("linear", back, parameter=f"{name}.down", **low), fn="gelu")
        share = build.emit("weigh", one(build), parameter=f"{name}.share", init=1e-4)
        return build.emit("add", back, build.emit("mul", build.emit("linear", inner, parameter=f"{name}.up", **high), share))

    def _residual(self, build: Builder, back: str) -> str:
        old = build.emit("scale", build.emit("detach", back) if self.detached == "residual" else back, by=self.residual)
        return build.emit("rescale", old, limit=self.limit) if self.rescaled and self.into == "stream" else old

    def _rescaled(self, build: Builder, h: str, kept: str, back: str) -> str:
        """``kept`` brought back to 1 where R is there: h - h + rescaled. The first token's is h, as in the public code."""
        one = build.emit("scale", build.emit("act", build.emit("scale", back, by=0.0), fn="sigmoid"), by=2.0)
        scaled = build.emit("mul", build.emit("rescale", kept, limit=self.limit), one)
        gone = build.emit("scale", build.emit("mul", h, one), by=-1.0)
        return build.emit("add", h, gone, scaled)
