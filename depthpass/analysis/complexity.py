"""Complexity classes: what is proven about a spec's loops and padding, each line with its premises and its citation.

The statements are about *families* of models, one per input length, of the idealised kind that the cited papers treat.
They say nothing about what training finds. Where nothing is proven the answer is a plain "no statement"; so it is where the
papers treat another kind of program than the spec (routes, delay cycles, loop counts between two powers of log n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy as sp

from depthpass.errors import InputError, did_you_mean
from depthpass.prompt import in_notebooks

Status = Literal["proven", "conditional", "no statement"]

_FIXED = ("fixed", "bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "fp64", "float64", "fp8")
_LOG = ("log",)

_LOGSPACE = "a logspace-uniform (L-uniform) family of models, one per length"
_IDEAL = {
    "log": ("averaging hard attention", "masked pre-norm", "O(log n) bits per number",
            "a first-order-uniform family of models, one per length"),
    "fixed": ("a fixed number of bits per number (bf16, fp32, ...)", "width that grows as log n", _LOGSPACE),
}
_PAPER = {"log": "2505.18948", "fixed": "2605.30523"}


@in_notebooks
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
        exact: whether the function is Theta(log^degree n), and not between two powers: (log n)^1.5, log n log log n.
    """

    kind: Literal["constant", "polylog", "polynomial", "beyond"]
    degree: int | None = None
    exact: bool = False

    @property
    def power(self) -> int | None:
        """d of Theta(log^d n); None for everything else."""
        return self.degree if self.exact else None


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
        return Growth("constant", 0, True)
    x = sp.Symbol("x", positive=True)
    # x stands for log n, so that powers of a logarithm become powers and powers of n become exponentials.
    smooth = expr.replace(sp.ceiling, lambda a: a).replace(sp.floor, lambda a: a).replace(sp.Max, _largest)
    smooth = smooth.replace(sp.Min, _smallest)
    in_log = sp.simplify(sp.expand_log(smooth.subs(next(iter(free)), sp.exp(x)), force=True))
    try:
        size = sp.limit(in_log, x, sp.oo)
        if size.is_finite and size.is_nonnegative:
            return Growth("constant", 0, True)
        if size is not sp.oo:
            raise InputError(f"expected an expression that stays at 0 or above, got {expr}, which tends to {size}.")
        power = sp.limit(sp.log(in_log) / sp.log(x), x, sp.oo)
        if power.is_finite:
            return _polylog(in_log, x, power)
        order = sp.limit(sp.log(in_log) / x, x, sp.oo)
    except (NotImplementedError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot tell how {expr} grows with n; give a simpler expression, such as "
                         "ceiling(log(n, 2)).") from error
    return Growth("polynomial") if order.is_finite else Growth("beyond")


def _polylog(in_log: sp.Expr, x: sp.Symbol, power: sp.Expr) -> Growth:
    """Growth of a function of x = log n whose order is x^power up to factors below every power."""
    degree = max(1, int(sp.ceiling(power)))
    factor = sp.limit(in_log / x**degree, x, sp.oo)
    if factor is sp.oo:  # x^d log x: above log^d n, below log^(d+1) n
        return Growth("polylog", degree + 1)
    return Growth("polylog", degree, bool(factor.is_positive and factor.is_finite))


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
    shifts: bool = False,
    token_routing: bool | Literal["topk"] = False,
) -> list[Statement]:
    """What is proven about a spec.

    Args:
        loops: T(n), runs of a constant stack of blocks over all tokens; 1 (or any constant) for a stock model, a layer
            program, parallel loops (PLT) with a fixed number of loops.
        padding: P(n), pad tokens appended to the input.
        precision: ``log`` for O(log n) bits per number, or a number format (``bf16``, ``fp32``, ``fixed``).
        cot_steps: chain-of-thought tokens the model may write, for the comparisons; None = none.
        diffusion_steps: steps of a masked-diffusion sampler that runs the model; None = no sampler.
        delay_edges: whether streams of earlier tokens are fed back inside the stack, so that depth grows along the tokens
            (TurboConn, Feedback, SST, T2MLR).
        shifts: whether streams of earlier tokens are read without being fed back: PLT's loops, whose number is constant.
        token_routing: whether tokens choose how many loops they take (MoR, ITT, MoD); ``topk``: by rank in the row.

    Raises:
        InputError: a growth that cannot be told, a negative number, an unknown precision.
    """
    kind = precision_kind(precision)
    t, p = growth(loops), growth(padding)
    if delay_edges:
        statements = _delay_edges(t, p)
    elif token_routing:
        statements = _routes(t, p, token_routing == "topk")
    elif shifts:
        statements = _shifts(t, p, kind)
    else:
        statements = _loops(t, p, kind)
    if cot_steps is not None:
        plain = not (delay_edges or token_routing or shifts)
        statements += _chain_of_thought(growth(cot_steps), t, p, kind, plain)
    if diffusion_steps is not None:
        statements += _diffusion(growth(diffusion_steps), kind)
    return statements


