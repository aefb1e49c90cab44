"""The maximum cycle ratio of a graph: weight per token on its heaviest cycle, as an exact fraction."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Arc = tuple[object, object, int, int]
"""(from, to, weight, distance in tokens)."""


def max_cycle_ratio(arcs: Sequence[Arc]) -> tuple[Fraction, tuple[object, ...]]:
    """Largest ``sum(weight) / sum(distance)`` over the cycles, and the nodes of a cycle that attains it.

    Dinkelbach's iteration: raise the ratio to that of a cycle above it until there is none. It starts below every
    ratio, so the last cycle found attains the maximum; without a cycle the result is ``(0, ())``.

    Raises:
        ValueError: a cycle has no distance, so that it runs inside one token.
    """
    nodes = list(dict.fromkeys(v for a in arcs for v in a[:2]))
    index = {v: i for i, v in enumerate(nodes)}
    table = [(index[u], index[v], w, d) for u, v, w, d in arcs]
    ratio, best = Fraction(-1), ()
    while cycle := _cycle_above(len(nodes), table, ratio):
        weight, distance = (sum(table[e][k] for e in cycle) for k in (2, 3))
        if not distance:
            raise ValueError(f"cycle without a delay through {[nodes[table[e][0]] for e in cycle]}.")
        ratio, best = Fraction(weight, distance), tuple(nodes[table[e][0]] for e in cycle)
    return max(ratio, Fraction(0)), best


def _cycle_above(count: int, table: Sequence[tuple[int, int, int, int]], ratio: Fraction) -> list[int]:
    """Arcs of a cycle with ``weight - ratio * distance > 0``, in path order, or an empty list (Bellman-Ford).

    Lengths are scaled by the denominator, so that everything stays in integers. The arcs over which nodes were last
    improved form a cycle as soon as a heavier one is being followed; looking for it in every round ends early.
    """
    length = [0] * count
    via = [-1] * count
    scaled = [(u, v, w * ratio.denominator - ratio.numerator * d) for u, v, w, d in table]
    for _ in range(count + 1):
        improved = False
        for e, (u, v, gain) in enumerate(scaled):
            if length[u] + gain > length[v]:
                length[v], via[v], improved = length[u] + gain, e, True
        if not improved:
            return []
        if cycle := _loop(table, via):
            return cycle
    raise AssertionError("Bellman-Ford improved beyond its bound without leaving a cycle behind")


def _loop(table: Sequence[tuple[int, int, int, int]], via: Sequence[int]) -> list[int]:
    """A cycle in the graph of last improvements: every node has at most one arc into it."""
    colour = [0] * len(via)
    for root in range(len(via)):
        v, path = root, []
        while not colour[v] and via[v] >= 0:
            colour[v] = root + 1
            path.append(v)
            v = table[via[v]][0]
        if path and colour[v] == root + 1:
            cycle = [via[w] for w in path[path.index(v) :]]
            return cycle[::-1]
    return []
