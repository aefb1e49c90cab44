"""How T2MLR mixes the last memory into a token: the forms of its paper and of its public code."""

from __future__ import annotations

from dataclasses import dataclass

from depthpass.passes.t2mlr_terms import Terms


@dataclass
class Mixing(Terms):
    """Emits the mixture of a stream ``x`` and the memory ``back``, which the first token does not have: there it is x.

    So what is mixed is written as x, less what is taken away of it, plus what the memory adds: sums skip what is absent.

    Attributes:
        base: the stream; ``x`` and ``back`` are what is mixed, normed where that is asked for.
    """

    def __post_init__(self):
        super().__post_init__()
        spec = self.spec
        self.plain = spec.normed == "none" and spec.reads == "both"
        if not self.plain or spec.gate == "weight":
            self.x = self._there()
        if spec.normed in ("streams", "both"):
            self.x, self.back = self.normed(self.x, "input"), self.normed(self.back, "recurrent")

    def emit(self) -> str:
        return getattr(self, f"_{self.spec.gate}")()

    def _constant(self) -> str:
        if not self.plain:
            return self._instead(self.scaled(self.x, self.spec.input), self.scaled(self.back, self.spec.recurrent))
        taken = self.scaled(self.mul(self.x, self.half(self.back)), 2.0 * (self.spec.input - 1.0))
        return self.add(self.x, taken, self.scaled(self.back, self.spec.recurrent))

    def _learned(self) -> str:
        if self.spec.normalized:
            given, kept = self.two()
            return self._instead(self.mul(self.back, given), self.mul(self.x, kept))
        recurrent, forget = self.gate("recurrent", self.spec.recurrent), self.gate("forget", 1.0 - self.spec.input)
        parts = self.x, self.scaled(self.mul(self.x, forget), -1.0), self.mul(self.back, recurrent)
        return self.add(*parts) if self.plain else self._instead(*parts)

    def _rezero(self) -> str:
        given, kept = self.two()
        return self.add(self.base, *self._mixture(self.mul(self.mul(self.back, given), self.share("recurrent")),
                                                  self.mul(self.mul(self.x, kept), self.share("input"))))

    def _coupled(self) -> str:
        """``a R + (1 - a) x``."""
        gate, other = self.one_of_two()
        return self._one_share(self.mul(self.back, gate), self.mul(self.x, other))

    def _variance(self) -> str:
        """``sqrt(a) R + sqrt(1 - a) x``: two independent streams of one variance keep it."""
        given, kept = (self.mul(of, self.act(g, "sqrt")) for of, g in zip((self.back, self.x), self.one_of_two()))
        return self._one_share(given, kept)

    def _exponential(self) -> str:
        """``a x + sqrt(1 - a^2) i R``, a near 1: a stream that loses little of itself per token, as in RG-LRU."""
        kept, left = self.decay()
        back = self.mul(self.back, self.gate("input", self.spec.input))
        return self._instead(self.mul(self.x, kept), self.mul(back, left))

    def _concat(self) -> str:
        """A linear map of (R, x) that starts as x."""
        width = self.build.program.width
        mixed = self.build.emit("linear", self.back, self.x, parameter=f"{self.spec.scope}.concat", out=width, bias=False,
                                identity=True)
        return self._instead(mixed)

    def _weight(self) -> str:
        """``(1 - a) x + a R``, a being one learned number that is cut off at 0 and 1."""
        one = self.one()
        free = self.build.emit("weigh", one, parameter=f"{self.spec.scope}.recurrent.share", init=self.spec.recurrent)
        above = self.act(free, "relu")
        over = self.act(self.add(free, self.scaled(one, -1.0)), "relu")
        gate = self.add(above, self.scaled(over, -1.0))
        return self._instead(self.mul(self.back, gate), self.mul(self.x, self.add(one, self.scaled(gate, -1.0))))

    def _one_share(self, given: str, kept: str) -> str:
        if self.spec.added:
            return self.add(self.base, self.mul(self.add(*self._mixture(given, kept)), self.share("recurrent")))
        return self._instead(given, kept)

    def _instead(self, *parts: str) -> str:
        """The mixture in place of the stream, where there is a memory."""
        return self.add(self.base, self.scaled(self._there(), -1.0), *self._mixture(*parts))

    def _mixture(self, *parts: str) -> tuple[str, ...]:
        """Parts of a sum, or where the mixture is normed the one rescaled sum of them."""
        if self.spec.normed not in ("mixture", "both"):
            return parts
        return (self.build.emit("rescale", self.add(*parts), limit=self.spec.limit),)

    def _there(self) -> str:
        """The stream where there is a memory."""
        return self.mul(self.base, self.scaled(self.half(self.back), 2.0))
