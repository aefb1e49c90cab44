"""Repeats in a list of visited blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bracket:
    """Columns ``first .. last`` that are the same blocks ``times`` times in a row.

    Attributes:
        level: 0 for the innermost.
    """

    first: int
    last: int
    times: int
    level: int = 0


def brackets(blocks: Sequence[int], first: int = 0) -> tuple[Bracket, ...]:
    """The repeats in a list of visited blocks, the longest stretch first, and those inside one iteration.

    >>> [(b.first, b.last, b.times, b.level) for b in brackets([0, 1, 2, 1, 2, 3])]
    [(1, 4, 2, 0)]
    """
    best = (0, 0, 0, 0)
    for period in range(1, len(blocks) // 2 + 1):
        start = 0
        while start + 2 * period <= len(blocks):
            times = 1
            while blocks[start + times * period : start + (times + 1) * period] == blocks[start : start + period]:
                times += 1
            if times > 1:
                best = max(best, (times * period, -period, -start, times))
            start += max(1, (times - 1) * period)
    if not best[0]:
        return ()
    length, period, start, times = best[0], -best[1], -best[2], best[3]
    inside = brackets(blocks[start : start + period], first + start)
    level = max((b.level for b in inside), default=-1) + 1
    return (*brackets(blocks[:start], first), Bracket(first + start, first + start + length - 1, times, level), *inside,
            *brackets(blocks[start + length :], first + start + length))
