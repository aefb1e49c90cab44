"""Feedback between tokens: attention to one memory per token instead of to the layer below."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from depthpass.errors import PassError
from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import Builder, check_scope, straight


@dataclass(frozen=True)
class FeedbackTransformer(Pass):
    """Let every block attend to a mixture of all layers at earlier tokens (Feedback Transformer, arXiv 2002.09402).

    ``m_t = sum_l softmax(w)_l h_l^t`` over the embedding (l = 0) and the outputs of all visits; keys and values of every
    visit at token t come from ``m_{t-1}``, those of the first token from zeros. The token is serial, and a row of n tokens is
    n times as deep as the stack.

    A memory stands at the position of the token that is the first to read it, so that a query finds the newest one where the
    stock block expects its own key. No setting is the stock model.

    rewrite:
        feedback_transformer()
        `%1 = block 0 (%0) slot 0`  ->  `%1 = block 0 (%0, %m) slot 0 memory true` where `%m = delay 1 (mixture)`

    Args:
        start: first visit that reads the memory. The mixture is of the streams before, between and after those visits.
        end: one past the last of them; None = to the end.
        scope: first part of the names of the new parameters.
    """

    name: ClassVar[str] = "feedback_transformer"
    numerics: ClassVar[Numerics] = "changing"

    start: int = 0
    end: int | None = None
    scope: str = "feedback"

    def validate(self) -> None:
        require(self.start >= 0, "feedback_transformer.start", "a position of at least 0", self.start)
        require(self.end is None or self.end > self.start, "feedback_transformer.end", f"a position above {self.start}", self.end)
        require(self.scope.isidentifier(), "feedback_transformer.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        check_scope(self.name, self.scope, program)
        visits = straight(program, self.name)
        end = len(visits) if self.end is None else self.end
        if end > len(visits) or self.start >= end:
            raise PassError(f"{self.name}.end: expected positions in 0..{len(visits)}, got {self.start}..{end}.")
        stack = visits[self.start : end]
        build, x = Builder(program), stack[0].args[0]
        back = build.emit("delay", x, tokens=1)
        memory, states = build.emit("add", build.emit("zeros", pads=build.pads), back), [x]
        for visit in stack:
            states.append(build.visit(visit, states[-1], asks=memory, memory=True))
        mixture = self._mixture(build, states)
        # The delay reads what is made after it.
        return build.splice(stack, states[-1]).map_ops(lambda o: replace(o, args=(mixture,)) if o.name == back else o)

    def _mixture(self, build: Builder, states: list[str]) -> str:
        """The states weighed by a softmax over learned numbers."""
        half = build.emit("act", build.emit("zeros", width=len(states), pads=build.pads), fn="sigmoid")
        weights = build.emit("weigh", build.emit("scale", half, by=2.0), parameter=f"{self.scope}.weights", init=0.0)
        shares = build.emit("act", weights, fn="softmax")
        return build.emit("add", *(build.emit("mul", h, build.emit("pick", shares, index=i)) for i, h in enumerate(states)))