def _name(kind: str, degree: int) -> str:
    return f"first-order-uniform TC^{degree}" if kind == "log" else f"L-uniform AC^{degree}"


def _runs(degree: int) -> str:
    return "a constant number of loops" if degree == 0 else f"O(log^{degree} n) loops"


_IN_P = Statement(
    "At most P: a row of n tokens is polynomially many block visits, each computable in polynomial time.",
    ("a uniform family of polynomial size", "polynomially many tokens and loops", "at most O(log n) bits per number"),
    "elementary", "proven",
)
_LONG_PADDING = Statement("Padding longer than every polynomial: nothing is proven.", (), "", "no statement")


def _in_p(t: Growth, p: Growth) -> list[Statement]:
    return [] if "beyond" in (t.kind, p.kind) else [_IN_P]


def _loops(t: Growth, p: Growth, kind: Literal["fixed", "log"]) -> list[Statement]:
    if t.kind not in ("constant", "polylog"):
        return _many_loops(t, p)
    if p.kind == "beyond":
        return [_LONG_PADDING]
    cite, ideal = _PAPER[kind], _IDEAL[kind]
    padded = (*ideal, "padding of any polynomial length")
    degree = t.degree or 0
    name = _name(kind, degree)
    if p.kind == "polynomial" and t.exact:
        statements = [Statement(
            f"With polynomial padding and {_runs(degree)} the family decides exactly {name}.", padded, cite, "proven",
        )]
    else:
        statements = _at_most(degree, kind)
        if not t.exact:
            statements.append(Statement(
                f"This loop count lies between log^{degree - 1} n and log^{degree} n: the results are about Theta(log^d n) "
                "loops for whole d, and no class between theirs is known to be reached exactly.", (), "", "no statement",
            ))
        else:
            statements.append(Statement(f"Without polynomial padding: whether everything in {name} is reached is not proven.",
                                        (), "", "no statement"))
    if degree:
        statements.append(Statement(
            "Polylogarithmically many loops (all powers of log n together) with polynomial padding reach exactly NC.",
            padded, cite, "proven",
        ))
    if kind == "fixed":
        statements.append(Statement(
            "Against O(log n) bits per number, TC^d drops to AC^d; more width than O(log n), or hard instead of soft attention, "
            "changes nothing.",
            padded, _PAPER["fixed"], "proven",
        ))
    return statements


def _at_most(degree: int, kind: Literal["fixed", "log"]) -> list[Statement]:
    return [Statement(
        f"With {_runs(degree)} the family decides nothing outside {_name(kind, degree)}: padding can only add power, and the "
        "padded family lies within it.",
        (*_IDEAL[kind], "at most polynomial padding"), _PAPER[kind], "proven",
    )]


def _many_loops(t: Growth, p: Growth) -> list[Statement]:
    if t.kind == "beyond":
        return [Statement("More loops than any polynomial: nothing is proven.", (), "", "no statement")]
    return [
        Statement("More than polylogarithmically many loops: the padding-and-looping results do not cover them.",
                  (), "", "no statement"),
        *_in_p(t, p),
    ]


def _shifts(t: Growth, p: Growth, kind: Literal["fixed", "log"]) -> list[Statement]:
    """Delays on no cycle: what a token reads of earlier ones is not fed back, so depth does not grow along the tokens."""
    if t.kind not in ("constant", "polylog"):
        return _many_loops(t, p)
    if p.kind == "beyond":
        return [_LONG_PADDING]
    degree = t.degree or 0
    (bound,) = _at_most(degree, kind)
    shifted = "each loop shifts streams a constant number of times, by a constant number of tokens each (in AC^0)"
    return [
        Statement("Streams of earlier tokens are read but never fed back: depth does not grow along the tokens.",
                  ("no delay lies on a cycle",), "elementary", "proven"),
        Statement(bound.claim, (*bound.premises, shifted), bound.citation, "proven"),
        Statement(f"Whether everything in {_name(kind, degree)} is reached with these shifts is not proven.", (), "",
                  "no statement"),
    ]


