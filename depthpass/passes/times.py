"""Loop counts that are no fixed number: drawn in training (Huginn), or a function of the row's real tokens."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from depthpass.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    import sympy

SHOWN = 1024
"""Tokens at which a program with a count that depends on n is printed when nobody says for how many."""

_CALLS: dict[str, Callable[..., float]] = {
    "ceil": math.ceil, "floor": math.floor, "round": round, "log2": math.log2, "log": math.log, "sqrt": math.sqrt,
    "min": min, "max": max,
}
_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
    ast.FloorDiv: operator.floordiv,
}


def count_at(text: str, n: int) -> int:
    """A count such as ``ceil(2 * log2(n) ** 1.5)`` for a row of n real tokens; never below 1.

    Raises:
        SpecError: the expression cannot be read, or is no number at n.
    """
    try:
        found = _value(_tree(text), text, n)
    except (ArithmeticError, ValueError, TypeError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"loop.times: {text!r} has no value at n = {n}: {error}.") from None
    if isinstance(found, complex) or not math.isfinite(found) or found != int(found):
        raise SpecError(f"loop.times: expected a whole number from {text!r}, got {found!r} at n = {n}. Wrap it in ceil(), "
                        "floor() or round().")
    return max(1, int(found))


@cache
def _tree(text: str) -> ast.expr:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise SpecError(f"loop.times: expected an expression in n such as 'ceil(log2(n))', got {text!r}.") from None
    if not any(isinstance(node, ast.Name) and node.id == "n" for node in ast.walk(tree)):
        raise SpecError(f"loop.times: expected an expression in n such as 'ceil(log2(n))', got {text!r}, in which there is "
                        "no n. Write a fixed count as a number without quotes.")
    return tree


def formula(text: str) -> sympy.Expr:
    """A count as a sympy expression in n, for reports."""
    import sympy

    from depthpass.analysis.closed_form import n

    known: dict[str, Any] = {"ceil": sympy.ceiling, "floor": sympy.floor, "log": sympy.log, "sqrt": sympy.sqrt, "min": sympy.Min,
             "max": sympy.Max, "log2": lambda x: sympy.log(x, 2), "round": sympy.Function("round")}

    def build(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=number):
                return sympy.nsimplify(number)
            case ast.UnaryOp(operand=inner):
                return -build(inner)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return sympy.floor(build(left) / build(right))
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](build(left), build(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                return known[name](*map(build, args))
        return n

    count_at(text, SHOWN)  # refuses what is not understood
    return sympy.Max(1, build(_tree(text)))


def _value(node: ast.expr, text: str, n: int) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id="n"):
            return n
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, text, n)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, text, n), _value(right, text, n))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            return _CALLS[name](*(_value(a, text, n) for a in args))
    name = node.func if isinstance(node, ast.Call) else node
    near = did_you_mean(name.id, (*_CALLS, "n")) if isinstance(name, ast.Name) else ""
    raise SpecError(f"loop.times: {ast.unparse(node)!r} in {text!r} is not understood.{near} Known: n, numbers, + - * / // "
                    f"**, {', '.join(_CALLS)}.")


def draw(mean: float, sigma: float, low: int, high: int, generator: torch.Generator | None = None) -> int:
    """Draw a loop count: r ~ Poisson(LogNormal(ln mean - sigma^2 / 2, sigma)) + 1, clipped to low..high (Huginn).

    Args:
        mean: of the log-normal rate, so r is ``mean`` + 1 on average before it is clipped.
        generator: on the CPU; None = torch's default one.
    """
    normal = torch.randn((), dtype=torch.float64, generator=generator)
    rate = torch.exp(math.log(mean) - sigma**2 / 2 + sigma * normal)
    return min(max(int(torch.poisson(rate, generator=generator)) + 1, low), high)
