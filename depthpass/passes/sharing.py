"""Turning a stack of unique layers into a shared one: which blocks stay, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthpass.errors import PassError
from depthpass.ir.program import Op, op

Sharing = Literal["middle_cycle", "cycle", "middle_sequence", "sequence"]
Start = Literal["stepwise", "average", "first", "last"]


@dataclass(frozen=True)
class Shared:
    """A shared stack made of a stack of unique layers.

    Attributes:
        before, after: visits that keep a block of their own.
        stacks: what is repeated: one stack of b visits, or with ``sequence`` b stacks of one visit each.
        directives: ``average`` and ``retire`` ops.
    """

    before: tuple[Op, ...]
    stacks: tuple[tuple[Op, ...], ...]
    after: tuple[Op, ...]
    directives: tuple[Op, ...] = ()


def shared_stack(who: str, visits: tuple[Op, ...], recursions: int, sharing: Sharing, init: Start) -> Shared:
    """Keep b = n / R blocks of the n that are to be shared; the others are retired.

    ``middle_*`` leaves the first and the last visit their own blocks (n = L - 2). ``cycle`` ties the layers j, j + b,
    j + 2b, ... (the stack is gone through R times), ``sequence`` ties R neighbours (each block R times before the next).
    The shared blocks are those at regular steps from the first to the last (``stepwise``, as the public code rounds them:
    see :func:`stepwise`), the ``first`` or the ``last`` b, or the first of each tied set, holding the ``average`` of its
    weights.

    Raises:
        PassError: n is not a multiple of R, or the program visits a block twice.
    """
    edge = 1 if sharing.startswith("middle") else 0
    middle = visits[edge : len(visits) - edge]
    n = len(middle)
    if not n or n % recursions:
        divisors = [d for d in range(2, n + 1) if n % d == 0]
        raise PassError(
            f"{who}.recursions: expected a number that divides the {n} layers that sharing={sharing!r} shares"
            f"{' (all but the first and the last)' if edge else ''}, got {recursions} with {len(visits)} layers. Use "
            f"{f'recursions out of {divisors}' if divisors else 'a model with more layers'}, another sharing, or set start "
            "and end to repeat visits of a model that keeps all its own layers."
        )
    if len({v["index"] for v in visits}) < len(visits):
        raise PassError(f"{who}.sharing: expected a program that visits every block once, got one that visits some again. "
                        "Set start and end to repeat visits of a program as it is.")
    b = n // recursions
    tied = [
        middle[j * recursions : (j + 1) * recursions] if sharing.endswith("sequence") else middle[j::b] for j in range(b)
    ]
    kept = {
        "stepwise": tuple(visits[p] for p in stepwise(edge, len(visits) - 1 - edge, b)),
        "average": tuple(group[0] for group in tied),
        "first": middle[:b], "last": middle[n - b :],
    }[init]
    directives = []
    if init == "average":
        directives += [
            op("average", index=group[0]["index"], blocks=tuple(v["index"] for v in group))
            for group in tied if len(group) > 1
        ]
    directives += [op("retire", index=v["index"]) for v in middle if v not in kept]
    stacks = tuple((v,) for v in kept) if sharing.endswith("sequence") else (kept,)
    return Shared(visits[:edge], stacks, visits[len(visits) - edge :], tuple(directives))


def stepwise(first: int, last: int, count: int) -> list[int]:
    """So many positions at even steps, both ends included; a tie goes to the even *position in the whole stack*.

    Rounding positions within the shared part instead picks other layers: of 8 layers with two recursions 1, 4 and 6 are
    kept, not 1, 3 and 6.

    >>> stepwise(1, 6, 3)
    [1, 4, 6]
    """
    if count == 1:
        return [first]
    step = (last - first) / (count - 1)
    return [*(round(first + j * step) for j in range(count - 1)), last]
