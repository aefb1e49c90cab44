"""Repeats without new parameters: intra-layer recurrence (arXiv 2505.01855) and repeated ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from depthpass.errors import PassError
from depthpass.ir.program import Program
from depthpass.limits import check_program
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.layer_program import check_range, visit_list
from depthpass.passes.streams import straight


@dataclass(frozen=True)
class IntraLayerRecurrence(Pass):
    """Apply block l ``reuse[l]`` times before block l + 1; every visit has its own cache slot.

        for l, r in enumerate(reuse):
            for _ in range(r): h = block[l](h)

    rewrite:
        intra_layer_recurrence(reuse=[3, 1, 2])
        `0 1 2`  ->  `0 0 0 1 2 2`

    Identity: all ones.

    Args:
        reuse: one count of at least 1 per visit of the program.
        scales: learned scales and gates for every visit, as in ``layer_program``.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "intra_layer_recurrence"
    numerics: ClassVar[Numerics] = "changing"
    loop_field: ClassVar[str | None] = "reuse"

    reuse: Sequence[int]
    scales: bool = False
    scope: str = "intra_layer_recurrence"

    def with_loops(self, times: int | Sequence[int]) -> Self:
        """One count per visit, or one number for every visit."""
        return replace(self, reuse=(times,) * len(self.reuse) if isinstance(times, int) else times)

    def validate(self) -> None:
        require(len(self.reuse) > 0 and min(self.reuse) >= 1, "intra_layer_recurrence.reuse", "counts of at least 1",
                list(self.reuse), "Use the pass 'skip' to leave a block out.")

        require(self.scope.isidentifier(), "intra_layer_recurrence.scope", "a plain name of letters, digits and _",
                self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        count = len(straight(program, self.name))
        if len(self.reuse) != count:
            raise PassError(f"intra_layer_recurrence.reuse: expected one count for each of the {count} visits, "
                            f"got {len(self.reuse)}.")
        check_program(sum(self.reuse), 0, "intra_layer_recurrence.reuse")
        layers = [i for i, r in enumerate(self.reuse) for _ in range(r)]
        return visit_list(self.name, program, layers, range(len(layers)) if self.scales else (), self.scope)


@dataclass(frozen=True)
class Repeat(Pass):
    """Visit the range [start, end) ``times`` times in a row; every visit has its own cache slot.

    rewrite:
        repeat(start=1, end=3, times=2)
        `0 1 2 3`  ->  `0 1 2 1 2 3`

    Identity: ``times`` = 1. The pass ``loop`` has injection, damping, shared keys and more.

    Args:
        start: first position of the range.
        end: one past the last position (half-open, as in PEFT and mergekit).
        times: visits in total.
        scales: learned scales and gates for the visits of the range, as in ``layer_program``.
        scope: first part of the parameter names.
    """

    name: ClassVar[str] = "repeat"
    numerics: ClassVar[Numerics] = "changing"
    shown: ClassVar[tuple[str, ...]] = ("times",)
    loop_field: ClassVar[str | None] = "times"

    start: int
    end: int
    times: int = 2
    scales: bool = False
    scope: str = "repeat"

    def validate(self) -> None:
        require(self.start >= 0, "repeat.start", "a position of at least 0", self.start)
        require(self.end > self.start, "repeat.end", f"a position above start={self.start}", self.end,
                "Ranges are half-open.")
        require(self.times >= 1, "repeat.times", "at least 1", self.times, "Use the pass 'skip' to leave blocks out.")
        require(self.scope.isidentifier(), "repeat.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        count = len(straight(program, self.name))
        check_range("repeat", self.start, self.end, count)
        check_program(self.times * (self.end - self.start), 0, "repeat.times")
        core = (*range(self.start, self.end),) * self.times
        scaled = range(self.start, self.start + len(core)) if self.scales else ()
        layers = (*range(self.start), *core, *range(self.end, count))
        return visit_list(self.name, program, layers, scaled, self.scope)
