"""Loop counts that are no fixed number: drawn in training (Huginn), or a function of the row's real tokens."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from depthpass.errors import SpecError
from depthpass.limits import FORMULA, INTEGER, shown
from depthpass.passes.times_size import OPERATORS, check_size

if TYPE_CHECKING:
    import sympy

SHOWN = 1024
"""Tokens at which a program with a count that depends on n is printed when nobody says for how many."""

def count_at(text: str, n: int) -> int:
    """A count such as ``ceil(2 * log2(n) ** 1.5)`` for a row of n real tokens; never below 1.

    Exact: ``floor(0.29 * n)`` is 29 at 100 and ``ceil(log(n, 5))`` is 3 at 125, as :func:`formula` says, which is evaluated
    by the same rules. Numbers with a point stand for the decimal fractions they are written as.

    Raises:
        SpecError: the expression cannot be read, is no whole number at n, or one above the largest count.
    """
    return _count(text, int(n))


@lru_cache(maxsize=1 << 14)
def _count(text: str, n: int) -> int:
    try:
        check_size(_tree(text), text, n)
        value = _exact(_tree(text), n)
    except (ArithmeticError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"loop.times: {text!r} has no value at n = {n}: {error}.") from None
    if value.is_finite is False or value.is_real is False:
        raise SpecError(f"loop.times: {text!r} has no value at n = {n}: it gives {value}.")
    whole = value if value.is_Integer else value.round()
    if not value.is_Integer and not (whole - value).equals(0):
        raise SpecError(f"loop.times: expected a whole number from {text!r}, got {shown(float(value))} at n = {n}. Wrap it in "
                        "ceil(), floor() or round().")
    if whole > INTEGER:
        raise SpecError(f"loop.times: expected a count of at most {INTEGER} from {text!r}, got more at n = {n}.")
    return max(1, int(whole))


@cache
def _tree(text: str) -> ast.expr:
    if len(text) > FORMULA:
        raise SpecError(f"loop.times: expected an expression in n of at most {FORMULA} characters, got {len(text)}.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SpecError(f"loop.times: expected an expression in n such as 'ceil(log2(n))', got {text!r}.") from None
    if not any(isinstance(node, ast.Name) and node.id == "n" for node in ast.walk(tree)):
        raise SpecError(f"loop.times: expected an expression in n such as 'ceil(log2(n))', got {text!r}, in which there is "
                        "no n. Write a fixed count as a number without quotes.")
    return tree


def formula(text: str) -> sympy.Expr:
    """A count as a sympy expression in n, for reports."""
    import sympy

    from depthpass.analysis.closed_form import n

    count_at(text, SHOWN)  # refuses what is not understood
    return sympy.Max(1, _exact(_tree(text), n))


def _exact(node: ast.expr, n: int | sympy.Expr) -> sympy.Expr:
    """The value of an expression at n, a number or a symbol."""
    import sympy

    known: dict[str, Callable[..., Any]] = {
        "ceil": sympy.ceiling, "floor": sympy.floor, "log": sympy.log, "sqrt": sympy.sqrt, "min": sympy.Min,
        "max": sympy.Max, "log2": lambda x: sympy.log(x, 2), "round": _rounded,
    }

    def build(node: ast.expr) -> sympy.Expr:
        match node:
            case ast.Constant(value=number):
                # The shortest text that gives the float: what its author wrote.
                return sympy.Rational(repr(number))
            case ast.UnaryOp(operand=inner):
                return -build(inner)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return sympy.floor(build(left) / build(right))
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](build(left), build(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                return known[name](*map(build, args))
        return sympy.sympify(n)

    return build(node)


def _rounded(x: sympy.Expr) -> sympy.Expr:
    """To the nearest integer, halves to the even one, as Python's ``round``."""
    import sympy

    quarter = (2 * x - 1) / 4
    return sympy.floor(x + sympy.Rational(1, 2)) + sympy.ceiling(quarter) - sympy.floor(quarter) - 1
