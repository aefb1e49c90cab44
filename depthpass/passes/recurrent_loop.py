"""Recurrent looped transformers: the top state of an earlier token enters a lower layer, at every token or once per group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import Builder, check_scope, straight


@dataclass(frozen=True)
class RecurrentLoop(Pass):
    """Add the decoder's last state, of the token before or of the last token of the group before, to what the encoder made.

        u_i = enc(x)_i + alpha g_i * W rms(s_src(i));   s_i = dec(u)_i;   src(i) = B floor(i / B) - 1

    The first ``encoder`` visits are the encoder, all others the decoder. With B = ``interval`` = 1 the source is the token before
    (the exact form); with B > 1 all tokens of a group of B, counted from the row's first real token, read the last token of the
    group before. Tokens without a source are fed nothing. ``encoder=0`` feeds the bottom of the stack (fully looped).

    A group is one chunk of the token loop, and a row is E + ceil(n / B) D deep.

    rewrite:
        recurrent_loop(encoder=1)
        `%2 = block 1 (%1) slot 1` `%3 = block 2 (%2) slot 2`
        ->
        `%2 = delay 1 (%7)` `%3 = rms (%2)` `%4 = linear recurrent.feed (%3) ..` `%5 = add (%1, ..)` `%6 = block 1 (%5) ..`

    Parameters, under ``scope``: ``feed.weight``, zero at the start, which is the identity (to rounding), and the gate's.

    Args:
        encoder: E, visits below the place that is fed.
        interval: B.
        alpha: factor of what is fed.
        gate: g: a learned ``vector`` that starts as ones, a sigmoid of a linear map of (encoder's result, source) for every
            ``token`` and channel, or ``none``.
        normed: whether the source passes a root-mean-square norm without gain.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "recurrent_loop"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("encoder", "interval")

    encoder: int = 0
    interval: int = 1
    alpha: float = 0.1
    gate: Literal["vector", "token", "none"] = "vector"
    normed: bool = True
    scope: str = "recurrent"

    def validate(self) -> None:
        n = self.name
        require(self.encoder >= 0, f"{n}.encoder", "at least 0 visits", self.encoder)
        require(self.interval >= 1, f"{n}.interval", "at least 1 token", self.interval)
        require(self.alpha != 0, f"{n}.alpha", "a factor other than 0", self.alpha)
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        check_scope(self.name, self.scope, program)
        if self.encoder >= len(visits):
            raise PassError(f"{self.name}.encoder: expected at most {len(visits) - 1} of the program's {len(visits)} visits, got "
                            f"{self.encoder}: the decoder needs one.")
        build, x = Builder(program), visits[0].args[0]
        for v in visits[: self.encoder]:
            x = build.visit(v, x)
        source = build.emit("delay", x, tokens=1, group=None if self.interval == 1 else self.interval)
        x = build.emit("add", x, build.emit("scale", self._fed(build, x, source), by=self.alpha))
        for v in visits[self.encoder :]:
            x = build.visit(v, x)
        # The delay reads what is made after it.
        return build.splice(visits, x).map_ops(lambda o: replace(o, args=(x,)) if o.name == source else o)

    def _fed(self, build: Builder, x: str, source: str) -> str:
        width = build.program.width
        y = build.emit("rms", source) if self.normed else source
        y = build.emit("linear", y, parameter=f"{self.scope}.feed", out=width, init=0.0, bias=False)
        if self.gate == "vector":
            return build.emit("weigh", y, parameter=f"{self.scope}.gate", init=1.0)
        if self.gate == "token":
            score = build.emit("linear", x, source, parameter=f"{self.scope}.gate", out=width, init=0.0)
            return build.emit("mul", build.emit("act", score, fn="sigmoid"), y)
        return y
