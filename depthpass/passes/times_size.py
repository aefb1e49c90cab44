"""How large the numbers of a loop count's expression are, before it is computed exactly."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from depthpass.errors import SpecError, did_you_mean

LARGEST = 1e18
"""Bound of every number in a count's expression."""

_CALLS: dict[str, Callable[..., float]] = {
    "ceil": math.ceil, "floor": math.floor, "round": round, "log2": math.log2, "log": math.log, "sqrt": math.sqrt,
    "min": min, "max": max,
}
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow,
    ast.FloorDiv: operator.floordiv,
}


def check_size(node: ast.expr, text: str, n: int) -> float:
    """About the value of an expression at n: refuses what is not understood, and numbers too large to compute with.

    Exact arithmetic takes as long as its numbers have digits, so this walks ahead in floating point.
    """
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            size = float(number)
        case ast.Name(id="n"):
            size = float(n)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            size = -check_size(inner, text, n)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            size = _about(op, check_size(left, text, n), check_size(right, text, n), text, n)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            size = _CALLS[name](*(check_size(a, text, n) for a in args))
        case _:
            name = node.func if isinstance(node, ast.Call) else node
            near = did_you_mean(name.id, (*_CALLS, "n")) if isinstance(name, ast.Name) else ""
            raise SpecError(f"loop.times: {ast.unparse(node)!r} in {text!r} is not understood.{near} Known: n, numbers, + - * "
                            f"/ // **, {', '.join(_CALLS)}.")
    if isinstance(size, complex) or not abs(size) < LARGEST:
        raise SpecError(f"loop.times: expected numbers below {LARGEST:g}, got {size:g} from {ast.unparse(node)!r} at n = {n}.")
    return float(size)


def _about(op: ast.operator, left: float, right: float, text: str, n: int) -> float:
    if isinstance(op, ast.Pow) and abs(right) > 64:
        raise SpecError(f"loop.times: expected exponents of at most 64, got {right:g} in {text!r} at n = {n}.")
    if isinstance(op, ast.Pow) and left and abs(right) * abs(math.log2(abs(left))) > math.log2(LARGEST):
        raise SpecError(f"loop.times: expected numbers below {LARGEST:g}, got {left:g} ** {right:g} in {text!r} at n = {n}.")
    return OPERATORS[type(op)](left, right)
