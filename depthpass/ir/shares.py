"""Shares of a row's tokens: exact fractions (2/3 of 9 tokens are 6), and the ratios that stand in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

from depthpass.errors import InputError, SpecError, did_you_mean
from depthpass.ir.program import Program

Ratios = Mapping[str, float] | Sequence[float]
"""Shares by route label, or one for each label in program order."""


@lru_cache(maxsize=1024)
def exact_share(share: float) -> Fraction:
    """The fraction with a small denominator that a float stands for, else the float as it is.

    >>> exact_share(2 / 3), exact_share(0.29)
    (Fraction(2, 3), Fraction(29, 100))
    """
    near = Fraction(share).limit_denominator(10_000)
    return near if float(near) == share else Fraction(share)


def tokens_of(share: float, rounding: str, tokens: int) -> int:
    """How many of a row's real tokens rule ``topk`` takes: at least one, none for a share of 0.

    >>> tokens_of(2 / 3, "floor", 10), tokens_of(0.5, "ceil", 5), tokens_of(0.01, "floor", 5), tokens_of(0.0, "ceil", 5)
    (6, 3, 1, 0)
    """
    if share == 0:
        return 0
    exact = exact_share(share)
    whole = tokens * exact.numerator
    return max(1, -(-whole // exact.denominator) if rounding == "ceil" else whole // exact.denominator)


def checked_ratios(program: Program, ratios: Ratios, *, expected: bool = False) -> dict[str, float]:
    """Ratios by label.

    Args:
        expected: they are what is expected of thresholds and choices, not what is asked of them.

    Raises:
        SpecError, InputError: no labelled routes; an unknown label, a share out of range, one above that of the route it
            chooses from.
    """
    labels = program.labels
    if not labels:
        raise SpecError("ratios: expected a program with labelled routes, got one without. They come with "
                        "MixtureOfRecursions, InnerThinking and MixtureOfDepths.")
    if not isinstance(ratios, Mapping):
        if isinstance(ratios, str) or not isinstance(ratios, Sequence) or len(ratios) != len(labels):
            raise InputError(f"ratios: expected {len(labels)} shares, for {', '.join(labels)}, got {ratios!r}. Write a mapping "
                             "to set some of them.")
        ratios = dict(zip(labels, ratios))
    rules = {o["label"]: o["rule"] for o in program if o.kind == "route" and o["label"]}
    for label, value in ratios.items():
        if label not in rules:
            raise InputError(f"ratios: unknown label {label!r}.{did_you_mean(str(label), labels)} Labels: {', '.join(labels)}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"ratios[{label!r}]: expected a share between 0 and 1, got {value!r}.")
        if rules[label] != "topk" and value not in (0, 1) and not expected:
            raise InputError(f"ratios[{label!r}]: expected 0 (drop the step) or 1 for a route by {rules[label]}, which decides "
                             f"by itself, got {value!r}. Shares are set for mode='topk'.")
    _check_nesting(program, {k: float(v) for k, v in ratios.items()})
    return {k: float(v) for k, v in ratios.items()}


def _check_nesting(program: Program, ratios: Mapping[str, float]) -> None:
    for o in program:
        if o.kind != "route" or len(o.args) < 2:
            continue
        outer = program.defs[o.args[1]]
        inner_share, outer_share = (ratios.get(r["label"], r["capacity"]) for r in (o, outer))
        if inner_share is not None and outer_share is not None and inner_share > outer_share:
            raise InputError(f"ratios: expected {o['label']} to take at most the {outer_share} of {outer['label']}, got "
                             f"{inner_share}: shares do not grow, a token that left does not come back.")


def by_route(program: Program, ratios: Mapping[str, float]) -> dict[str, float]:
    """Ratios by the value name of each route instead of by label."""
    return {o.name: ratios[o["label"]] for o in program if o.kind == "route" and o["label"] in ratios}
