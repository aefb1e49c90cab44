"""Integer sequences over tokens that grow by a constant per period from some token on: the values of max-plus systems.

A :class:`Growth` is exact for every token. Sequences of this kind are closed under what a dependence graph does to
longest paths: taking a maximum, adding a weight, waiting for earlier tokens, and adding two of them up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

NEVER = float("-inf")
"""Value of a token that no path reaches. Never mixed into arithmetic on paths, only compared."""

Value = int | float


@dataclass(frozen=True)
class Growth:
    """``f(i)`` for tokens ``i = 0, 1, ...``, with ``f(i + period) == f(i) + step`` for every ``i >= start``.

    Attributes:
        values: f(0), f(1), ..., f(start + period - 1); ``NEVER`` where no path arrives.
        period: in tokens, at least 1.
        step: growth per period, at least 0.
    """

    values: tuple[Value, ...]
    period: int = 1
    step: int = 0

    @property
    def start(self) -> int:
        """First token from which the sequence is periodic up to growth."""
        return len(self.values) - self.period

    @property
    def rate(self) -> Fraction:
        """Growth per token in the long run."""
        return Fraction(self.step, self.period)

    @property
    def reachable(self) -> bool:
        """Whether any path arrives at all."""
        return self.values[-1] != NEVER

    def at(self, i: int) -> Value:
        """f(i); ``NEVER`` for a negative i, which lies before the row."""
        if i < 0:
            return NEVER
        if i < len(self.values):
            return self.values[i]
        periods, phase = divmod(i - self.start, self.period)
        return self.values[self.start + phase] + periods * self.step

    def plus(self, weight: int) -> Growth:
        """f(i) + weight."""
        return Growth(tuple(v + weight for v in self.values), self.period, self.step) if weight else self

    def delayed(self, tokens: int) -> Growth:
        """f(i - tokens): what a reader sees that looks so many tokens back."""
        return Growth((NEVER,) * tokens + self.values, self.period, self.step) if tokens else self

    def held(self, size: int) -> Growth:
        """f at the last token of the group of ``size`` tokens before i's own."""
        period = math.lcm(self.period, size)
        start = size * (self.start // size + 1)
        values = tuple(self.at(i // size * size - 1) for i in range(start + period))
        return Growth(values, period, self.step * period // self.period).normal()

    def advanced(self, tokens: int) -> Growth:
        """f(i + tokens)."""
        return self._from(lambda i: self.at(i + tokens), max(self.start - tokens, 0)) if tokens else self

    def absent_before(self, token: int) -> Growth:
        """The same sequence with no value at tokens before ``token``."""
        if all(v == NEVER for v in self.values[:token]) and token <= len(self.values):
            return self
        return self._from(lambda i: NEVER if i < token else self.at(i), max(self.start, token))

    def _from(self, value_at, start: int) -> Growth:
        return Growth(tuple(value_at(i) for i in range(start + self.period)), self.period, self.step)

    @cached_property
    def bounds(self) -> tuple[Fraction, Fraction]:
        """(low, high) with ``low <= f(i) - rate * i <= high`` for every i from ``start`` on."""
        gaps = [Fraction(self.values[i]) - self.rate * i for i in range(self.start, len(self.values))]
        return min(gaps), max(gaps)

    def normal(self) -> Growth:
        """The same sequence with the smallest period and the earliest start, so that equal sequences compare equal."""
        if not self.reachable:
            return UNREACHED
        values, period, step = list(self.values), self.period, self.step
        last = values[-period:] + [v + step for v in values[-period:]]
        for p in range(1, period):
            if period % p == 0 and step * p % period == 0 and all(
                last[i + p] - last[i] == step * p // period for i in range(period)
            ):
                period, step = p, step * p // period
                break
        while len(values) > period and values[-1] == values[-1 - period] + step:
            values.pop()
        return Growth(tuple(values), period, step)


UNREACHED = Growth((NEVER,))
ZERO = Growth((0,))


def dominates_from(upper: Growth, lower: Growth) -> int | None:
    """First token from which ``upper(i) >= lower(i)`` is certain for ever, or None when it never is."""
    if not lower.reachable:
        return 0
    if not upper.reachable or upper.rate < lower.rate:
        return None
    begin = max(upper.start, lower.start)
    if upper.rate == lower.rate:
        end = begin + math.lcm(upper.period, lower.period)
    else:
        # Past this token the two straight bounds have crossed.
        gap = lower.bounds[1] - upper.bounds[0]
        end = max(begin, math.ceil(gap / (upper.rate - lower.rate)) + 1)
    for i in range(end - 1, -1, -1):
        if upper.at(i) < lower.at(i):
            return None if upper.rate == lower.rate and i >= begin else i + 1
    return 0


def maximum(sequences: Iterable[Growth]) -> Growth:
    """The pointwise maximum."""
    distinct = list(dict.fromkeys(s for s in sequences if s.reachable))
    if len(distinct) < 2:
        return distinct[0] if distinct else UNREACHED
    fastest = max(s.rate for s in distinct)
    lead = [s for s in distinct if s.rate == fastest]
    period = math.lcm(*(s.period for s in lead))
    start = max(s.start for s in lead)
    low = max(s.bounds[0] for s in lead)
    for s in distinct:
        if s.rate < fastest:
            start = max(start, s.start, math.ceil((s.bounds[1] - low) / (fastest - s.rate)))
    values = tuple(max(s.at(i) for s in distinct) for i in range(start + period))
    return Growth(values, period, int(fastest * period)).normal()


def total(first: Growth, second: Growth) -> Growth:
    """The pointwise sum."""
    if not (first.reachable and second.reachable):
        return UNREACHED
    period = math.lcm(first.period, second.period)
    values = tuple(first.at(i) + second.at(i) for i in range(max(first.start, second.start) + period))
    return Growth(values, period, int((first.rate + second.rate) * period)).normal()
