"""Complexity classes: what is proven about a spec's loops and padding, each line with its premises and its citation.

The statements are about *families* of models, one per input length, of the idealised kind that the cited papers treat.
They say nothing about what training finds. Where nothing is proven the answer is a plain "no statement".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy as sp

from depthpass.errors import InputError, did_you_mean

Status = Literal["proven", "conditional", "no statement"]

_FIXED = ("fixed", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "fp64", "float64", "fp8")
_LOG = ("log",)

_UNIFORM = "a first-order uniform family of models, one per length"
_IDEAL = {
    "log": ("averaging hard attention", "masked pre-norm", "O(log n) bits per number", _UNIFORM),
    "fixed": ("a fixed number of bits per number (bf16, fp32, ...)", _UNIFORM),
}


@dataclass(frozen=True)
class Statement:
    """One line about a spec.

    Attributes:
        claim: what holds.
        premises: under which it holds.
        citation: arXiv identifier, or ``elementary`` for a one-line argument given in the claim.
        status: ``proven``, ``conditional`` (rests on an unproven separation), or ``no statement``.
    """

    claim: str
    premises: tuple[str, ...]
    citation: str
    status: Status

    def __str__(self) -> str:
        source = self.citation if self.citation == "elementary" else f"arXiv {self.citation}"
        given = f" Given: {'; '.join(self.premises)}." if self.premises else ""
        return f"[{self.status}] {self.claim}{given}" + (f" ({source})" if self.citation else "")

    def rows(self) -> list[tuple[str, str]]:
        return [("status", self.status), ("claim", self.claim), ("premises", "; ".join(self.premises)),
                ("citation", self.citation)]


@dataclass(frozen=True)
class Growth:
    """How a function of n grows.

    Attributes:
        kind: ``constant``, ``polylog``, ``polynomial`` (above every power of log n) or ``beyond`` every polynomial.
        degree: of log n, rounded up, for ``constant`` (0) and ``polylog``; else None.
    """

    kind: Literal["constant", "polylog", "polynomial", "beyond"]
    degree: int | None = None


def growth(value: sp.Expr | int, n: sp.Symbol | None = None) -> Growth:
    """Growth of an expression in n; floors, ceilings, minima with constants and the base of a logarithm do not matter.

    Raises:
        InputError: an expression in other symbols, one that becomes negative, or one whose growth sympy cannot tell.
    """
    expr = sp.sympify(value)
    free = expr.free_symbols
    if len(free) > 1 or (n is not None and free - {n}):
        raise InputError(f"expected an expression in the number of tokens n only, got {expr} in "
                         f"{sorted(map(str, free))}.")
    if not free:
        if expr.is_negative or expr.is_finite is False:
            raise InputError(f"expected a number of at least 0, got {expr}.")
        return Growth("constant", 0)
    x = sp.Symbol("x", positive=True)
    # x stands for log n, so that powers of a logarithm become powers and powers of n become exponentials.
    smooth = expr.replace(sp.ceiling, lambda a: a).replace(sp.floor, lambda a: a).replace(sp.Max, _largest)
    smooth = smooth.replace(sp.Min, _smallest)
    in_log = sp.simplify(sp.expand_log(smooth.subs(next(iter(free)), sp.exp(x)), force=True))
    try:
        size = sp.limit(in_log, x, sp.oo)
        if size.is_finite and size.is_nonnegative:
            return Growth("constant", 0)
        if size is not sp.oo:
            raise InputError(f"expected an expression that stays at 0 or above, got {expr}, which tends to {size}.")
        power = sp.limit(sp.log(in_log) / sp.log(x), x, sp.oo)
        if power.is_finite:
            return Growth("polylog", max(1, int(sp.ceiling(power))))
        order = sp.limit(sp.log(in_log) / x, x, sp.oo)
    except (NotImplementedError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot tell how {expr} grows with n; give a simpler expression, such as "
                         "ceiling(log(n, 2)).") from error
    return Growth("polynomial") if order.is_finite else Growth("beyond")


def _largest(*args: sp.Expr) -> sp.Expr:
    rest = [a for a in args if a.free_symbols]
    return sp.Add(*rest) if rest else sp.Max(*args)


def _smallest(*args: sp.Expr) -> sp.Expr:
    constants = [a for a in args if not a.free_symbols]
    return sp.Min(*constants) if constants else sp.Min(*args, evaluate=False)


def precision_kind(precision: str) -> Literal["fixed", "log"]:
    """``fixed`` for every hardware number format, ``log`` for O(log n) bits.

    Raises:
        InputError: an unknown name.
    """
    name = str(precision).removeprefix("torch.")
    if name in _FIXED:
        return "fixed"
    if name in _LOG:
        return "log"
    known = (*_FIXED, *_LOG)
    raise InputError(f"precision: expected one of {', '.join(known)}, got {precision!r}.{did_you_mean(name, known)}")


def complexity(
    loops: sp.Expr | int,
    padding: sp.Expr | int = 0,
    precision: str = "fixed",
    *,
    cot_steps: sp.Expr | int | None = None,
    diffusion_steps: sp.Expr | int | None = None,
    delay_edges: bool = False,
    token_routing: bool = False,
) -> list[Statement]:
    """What is proven about a spec.

    Args:
        loops: T(n), runs of a constant stack of blocks over all tokens; 1 (or any constant) for a stock model, a layer
            program, parallel loops (PLT) with a fixed number of loops.
        padding: P(n), pad tokens appended to the input.
        precision: ``log`` for O(log n) bits per number, or a number format (``bf16``, ``fp32``, ``fixed``).
        cot_steps: chain-of-thought tokens the model may write, for the comparisons; None = none.
        diffusion_steps: steps of a masked-diffusion sampler that runs the model; None = no sampler.
        delay_edges: whether streams are read from earlier tokens inside the stack (TurboConn, Feedback, SST, T2MLR).
        token_routing: whether tokens choose how many loops they take (MoR, ITT, MoD).

    Raises:
        InputError: a growth that cannot be told, a negative number, an unknown precision.
    """
    kind = precision_kind(precision)
    t, p = growth(loops), growth(padding)
    found: list[Statement] = []
    if delay_edges:
        found += _delay_edges(t)
    else:
        found += _loops(t, p, kind)
    if token_routing and not delay_edges:
        found.append(Statement(
            "Routing tokens through fewer loops: nothing is proven about what it costs or adds in power.",
            (), "", "no statement",
        ))
    if cot_steps is not None:
        found += _chain_of_thought(growth(cot_steps), t, kind)
    if diffusion_steps is not None:
        found += _diffusion(growth(diffusion_steps), kind)
    return found


def _name(kind: str, degree: int) -> str:
    return f"{'TC' if kind == 'log' else 'AC'}^{degree}"


def _loops(t: Growth, p: Growth, kind: Literal["fixed", "log"]) -> list[Statement]:
    if t.kind not in ("constant", "polylog"):
        return _many_loops(t)
    cite, ideal = ("2505.18948" if kind == "log" else "2605.30523"), _IDEAL[kind]
    padded = (*ideal, "padding of any polynomial length")
    degree = t.degree or 0
    name = _name(kind, degree)
    runs = "a constant number of loops" if degree == 0 else f"O(log^{degree} n) loops"
    if p.kind == "beyond":
        found = [Statement("Padding longer than every polynomial: nothing is proven.", (), "", "no statement")]
    elif p.kind == "polynomial":
        found = [Statement(
            f"With polynomial padding and {runs} the family decides exactly first-order-uniform {name}.",
            padded, cite, "proven",
        )]
    else:
        found = [
            Statement(
                f"With {runs} the family decides nothing outside first-order-uniform {name}: padding can only add "
                "power, and the padded family lies within it.",
                ideal, cite, "proven",
            ),
            Statement(f"Without polynomial padding: whether everything in {name} is reached is not proven.",
                      (), "", "no statement"),
        ]
    if degree:
        found.append(Statement(
            "Polylogarithmically many loops (all powers of log n together) with polynomial padding reach exactly NC.",
            padded, cite, "proven",
        ))
    if kind == "fixed":
        found.append(Statement(
            "At fixed precision TC^d drops to AC^d; precision and depth matter, width and hard or soft attention "
            "do not.",
            ideal, "2605.30523", "proven",
        ))
    return found


_IN_P = Statement(
    "At most P: a row of n tokens is polynomially many block visits, each computable in polynomial time.",
    ("a uniform family of polynomial size",), "elementary", "proven",
)


def _many_loops(t: Growth) -> list[Statement]:
    if t.kind == "beyond":
        return [Statement("More loops than any polynomial: nothing is proven.", (), "", "no statement")]
    return [
        Statement("More than polylogarithmically many loops: the padding-and-looping results do not cover them.",
                  (), "", "no statement"),
        _IN_P,
    ]


def _delay_edges(t: Growth) -> list[Statement]:
    found = [Statement(
        "Edges from earlier tokens inside the stack (delays): no class is proven for them. The looping results treat "
        "loops over all tokens at once; here depth grows along the tokens, through what one token hands on.",
        (), "", "no statement",
    )]
    if t.kind != "beyond":
        found.append(_IN_P)
    found.append(Statement(
        "At least what the model without the edges decides: with zero edges it is that model.",
        ("the edges are added to a stream, so that zero is allowed",), "elementary", "proven",
    ))
    found.append(Statement(
        "Depth that grows with n is necessary for problems outside constant-depth classes, and is not shown to "
        "suffice: compare the task's DAG with the depth at n.",
        (), "", "no statement",
    ))
    return found


def _chain_of_thought(steps: Growth, t: Growth, kind: Literal["fixed", "log"]) -> list[Statement]:
    found = [Statement(
        "A DAG of local functions with V nodes takes about V chain-of-thought steps, in topological order, and about "
        "depth(V) loops.",
        ("O(log n) bits per number", "bounded fan-in", "enough width or padding to hold a level"), "2505.19245",
        "proven",
    )]
    polylog = steps.kind == "polylog"
    if polylog and t.kind == "polylog":
        k = max(steps.degree or 1, t.degree or 1)
        found.append(Statement(
            f"log^{k} n chain-of-thought steps are strictly weaker than log^{k} n loops.",
            (f"TC^{k - 1} is not TC^{k}", "O(log n) bits per number", "deterministic decoding"), "2505.19245",
            "conditional",
        ))
    else:
        found.append(Statement(
            "For this pair of step and loop counts no separation is proven; the known one compares log^k n steps with "
            "log^k n loops.",
            (), "", "no statement",
        ))
    found.append(Statement(
        "Sampled chain of thought gives randomised approximation schemes that deterministic loops lack.",
        ("stochastic decoding", "the complexity assumptions of the paper"), "2505.19245", "conditional",
    ))
    if kind == "fixed":
        found.append(Statement(
            "These comparisons assume O(log n) bits per number; at fixed precision they are not proven.", (), "",
            "no statement",
        ))
    return found


def _diffusion(steps: Growth, kind: Literal["fixed", "log"]) -> list[Statement]:
    if kind == "log":
        return [Statement("Masked diffusion with O(log n) bits per number: nothing is proven.", (), "", "no statement")]
    bits = ("a fixed number of bits per number",)
    found = [
        Statement(
            "T steps of masked diffusion on P masks lie within T loops on P pads, and these within T steps on "
            "(N + P)*D masks.",
            (*bits, "N tokens of input, width D"), "2510.13117", "proven",
        ),
        Statement(
            "Chain of thought of log N steps is strictly weaker than masked diffusion of log N steps on N masks.",
            bits, "2510.13117", "proven",
        ),
        Statement(
            "Padded chain of thought of T steps on P pads lies within masked diffusion of T steps on P + (N + P)^2 "
            "masks.",
            bits, "2510.13117", "proven",
        ),
    ]
    if steps.kind == "polylog":
        found.insert(0, Statement(
            f"O(log^{steps.degree} n) diffusion steps decide exactly AC^{steps.degree}.",
            (*bits, "polynomially many masks"), "2510.13117", "proven",
        ))
    return found
