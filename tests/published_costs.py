"""Cost formulas that papers print, as plain functions: what programs are checked against.

Each function is exact for its stated convention. Costs counted from a program's graph differ where a paper leaves
something out; :func:`depthpass.analysis.cost.cost` counts everything, and its notes say what it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from depthpass.errors import InputError

Lengths = Mapping[int, Fraction | float] | Sequence[int]
"""Padded lengths: a distribution (length to probability), or the lengths of some batches."""


def recursions(lengths: Lengths, group: int) -> Fraction | float:
    """TurboConn: mean trips of the token loop per step, the mean of ceil(length / group) over batches.

    >>> recursions([155], 4)
    Fraction(39, 1)
    """
    _at_least_one(group=group)
    weights = _distribution(lengths)
    return sum((w * math.ceil(Fraction(length, group)) for length, w in weights.items()), Fraction(0))


def mean_recursions(mean_length: float, group: int) -> float:
    """The same when only the mean length is known: length / g + (g - 1) / 2g, exact for uniform remainders."""
    _at_least_one(group=group)
    return mean_length / group + (group - 1) / (2 * group)


def longest_of(lengths: Lengths, batch: int) -> dict[int, Fraction]:
    """Distribution of the longest of ``batch`` independent rows: the length a batch is padded to."""
    _at_least_one(batch=batch)
    weights = _distribution(lengths)
    seen, below = {}, Fraction(0)
    for length in sorted(weights):
        upto = below + Fraction(weights[length])
        seen[length] = upto**batch - below**batch
        below = upto
    return seen


def mean_length(lengths: Lengths) -> float:
    """Mean of a distribution of lengths."""
    return float(sum(length * w for length, w in _distribution(lengths).items()))


def loop_kv_ratio(loops: int, window: int, tokens: int) -> Fraction:
    """Parallel loops: KV memory over the base, 1 + (R - 1) * W / T: one full slot and R - 1 windows per block."""
    _at_least_one(loops=loops, window=window, tokens=tokens)
    return 1 + Fraction((loops - 1) * min(window, tokens), tokens)


def recursion_capacities(recursions_: int) -> tuple[Fraction, ...]:
    """Mixture of recursions: share of the full length that enters recursion r, (R - r + 1) / R."""
    _at_least_one(recursions=recursions_)
    return tuple(Fraction(recursions_ - r, recursions_) for r in range(recursions_))


def recursion_ratios(recursions_: int, sharing: bool) -> dict[str, Fraction | tuple[Fraction, ...]]:
    """Mixture of recursions against a stack of equal unrolled depth, shared part only.

    Returns:
        ``kv_memory``: (R + 1) / 2R with own slots, 1 / R with shared ones; ``kv_reads`` of a token that takes every
        recursion: (R + 1) / 2R and 1; ``attention_flops`` per recursion: (k / T)^2 and k / T.
    """
    shares = recursion_capacities(recursions_)
    mean = sum(shares, Fraction(0)) / recursions_
    return {
        "kv_memory": Fraction(1, recursions_) if sharing else mean,
        "kv_reads": Fraction(1) if sharing else mean,
        "attention_flops": shares if sharing else tuple(s * s for s in shares),
    }


def relative_visits(visits: int | Sequence[int], blocks: int) -> Fraction:
    """Layer programs |P| / L and intra-layer recurrence sum(r) / L."""
    total = visits if isinstance(visits, int) else sum(visits)
    _at_least_one(visits=total, blocks=blocks)
    return Fraction(total, blocks)


def inner_thinking_flops(base: float, shares: Sequence[float], layer_share: float) -> float:
    """Inner Thinking, as its tables count: the base times 1 + layer_share * sum(rho).

    The base is the whole model's forward pass, the embedding counted as a matrix multiply and attention without its
    mask, so a thinking step is charged a share of the embedding and of the head as well.
    """
    return base * (1 + layer_share * sum(shares))


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}.")


def _distribution(lengths: Lengths) -> Mapping[int, Fraction | float]:
    if isinstance(lengths, Mapping):
        total = sum(lengths.values())
        if not lengths or abs(total - 1) > 1e-9:
            raise InputError(f"lengths: expected probabilities that add up to 1, got {float(total):g}.")
        return lengths
    if not lengths:
        raise InputError("lengths: expected at least one length, got none.")
    return {length: Fraction(list(lengths).count(length), len(lengths)) for length in dict.fromkeys(lengths)}
