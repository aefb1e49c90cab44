"""Reports on programs whose loop count varies: settled at the report's length, with what holds at others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import sympy

from depthpass.analysis.depth import depth
from depthpass.ir import Program
from depthpass.passes import Pass
from depthpass.passes.times import formula


@dataclass(frozen=True)
class Lengths:
    """How the loop counts of a spec vary.

    Attributes:
        rules: per varying pass its name and what its count is.
        at: the program for a row of n real tokens.
        formula: depth in n where the count follows n and the depth is affine in it; None where it is not.
        follows_length: whether any count follows n.
        loops: the product of such counts in n; 1 where none does.
    """

    rules: tuple[tuple[str, str], ...]
    at: Callable[[int], Program]
    formula: sympy.Expr | None
    follows_length: bool
    loops: sympy.Expr

    def depth_at(self, n: int) -> int:
        """Depth of the output for a row of n real tokens."""
        return depth(self.at(n)).at(n)


def lengths(passes: Sequence[Pass], apply: Callable[[Sequence[Pass]], Program]) -> Lengths | None:
    """What varies in a spec; None when nothing does.

    Args:
        apply: applies settled passes to the stock program.
    """
    varying = [p for p in passes if p.varies is not None]
    if not varying:
        return None
    known: dict[tuple[Pass, ...], Program] = {}

    def at(n: int) -> Program:
        settled = tuple(p.settled(tokens=n) for p in passes)
        if settled not in known:
            known[settled] = apply(settled)
        return known[settled]

    follows = any(p.varies == "length" for p in varying)
    counts = [formula(getattr(p, str(p.loop_field))) for p in varying if p.varies == "length"]
    return Lengths(tuple((p.name, _rule(p)) for p in varying), at, _formula(passes, apply), follows,
                   sympy.Mul(*counts))


def _rule(p: Pass) -> str:
    times: Any = getattr(p, str(p.loop_field))
    if p.varies == "length":
        return f"{times}, at least 1"
    fixed = getattr(p.settled(), str(p.loop_field))
    return f"drawn from {times[0]}..{times[1]} in training, {fixed} in evaluation"


def _formula(passes: Sequence[Pass], apply: Callable[[Sequence[Pass]], Program]) -> sympy.Expr | None:
    following = [i for i, p in enumerate(passes) if p.varies == "length"]
    if len(following) != 1:
        return None
    i = following[0]
    formulas = []
    for t in (1, 2, 3, 4):
        fixed = [p.settled() for p in passes]
        fixed[i] = replace(passes[i], **{str(passes[i].loop_field): t})
        formulas.append(depth(apply(fixed)).formula)
    if any(f.free_symbols for f in formulas) or len({b - a for a, b in pairwise(formulas)}) != 1:
        return None
    times = formula(getattr(passes[i], str(passes[i].loop_field)))
    return formulas[0] + (formulas[1] - formulas[0]) * (times - 1)
