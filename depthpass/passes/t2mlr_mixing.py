"""How T2MLR mixes the last memory into a token: the forms of its paper and of its public code."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from depthpass.passes.streams import Builder

if TYPE_CHECKING:
    from depthpass.passes.t2mlr import T2MLR

LEAST = 1e-4
"""Least share of a coupled gate."""

EPS = 1.1920929e-07
"""Of learned norms: torch's own for float32."""


@dataclass
class Mixing:
    """Emits the mixture of a stream ``x`` and the memory ``back``, which the first token does not have: there it is x.

    So what is mixed is written as x, less what is taken away of it, plus what the memory adds: sums skip what is absent.

    Attributes:
        base: the stream; ``x`` and ``back`` are what is mixed, normed where that is asked for.
    """

    spec: T2MLR
    build: Builder
    x: str
    back: str

    def __post_init__(self):
        self.base = self.x
        self.plain = self.spec.normed == "none"
        if not self.plain or self.spec.gate == "weight":
            self.x = self._there()
        if self.spec.normed in ("streams", "both"):
            self.x, self.back = (self.build.emit("rms", of, parameter=f"{self.spec.scope}.norm.{name}", eps=EPS)
                                 for name, of in (("input", self.x), ("recurrent", self.back)))

    def emit(self) -> str:
        return getattr(self, f"_{self.spec.gate}")()

    def _constant(self) -> str:
        if not self.plain:
            return self._instead(self._scaled(self.x, self.spec.input), self._scaled(self.back, self.spec.recurrent))
        taken = self._scaled(self._mul(self.x, self._half(self.back)), 2.0 * (self.spec.input - 1.0))
        return self._add(self.x, taken, self._scaled(self.back, self.spec.recurrent))

    def _learned(self) -> str:
        recurrent, forget = (self._act(self._score(name, start), "sigmoid") for name, start in (
            ("recurrent", self.spec.recurrent), ("forget", 1.0 - self.spec.input)))
        parts = self.x, self._scaled(self._mul(self.x, forget), -1.0), self._mul(self.back, recurrent)
        return self._add(*parts) if self.plain else self._instead(*parts)

    def _rezero(self) -> str:
        parts = (("recurrent", self.back, self.spec.recurrent), ("input", self.x, self.spec.input))
        return self._add(self.base, *self._mixture(*(
            self._mul(self._mul(of, self._act(self._score(name, start), "sigmoid")), self._share(name))
            for name, of, start in parts)))

    def _coupled(self) -> str:
        """``a R + (1 - a) x``."""
        gate, other = self._two()
        return self._one_share(self._mul(self.back, gate), self._mul(self.x, other))

    def _variance(self) -> str:
        """``sqrt(a) R + sqrt(1 - a) x``: two independent streams of one variance keep it."""
        given, kept = (self._mul(of, self._act(g, "sqrt")) for of, g in zip((self.back, self.x), self._two()))
        return self._one_share(given, kept)

    def _two(self) -> tuple[str, str]:
        """A gate a, kept in [1e-4, 1 - 1e-4] as in the public code, and 1 - a."""
        score = self._score("recurrent", self.spec.recurrent)
        gate, one = self._act(score, "sigmoid"), self._scaled(self._half(score), 2.0)
        above = self._act(self._add(gate, self._scaled(one, -LEAST)), "relu")
        gate = self._add(above, self._scaled(one, LEAST))
        over = self._act(self._add(gate, self._scaled(one, LEAST - 1.0)), "relu")
        gate = self._add(gate, self._scaled(over, -1.0))
        return gate, self._add(one, self._scaled(gate, -1.0))

    def _one_share(self, given: str, kept: str) -> str:
        if self.spec.added:
            return self._add(self.base, self._mul(self._add(*self._mixture(given, kept)), self._share("recurrent")))
        return self._instead(given, kept)

    def _concat(self) -> str:
        """A linear map of (R, x) that starts as x."""
        width = self.build.program.width
        mixed = self.build.emit("linear", self.back, self.x, parameter=f"{self.spec.scope}.concat", out=width, bias=False,
                                identity=True)
        return self._instead(mixed)

    def _weight(self) -> str:
        """``(1 - a) x + a R``, a being one learned number that is cut off at 0 and 1."""
        one = self._one()
        free = self.build.emit("weigh", one, parameter=f"{self.spec.scope}.recurrent.share", init=self.spec.recurrent)
        above = self._act(free, "relu")
        over = self._act(self._add(free, self._scaled(one, -1.0)), "relu")
        gate = self._add(above, self._scaled(over, -1.0))
        return self._instead(self._mul(self.back, gate), self._mul(self.x, self._add(one, self._scaled(gate, -1.0))))

    def _instead(self, *parts: str) -> str:
        """The mixture in place of the stream, where there is a memory."""
        return self._add(self.base, self._scaled(self._there(), -1.0), *self._mixture(*parts))

    def _mixture(self, *parts: str) -> tuple[str, ...]:
        """Parts of a sum, or where the mixture is normed the one rescaled sum of them."""
        if self.spec.normed not in ("mixture", "both"):
            return parts
        return (self.build.emit("rescale", self._add(*parts), limit=self.spec.limit),)

    def _there(self) -> str:
        """The stream where there is a memory."""
        return self._mul(self.base, self._scaled(self._half(self.back), 2.0))

    def _one(self) -> str:
        return self._scaled(self._act(self.build.emit("zeros", width=1, pads=self.build.pads), "sigmoid"), 2.0)

    def _share(self, name: str) -> str:
        """``tanh(a)``, a being one learned number that starts as zero."""
        return self._act(self.build.emit("weigh", self._one(), parameter=f"{self.spec.scope}.{name}.share", init=0.0), "tanh")

    def _score(self, name: str, start: float) -> str:
        """What a gate that begins near ``start`` is the sigmoid of: a linear map of (x, R)."""
        score = self.build.emit("linear", self.x, self.back, parameter=f"{self.spec.scope}.{name}",
                                out=self.build.program.width, init=self.spec.init)
        return self._add(score, self._scaled(self._half(score), 2.0 * log(start / (1.0 - start))))

    def _half(self, like: str) -> str:
        """1/2 wherever ``like`` is: the sigmoid of 0."""
        return self._act(self._scaled(like, 0.0), "sigmoid")

    def _act(self, x: str, fn: str) -> str:
        return self.build.emit("act", x, fn=fn)

    def _scaled(self, x: str, by: float) -> str:
        return self.build.emit("scale", x, by=by)

    def _mul(self, x: str, y: str) -> str:
        return self.build.emit("mul", x, y)

    def _add(self, *xs: str) -> str:
        return xs[0] if len(xs) == 1 else self.build.emit("add", *xs)
