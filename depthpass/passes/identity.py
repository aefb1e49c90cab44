"""The pass that changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from depthpass.ir.program import Program
from depthpass.passes.base import Context, Numerics, Pass


@dataclass(frozen=True)
class Identity(Pass):
    """Leave the program as it is: the stock model, run by depthpass. For baselines and overhead measurements.

    rewrite:
        `0 1 2 3`  ->  `0 1 2 3`
    """

    name: ClassVar[str] = "identity"
    numerics: ClassVar[Numerics] = "exact"

    def apply(self, program: Program, ctx: Context) -> Program:
        return program
