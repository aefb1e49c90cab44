"""Which programs run on models; the rest can be reported only."""

from __future__ import annotations

from depthpass.errors import LoweringError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Program

RUNS = frozenset(OPS) - {"pad", "trim"}
"""Kinds of ops that run on models."""


def unsupported_ops(program: Program) -> list[str]:
    """What of a program cannot run on a model, one line each; empty when all of it can."""
    return [f"%{o.name} = {o.kind}" for o in program if o.kind not in RUNS]


def check_program(program: Program) -> None:
    """Refuse a program that cannot run on a model.

    Raises:
        LoweringError: naming the ops.
    """
    if found := unsupported_ops(program):
        raise LoweringError(
            f"this program can be reported but not run on a model yet: {'; '.join(found[:3])}"
            f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}. Leave out what adds it "
            "(the pass pad)."
        )
