"""Relaxed recursive models: a stack that shares its blocks, with a low-rank update for every visit (arXiv 2410.20672)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.layer_program import check_range
from depthpass.passes.sharing import stepwise
from depthpass.passes.streams import Builder, check_scope, straight


@dataclass(frozen=True)
class RelaxedRecursion(Pass):
    """Tie the visits [start, end) of an untied stack into b = n / T blocks that run T times, relaxed by a LoRA per visit.

        W'_(t,j) = W_j + B_(t,j) A_(t,j)        W_j of the shared block j, t = 0 .. T-1

    Visit (t, j) stands where the stack had its own block u = start + t b + j. The shared blocks are the ``first`` b of the
    range, those at regular steps (``stepwise``), or hold the ``average`` of the blocks they stand for; B A starts as the best
    approximation of rank r of W_u - W_j (truncated SVD), so that r = 0 ties the stack and a large r gives it back. What a
    low-rank update does not reach (norms, biases) is that of the shared block. Blocks that nothing visits are retired.

    rewrite:
        relaxed_recursion(times=2, start=1, end=5, rank=4)
        `0 1 2 3 4 5`  ->  `0 1 2 1 2 5`, each visit of 1 and 2 with a LoRA of its own

    Parameters, under ``scope``: ``t{t}.b{j}.lora``. Identity: ``times`` = 1.

    Args:
        times: T, which divides the number of visits in the range.
        start: first position of the range.
        end: one past its last position; None = the end of the stack.
        rank: r; 0 = none.
        init: what the shared blocks start from.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "relaxed_recursion"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("times", "rank")

    times: int = 2
    start: int = 0
    end: int | None = None
    rank: int = 8
    init: Literal["average", "first", "stepwise"] = "average"
    scope: str = "relaxed"

    def validate(self) -> None:
        n = self.name
        require(self.times >= 1, f"{n}.times", "at least 1", self.times)
        require(self.start >= 0, f"{n}.start", "a position of at least 0", self.start)
        require(self.end is None or self.end > self.start, f"{n}.end", f"a position above start={self.start}", self.end)
        require(self.rank >= 0, f"{n}.rank", "at least 0", self.rank)
        require(self.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = straight(program, self.name)
        end = len(visits) if self.end is None else self.end
        check_range(self.name, self.start, end, len(visits))
        check_scope(self.name, self.scope, program)
        middle = visits[self.start : end]
        if self.times == 1:
            return program
        if len(middle) % self.times:
            raise PassError(f"{self.name}.times: expected a number that divides the {len(middle)} visits from {self.start} to "
                            f"{end}, got {self.times}.")
        if len({v["index"] for v in visits}) < len(visits):
            raise PassError(f"{self.name}: expected a program that visits every block once, got one that visits some again.")
        b = len(middle) // self.times
        shared = self._shared(visits, middle, end, b)
        build, x = Builder(program), visits[0].args[0]
        for v in visits[: self.start]:
            x = build.visit(v, x)
        for t in range(self.times):
            for j, v in enumerate(shared):
                lora = {"lora": f"{self.scope}.t{t}.b{j}.lora", "lora_rank": self.rank, "untied": middle[t * b + j]["index"]}
                x = build.visit(v, x, **(lora if self.rank else {}))
        for v in visits[end:]:
            x = build.visit(v, x)
        program = build.splice(visits, x)
        first = [op("average", index=v["index"], blocks=tuple(m["index"] for m in middle[j::b])) for j, v in enumerate(shared)]
        gone = [op("retire", index=v["index"]) for v in middle if v not in shared]
        directives = (first if self.init == "average" else []) + gone
        return Program(program.model, program.blocks, program.width, (*directives, *program.ops))

    def _shared(self, visits: tuple[Op, ...], middle: tuple[Op, ...], end: int, b: int) -> tuple[Op, ...]:
        """The visits whose blocks stay."""
        if self.init == "stepwise":
            return tuple(visits[p] for p in stepwise(self.start, end - 1, b))
        return middle[:b]
