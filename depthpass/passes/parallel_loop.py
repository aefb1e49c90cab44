"""Parallel Loop Transformer (arXiv 2510.24824, LoopCoder-V2 arXiv 2606.18023, IQuest-Coder-Loop)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import Builder, straight


@dataclass(frozen=True)
class ParallelLoop(Pass):
    """Run the whole stack R times, each loop on the embedding plus the loop before at the *previous* token.

    With (a, b) = ``mix``, E the embedding and shift(h)[i] = h[i - 1] (nothing at the first token of a row):

        B^1 = E;  B^r = a E + b shift(h^(r-1));  h^r = stack(B^r);  output = h^R

    In loops r >= 2 attention mixes the keys of loop 1 with a window of the loop's own keys, per head and token:
    g Attn(q, K1, V1) + (1 - g) Attn(q, own last W). Because of the shift no loop of a token waits for another, so
    when decoding all R loops of a token run as R rows of one step.

    rewrite:
        parallel_loop(loops=2, window=64), on two blocks
        `%1 = block 0 (%0) slot 0` `%2 = block 1 (%1) slot 1`
        ->
        `%1 = block 0 (%0) slot 0` `%2 = block 1 (%1) slot 1`
        `%3 = delay 1 (%2)` `%4 = add (%0, %3)`
        `%5 = block 0 (%4) slot 2 keys 0 gate parallel_loop.v0.gate window 64`
        `%6 = block 1 (%5) slot 3 keys 1 gate parallel_loop.v1.gate window 64`

    Parameters: one gate per visit of the stack, ``{scope}.v{visit}.gate``, shared by the loops. Identity: ``loops``
    = 1, or :meth:`identity`, where mix is (1, 0) and the gates are 1, so that every loop computes the first one again.

    Args:
        loops: R.
        window: W, the own keys a gated visit reads, its own token included.
        mix: (a, b).
        normalize: pass h^r through the stock final norm only after the ``last`` loop, or after every ``loop``.
        gate: what the gate reads: the rotated ``query``, or the block's normed ``hidden`` state.
        shift: tokens between a loop and the next; 0 = plain sequential loops.
        kv: ``gated`` as above; ``first``: loop 1's keys only; ``own``: own keys only.
        gate_init: the gates' bias at the start: g starts as its sigmoid, one half by default.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "parallel_loop"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("loops",)
    loop_field: ClassVar[str | None] = "loops"
    names: ClassVar[tuple[str, ...]] = ("window",)

    loops: int = 2
    window: int = 64
    mix: tuple[float, float] = (1.0, 1.0)
    normalize: Literal["last", "loop"] = "last"
    gate: Literal["query", "hidden"] = "query"
    shift: int = 1
    kv: Literal["gated", "first", "own"] = "gated"
    gate_init: float = 0.0
    scope: str = "parallel_loop"

    @classmethod
    def paper(cls, **overrides: Any) -> ParallelLoop:
        """The paper's setting, which is the default: two loops, a window of 64, E + shift(h), gates on the query."""
        return cls(**overrides)

    @classmethod
    def identity(cls, **overrides: Any) -> ParallelLoop:
        """Exactly the stock model, in any number of loops: each starts from the embedding and reads loop 1's keys only.

        The gates' bias of 50 makes g = 1 to the last bit, where its gradient vanishes: to train away from the identity,
        make b of ``mix`` non-zero, or lower ``gate_init``.
        """
        return cls(**{"mix": (1.0, 0.0), "gate_init": 50.0, **overrides})

    @classmethod
    def loopcoder_v2(cls, **overrides: Any) -> ParallelLoop:
        """LoopCoder-V2 (7B): weak mixing, a norm after every loop, gates on the hidden state."""
        return cls(**{"mix": (0.707, 0.053), "normalize": "loop", "gate": "hidden", **overrides})

    @classmethod
    def iquest(cls, **overrides: Any) -> ParallelLoop:
        """IQuest-Coder-Loop: sequential loops (no shift, no second embedding) with gated keys."""
        return cls(**{"mix": (0.0, 1.0), "shift": 0, **overrides})

    def validate(self) -> None:
        n = self.name
        require(self.loops >= 1, f"{n}.loops", "at least 1", self.loops)
        require(self.window >= 1, f"{n}.window", "at least 1 key", self.window)
        require(self.window == 64 or self.kv == "gated", f"{n}.window", "kv='gated' beside it", self.kv)
        require(self.gate == "query" or self.kv == "gated", f"{n}.gate", "kv='gated' beside it", self.kv)
        require(self.gate_init == 0 or self.kv == "gated", f"{n}.gate_init", "kv='gated' beside it", self.kv)
        require(self.shift >= 0, f"{n}.shift", "at least 0 tokens", self.shift)
        require(any(self.mix), f"{n}.mix", "two factors that are not both 0", self.mix)
        require(self.mix[0] != 0 or self.shift == 0, f"{n}.shift", "0 with mix[0] = 0", self.shift,
                "The first token of a row has no earlier token, so a shifted loop needs the embedding.")
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        build, e = Builder(program), visits[0].args[0]
        x, slots = e, []
        for v in visits:
            x = build.visit(v, x)
            slots.append(build.slot_of(x))
        for _ in range(self.loops - 1):
            if self.normalize == "loop" and self.mix[1]:
                x = build.norm(x)
            x = self._mixed(build, e, x)
            for p, v in enumerate(visits):
                x = build.visit(v, x, **self._attention(p, slots[p]))
        return build.splice(visits, x)

    def _mixed(self, build: Builder, e: str, h: str) -> str:
        """a E + b shift(h), without arithmetic for factors of 0 and 1."""
        a, b = self.mix
        terms = []
        if a:
            terms.append(e if a == 1 else build.emit("scale", e, by=a))
        if b:
            h = build.emit("delay", h, tokens=self.shift) if self.shift else h
            terms.append(h if b == 1 else build.emit("scale", h, by=b))
        return terms[0] if len(terms) == 1 else build.emit("add", *terms)

    def _attention(self, visit: int, slot: int) -> dict[str, Any]:
        if self.kv == "own":
            return {}
        if self.kv == "first":
            return {"keys": slot}
        name = f"{self.scope}.v{visit}.gate"
        return {
            "keys": slot, "gate": name, "window": self.window, "gate_input": self.gate, "gate_init": self.gate_init,
        }
