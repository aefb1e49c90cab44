"""What T2MLR's gates are made of: scores of a stream and the memory, and terms that exist where the memory does."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from depthpass.passes.streams import Builder

if TYPE_CHECKING:
    from depthpass.passes.t2mlr import T2MLR

LEAST = 1e-4
"""Least share of a coupled gate."""

LEAST_SUM = 1e-6
"""Least sum of two gates that are divided by it."""

EPS = {"rms": 1.1920929e-07, "layer": 1e-5}
"""Of learned norms: torch's own for float32."""

STEEPNESS, ROOT_EPS = 8.0, 1e-8
"""Of the exponential gate: c, and what keeps its root away from zero."""

DECAY, SPREAD = -7.43, 0.58
"""Mean and standard deviation of log(p^(-1/c) - 1) with p uniform in [0.99, 0.999], where its decays start."""


def one(build: Builder) -> str:
    """1 at every token."""
    return build.emit("scale", build.emit("act", build.emit("zeros", width=1, pads=build.pads), fn="sigmoid"), by=2.0)


@dataclass
class Terms:
    """Ops on a stream ``x`` and the memory ``back``, which the first token does not have."""

    spec: T2MLR
    build: Builder
    x: str
    back: str

    def __post_init__(self):
        self.base = self.x

    def normed(self, of: str, name: str) -> str:
        """A stream over its root mean square, or less its mean over its standard deviation, with learned gains."""
        gain, shift = (f"{self.spec.scope}.{kind}.{name}" for kind in ("norm", "shift"))
        if self.spec.norm == "rms":
            return self.build.emit("rms", of, parameter=gain, eps=EPS["rms"])
        bias = self.build.emit("weigh", self.scaled(self.half(of), 2.0), parameter=shift, init=0.0)
        return self.add(self.build.emit("rms", self.act(of, "centre"), parameter=gain, eps=EPS["layer"]), bias)

    def score(self, name: str, start: float) -> str:
        """What a gate that begins near ``start`` is the sigmoid of: a linear map of (x, R), or layers of them."""
        spec, width = self.spec, self.build.program.width
        streams = (self.x,) if spec.reads == "stream" else (self.x, self.back)
        for layer in range(1, spec.layers):
            hidden = self.build.emit("linear", *streams, parameter=f"{spec.scope}.hidden.{name}{layer}",
                                     out=spec.hidden or width, init=spec.init)
            streams = (self.act(hidden, spec.activation),)
        score = self.build.emit("linear", *streams, parameter=f"{spec.scope}.{name}", out=width, init=spec.init)
        return self.add(score, self.scaled(self.half(score), 2.0 * log(start / (1.0 - start))))

    def gate(self, name: str, start: float) -> str:
        return self.act(self.score(name, start), "sigmoid")

    def two(self) -> tuple[str, str]:
        """The gates r and i, which ``normalized`` divides by their sum; no gradient flows through that."""
        gates = self.gate("recurrent", self.spec.recurrent), self.gate("input", self.spec.input)
        if not self.spec.normalized:
            return gates
        least = self.scaled(self.half(gates[0]), 2.0 * LEAST_SUM)
        above = self.act(self.add(*gates, self.scaled(least, -1.0)), "relu")
        over = self.act(self.build.emit("detach", self.add(above, least)), "reciprocal")
        return self.mul(gates[0], over), self.mul(gates[1], over)

    def one_of_two(self) -> tuple[str, str]:
        """A gate a, kept in [1e-4, 1 - 1e-4] as in the public code, and 1 - a."""
        gate = self.gate("recurrent", self.spec.recurrent)
        one = self.scaled(self.half(gate), 2.0)
        above = self.act(self.add(gate, self.scaled(one, -LEAST)), "relu")
        gate = self.add(above, self.scaled(one, LEAST))
        over = self.act(self.add(gate, self.scaled(one, LEAST - 1.0)), "relu")
        gate = self.add(gate, self.scaled(over, -1.0))
        return gate, self.add(one, self.scaled(gate, -1.0))

    def decay(self) -> tuple[str, str]:
        """a = exp(-c softplus(L) r), with L learned for every channel, and sqrt(1 - a^2)."""
        one, width = self.one(), self.build.program.width
        learned = self.build.emit("linear", one, parameter=f"{self.spec.scope}.decay", out=width, bias=False, init=SPREAD)
        ones = self.scaled(self.half(learned), 2.0)
        rate = self.act(self.add(learned, self.scaled(ones, DECAY)), "softplus")
        kept = self.act(self.scaled(self.mul(rate, self.gate("recurrent", self.spec.recurrent)), -STEEPNESS), "exp")
        left = self.add(self.scaled(ones, 1.0 + ROOT_EPS), self.scaled(self.mul(kept, kept), -1.0))
        return kept, self.act(left, "sqrt")

    def share(self, name: str) -> str:
        """``tanh(a)``, a being one learned number, or one per channel, that starts as zero."""
        ones = self.scaled(self.half(self.base), 2.0) if self.spec.per_channel else self.one()
        return self.act(self.build.emit("weigh", ones, parameter=f"{self.spec.scope}.{name}.share", init=0.0), "tanh")

    def one(self) -> str:
        return one(self.build)

    def half(self, like: str) -> str:
        """1/2 wherever ``like`` is: the sigmoid of 0."""
        return self.act(self.scaled(like, 0.0), "sigmoid")

    def act(self, x: str, fn: str) -> str:
        return self.build.emit("act", x, fn=fn)

    def scaled(self, x: str, by: float) -> str:
        return self.build.emit("scale", x, by=by)

    def mul(self, x: str, y: str) -> str:
        return self.build.emit("mul", x, y)

    def add(self, *xs: str) -> str:
        return xs[0] if len(xs) == 1 else self.build.emit("add", *xs)