def _routes(t: Growth, p: Growth, ranked: bool) -> list[Statement]:
    statements = [Statement(
        "Tokens that take only some of the blocks: no class is proven. The looping results are about stacks that every token "
        "takes, and nothing is proven about what leaving some out costs or adds in power.", (), "", "no statement",
    )]
    if ranked:
        statements.append(Statement(
            "A choice of the best k tokens of a row counts them: with k half of the row the family decides MAJORITY (the last "
            "token that is taken has bit 1), which is outside AC^0. No bound by AC^0 holds for it, at any precision.",
            ("a capacity strictly between 0 and 1", "scores that tell two tokens apart", "a block that reads the taken tokens"),
            "elementary", "proven",
        ))
    return statements + _in_p(t, p)


def _delay_edges(t: Growth, p: Growth) -> list[Statement]:
    return [
        Statement(
            "Streams of earlier tokens that are fed back inside the stack (delays on a cycle): no class is proven for them. The "
            "looping results treat loops over all tokens at once; here depth grows along the tokens, through what one token "
            "hands on.", (), "", "no statement",
        ),
        *_in_p(t, p),
        Statement(
            "At least what the model without the edges decides: with zero edges it is that model.",
            ("the edges are added to a stream by learned maps, so that zero is allowed",), "elementary", "proven",
        ),
        Statement(
            "Constant depth bounds the class, so problems outside it need depth that grows with n; that growing depth suffices "
            "for any of them is not shown.", (), "", "no statement",
        ),
    ]


def _chain_of_thought(
    steps: Growth, t: Growth, p: Growth, kind: Literal["fixed", "log"], plain: bool
) -> list[Statement]:
    if kind == "fixed":
        return [Statement(
            "Chain of thought against loops: the comparisons assume O(log n) bits per number; at fixed precision they are not "
            "proven.", (), "", "no statement",
        )]
    statements = [Statement(
        "A DAG of local functions can be evaluated in about as many chain-of-thought steps as it has nodes, or in about as "
        "many loops as it has levels. Both are upper bounds.",
        ("O(log n) bits per number", "local functions that a block computes", "bounded fan-in",
         "memory for a whole level in the tokens at hand"), "2505.19245", "proven",
    )]
    k = t.power
    if plain and k and p.kind == "polynomial" and steps.degree is not None and steps.degree <= k:
        j = "a constant number of" if steps.kind == "constant" else f"O(log^{steps.degree} n)"
        statements.append(Statement(
            f"With {j} chain-of-thought steps and no loops a model decides strictly less than with Theta(log^{k} n) loops.",
            (f"TC^{k - 1} is not TC^{k}", "O(log n) bits per number", "deterministic decoding", "polynomial padding"),
            "2505.19245", "conditional",
        ))
    else:
        statements.append(Statement(
            "For this pair of step and loop counts no separation is proven; the known one is between at most log^k n steps and "
            "Theta(log^k n) loops of every token, on polynomial padding.",
            (), "", "no statement",
        ))
    statements.append(Statement(
        "Sampled chain of thought gives randomised approximation schemes that deterministic loops lack.",
        ("stochastic decoding", "the complexity assumptions of the paper"), "2505.19245", "conditional",
    ))
    return statements


def _diffusion(steps: Growth, kind: Literal["fixed", "log"]) -> list[Statement]:
    if kind == "log":
        return [Statement("Masked diffusion with O(log n) bits per number: nothing is proven.", (), "", "no statement")]
    setting = (
        "a fixed number of bits per number", "width that grows as log N", _LOGSPACE,
        "a learned planner that chooses the positions to write, and may write them again",
    )
    statements = [
        Statement(
            "T steps of masked diffusion on P masks lie within T loops on P pads, and these within T steps on "
            "(N + P)*D masks.",
            (*setting, "N tokens of input, width D"), "2510.13117", "proven",
        ),
        Statement(
            "Padded chain of thought of T steps on P pads lies within masked diffusion of T steps on P + (N + P)^2 "
            "masks.",
            setting, "2510.13117", "proven",
        ),
    ]
    if steps.power is not None:
        statements.insert(0, Statement(
            f"{'A constant number of' if steps.power == 0 else f'Theta(log^{steps.power} n)'} diffusion steps decide exactly "
            f"L-uniform AC^{steps.power}.",
            (*setting, "polynomially many masks"), "2510.13117", "proven",
        ))
    if steps.power == 1:
        statements.append(Statement(
            "Chain of thought of log N steps is strictly weaker than masked diffusion of log N steps on N masks.",
            setting, "2510.13117", "proven",
        ))
    return statements
