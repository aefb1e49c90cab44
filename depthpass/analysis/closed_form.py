"""Growth sequences as sympy expressions in n, the number of tokens, in the shortest exact form; and as plain text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from depthpass.analysis.growth import Growth

n = sympy.Symbol("n", integer=True, positive=True)
"""Number of real tokens of a row."""

MAX_FLOORS = 3
"""Most floor terms in a sum before a table by remainder is easier to read."""


def closed_form(growth: Growth) -> sympy.Expr:
    """Depth at n tokens, ``growth.at(n - 1)``, exact for every n of at least 1.

    Forms tried, in this order: a constant; ``a + b*floor((n - 1)/c)`` and sums of up to three such terms; the same with
    the floor capped by a Min (a finite number of equal steps); a Piecewise with such a tail, or with one by Mod.
    """
    f = growth.normal()
    if f.start == 0:
        return _tail(f, 0)
    if f.step == 0 and (capped := _capped(f)) is not None:
        return capped
    # Thousands of cases are possible (near ties between delays), which sympy would compare pair by pair.
    return sympy.Piecewise(*_runs(f), (_tail(f, f.start), True), evaluate=False)


def _tail(f: Growth, start: int) -> sympy.Expr:
    """The periodic part, from token ``start`` on."""
    if f.step == 0 and f.period == 1:
        return sympy.Integer(f.at(start))
    jumps = [(i, f.at(i + 1) - f.at(i)) for i in range(start, start + f.period) if f.at(i + 1) != f.at(i)]
    if len(jumps) <= MAX_FLOORS:
        # A jump right after token i (and every period later) is counted by floor((n - 1 + period - 1 - i)/period).
        terms = [height * _floor((f.period - 1 - i) % f.period, f.period) for i, height in jumps]
        rise = sympy.Add(*terms)
        return f.at(start) - rise.subs(n, start + 1) + rise
    phases = [
        (f.at(start + p) + sympy.Rational(f.step, f.period) * (n - 1 - start - p),
         sympy.Eq(sympy.Mod(n, f.period), (start + p + 1) % f.period))
        for p in range(f.period)
    ]
    return sympy.Piecewise(*phases[:-1], (phases[-1][0], True))


def _floor(shift: int, period: int) -> sympy.Expr:
    return sympy.floor((n - 1 + shift) / sympy.Integer(period))


def _capped(f: Growth) -> sympy.Expr | None:
    """``a + b*Min(count, floor((n - 1 + shift)/gap))`` for a sequence of equal, evenly spaced steps, or None."""
    jumps = [(i, f.at(i + 1) - f.at(i)) for i in range(f.start) if f.at(i + 1) != f.at(i)]
    heights, places = {h for _, h in jumps}, [i for i, _ in jumps]
    gaps = {b - a for a, b in pairwise(places)}
    if len(heights) != 1 or len(gaps) > 1:
        return None
    gap = gaps.pop() if gaps else places[0] + 1
    if places[0] >= gap:
        return None
    height, base = heights.pop(), f.at(0)
    # height * Min(R, n) is the plainer form for parallel loops.
    if gap == 1 and base % height == 0:
        return height * sympy.Min(len(jumps) + base // height, n - 1 + base // height)
    if len(jumps) == 1:
        return None
    return base + height * sympy.Min(len(jumps), _floor(gap - 1 - places[0], gap))


def _runs(f: Growth) -> list[tuple[int, sympy.Basic]]:
    """(value, condition) for the tokens before the periodic part, equal neighbours joined."""
    runs = []
    for i in range(f.start):
        if i + 1 == f.start or f.at(i + 1) != f.at(i):
            runs.append((f.at(i), n <= i + 1))
    return runs


class _TextPrinter(StrPrinter):
    """Plain text with fractions kept together and the constant first: ``16 + 14*floor((n - 1)/4)``."""

    def _print_floor(self, expr: sympy.floor) -> str:
        return f"floor({self._fraction(expr.args[0])})"

    def _print_ceiling(self, expr: sympy.ceiling) -> str:
        return f"ceil({self._fraction(expr.args[0])})"

    def _fraction(self, arg: sympy.Expr) -> str:
        top, bottom = sympy.fraction(sympy.together(arg))
        text = self.parenthesize(top, PRECEDENCE["Mul"])
        return text if bottom == 1 else f"{text}/{self._print(bottom)}"

    def _print_Add(self, expr: sympy.Add, order: str | None = None) -> str:
        constant, rest = expr.as_coeff_Add()
        if not constant or not rest.has(sympy.floor, sympy.Min, sympy.Max):
            return super()._print_Add(expr, order)
        return f"{constant} + {super()._print_Add(rest) if rest.is_Add else self._print(rest)}".replace("+ -", "- ")

    def _print_Min(self, expr: sympy.Min) -> str:
        return self._call("min", expr)

    def _print_Max(self, expr: sympy.Max) -> str:
        return self._call("max", expr)

    def _call(self, name: str, expr: Any) -> str:
        return f"{name}({', '.join(self._print(a) for a in sorted(expr.args, key=lambda a: bool(a.free_symbols)))})"

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        parts = [
            f"{self._print(value)} {'otherwise' if condition == True else 'if ' + self._print(condition)}"  # noqa: E712
            for value, condition in cast("tuple[tuple[sympy.Expr, Any], ...]", expr.args)
        ]
        return "{" + "; ".join(parts) + "}"

    def _print_Relational(self, expr: sympy.core.relational.Relational) -> str:
        if isinstance(expr, sympy.Eq):
            return f"{self._print(expr.lhs)} = {self._print(expr.rhs)}"
        return super()._print_Relational(expr)

    def _print_Mod(self, expr: sympy.Mod) -> str:
        return f"{self._print(expr.args[0])} mod {self._print(expr.args[1])}"


format_formula: Callable[[sympy.Expr], str] = _TextPrinter().doprint
"""Plain text of a closed form."""
