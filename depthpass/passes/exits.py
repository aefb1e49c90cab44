"""Early exits from a loop: after each iteration a score decides which tokens take the next one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from depthpass.errors import PassError
from depthpass.ir.program import Op
from depthpass.passes.base import Context
from depthpass.passes.streams import Builder

if TYPE_CHECKING:
    from depthpass.passes.loop import Loop


@dataclass
class Exits:
    """The routes of a loop whose tokens leave one by one; who left does not come back.

    Between two iterations :meth:`enter` gives the values of the tokens that stay and :meth:`leave` puts the new states back
    and decides who stays for the next one. The tokens of an iteration are a route nested in the one before.

    Attributes:
        criterion: ``cdf``: stay while the product of 1 - lambda_u over the iterations so far is above 1 - ``limit``;
            ``argmax``: while one of the last ``limit`` iterations has changed the most likely token; the others: while the
            distance between this iteration's state or prediction and the one before's is at least ``limit``. Before the
            first iteration stand the state that the loop starts from (``state``, ``cosine``) and the uniform distribution
            (``kl``); ``entropy`` and ``argmax`` have nothing to compare the first one with.
        gate: name of the parameters of lambda_t = sigmoid(w norm(s_t) + b).
        vocabulary: size of the logits; only ``kl`` and ``entropy`` need it.
        coda: visits between the loop and the head, which a prediction passes. They have slots of their own in every
            iteration: the coda of iteration t sees the earlier tokens that took iteration t.
        out_norm: whether the stock final norm stands before the coda.
        route: the tokens of the next iteration; empty = all.
        kept: what the criterion remembers of every token: the product, or the last logits.
        iterations: how many have been decided on.
        moves: of ``argmax``: whether each iteration has changed the most likely token, of every token.
    """

    build: Builder
    criterion: str
    limit: float
    gate: str
    vocabulary: int | None
    coda: tuple[Op, ...] = ()
    out_norm: bool = False
    route: str = ""
    kept: str = ""
    iterations: int = 0
    moves: list[str] = field(default_factory=list)

    def enter(self, x: str) -> str:
        """The values of the tokens that take the next iteration."""
        return self.build.emit("gather", x, self.route) if self.route else x

    def put(self, base: str, x: str) -> str:
        """A value of every token, with those of this iteration's tokens replaced."""
        return self.build.emit("scatter", base, x, self.route, mode="replace") if self.route else x

    def leave(self, x: str, before: str, last: bool) -> None:
        """Decide which of this iteration's tokens take the next one.

        Args:
            x: their new states.
            before: the states that they entered with.
            last: whether this is the last decision, so that nothing has to be remembered.
        """
        self.iterations += 1
        score, memory = self._stay(x) if self.criterion == "cdf" else self._moved(x, before)
        if memory and not last:
            self.kept = self.put(self.kept, memory) if self.kept else memory
        if score:
            # Without the last digits: 1 - 0.7 is to be 0.3.
            cdf, left = self.criterion == "cdf", float(f"{1.0 - self.limit:.12g}")
            limit = {"cdf": left, "argmax": 0.5}.get(self.criterion, self.limit)
            self.route = self.build.emit(
                "route", score, *((self.route,) if self.route else ()), rule="above" if cdf else "threshold", threshold=limit,
            )

    def _stay(self, x: str) -> tuple[str, str]:
        """The probability of not having left yet."""
        build = self.build
        score = build.emit("linear", build.norm(x), parameter=self.gate, out=1)
        # 1 - sigmoid(s) = sigmoid(-s)
        stay = build.emit("act", build.emit("scale", score, by=-1.0), fn="sigmoid")
        if self.kept:
            stay = build.emit("mul", self.enter(self.kept), stay)
        return stay, stay

    def _moved(self, x: str, before: str) -> tuple[str, str]:
        """How far the state, or what coda and head make of it, has moved."""
        build = self.build
        if self.criterion in ("state", "cosine"):
            return build.emit("distance", x, before, rule=self.criterion), ""
        logits = self._predict(x)
        if self.criterion == "argmax":
            return self._unsettled(logits), logits
        if self.iterations > 1:
            return build.emit("distance", logits, self.enter(self.kept), rule=self.criterion), logits
        if self.criterion == "entropy":
            return "", logits
        uniform = build.emit("scale", logits, by=0.0)
        return build.emit("distance", logits, uniform, rule="kl"), logits

    def _unsettled(self, logits: str) -> str:
        """How many of the last ``limit`` iterations have changed the most likely token; empty while there are fewer."""
        if self.iterations == 1:
            return ""
        moved = self.build.emit("distance", logits, self.enter(self.kept), rule="argmax")
        count = int(self.limit)
        earlier = self.moves[len(self.moves) - count + 1 :] if count > 1 else []
        self.moves.append(self.put(self.moves[-1], moved) if self.moves else moved)
        if len(self.moves) < count:
            return ""
        return self.build.emit("add", moved, *map(self.enter, earlier)) if earlier else moved

    def _predict(self, x: str) -> str:
        """What the model would say if the loop ended here."""
        build = self.build
        y = build.norm(x) if self.out_norm else x
        for v in self.coda:
            y = build.visit(v, y)
        return build.emit("logits", build.norm(y), width=self.vocabulary)


def exits_of(loop: Loop, build: Builder, ctx: Context, coda: tuple[Op, ...]) -> Exits | None:
    """The routes of an exit that skips visits; None without one."""
    if loop.exit is None or not loop.skip:
        return None
    told = ctx.facts.get("vocab_size")
    vocabulary = told if isinstance(told, int) else None
    if loop.criterion in ("kl", "entropy") and vocabulary is None:
        raise PassError(f"loop.criterion: {loop.criterion!r} needs the size of the model's vocabulary, got {told!r} "
                        f"for {ctx.model}. Use criterion='state' or 'cdf'.")
    return Exits(build, loop.criterion, loop.exit, f"{loop.scope}.exit", vocabulary, coda, loop.out_norm)
