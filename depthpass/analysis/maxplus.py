"""Longest paths over all tokens of a periodic dependence graph, exactly, with a proof by induction.

Node v at token i obeys ``x_v(i) = weight_v + max(0 if v is a source, max over arcs x_u(i - distance))``. Nodes off
every cycle are solved in closed form by :mod:`depthpass.analysis.growth`. A cycle is simulated for some tokens; a
pattern seen in the numbers is accepted only with the certificate of :func:`_certified`, which makes it true for all
later tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import networkx as nx
import numpy as np

from depthpass.analysis.cycle_ratio import max_cycle_ratio
from depthpass.analysis.growth import NEVER, UNREACHED, ZERO, Growth, Value, dominates_from, maximum
from depthpass.errors import PassError


@dataclass(frozen=True)
class Held:
    """Distance of what a group of ``size`` tokens reads: the last token of the group before."""

    size: int


Distance = int | Held


def read_at(i: int, distance: Distance) -> int:
    """The token that token i reads; negative = before the row."""
    return i - distance if isinstance(distance, int) else i // distance.size * distance.size - 1


def _most(distance: Distance) -> int:
    return distance if isinstance(distance, int) else distance.size


TOKEN_LIMIT = 1 << 16
"""Tokens simulated at most before giving up on a closed form."""


@dataclass(frozen=True)
class Node:
    """One node of a system.

    Attributes:
        name: any hashable key.
        arcs: (name of the node read, distance in tokens or :class:`Held`).
        weight: what passing the node adds to a path, at least 0.
        absent: the node has no value at tokens before this one, whatever its arcs say.
    """

    name: Any
    arcs: tuple[tuple[Any, Distance], ...]
    weight: int = 0
    absent: int = 0


@dataclass(frozen=True)
class Recurrence:
    """Certificate of one strongly connected component.

    Attributes:
        nodes: names of its nodes.
        start: token from which every node repeats.
        period: in tokens.
        step: growth of every node per period, in units of the weights.
        cycle_ratio: largest weight per token over its cycles, found without simulation.
        cycle: nodes of a cycle of that ratio.
        driven: whether inputs from outside grow faster than its own cycles.
        simulated: tokens simulated to find the pattern.
    """

    nodes: tuple[object, ...]
    start: int
    period: int
    step: int
    cycle_ratio: Fraction
    cycle: tuple[object, ...]
    driven: bool
    simulated: int


def solve(nodes: Sequence[Node], sources: frozenset[object]) -> tuple[dict[object, Growth], tuple[Recurrence, ...]]:
    """Longest path from any source to every node, for every token.

    Args:
        nodes: in an order in which arcs of distance 0 point from earlier to later nodes.
        sources: nodes at which a path may start, at any token.

    Raises:
        PassError: no pattern was certified within ``TOKEN_LIMIT`` tokens.
    """
    by_name = {n.name: n for n in nodes}
    graph = nx.DiGraph()
    graph.add_nodes_from(by_name)
    graph.add_edges_from((u, n.name) for n in nodes for u, _ in n.arcs)
    reached = set(sources).union(*(nx.descendants(graph, s) for s in sources))
    position = {n.name: i for i, n in enumerate(nodes)}
    solved = dict.fromkeys(by_name, UNREACHED)
    recurrences = []
    condensed = nx.condensation(graph.subgraph(reached))
    for component in nx.topological_sort(condensed):
        members = sorted(condensed.nodes[component]["members"], key=position.__getitem__)
        block = [by_name[m] for m in members]
        inside = set(members)
        inputs = {n.name: _inputs(n, inside, sources, solved) for n in block}
        if len(block) == 1 and not graph.has_edge(members[0], members[0]):
            solved[members[0]] = inputs[members[0]].plus(block[0].weight).absent_before(block[0].absent)
            continue
        recurrence, growths = _solve_cycle(block, inputs)
        recurrences.append(recurrence)
        solved.update(growths)
    return solved, tuple(recurrences)


def _inputs(n: Node, inside: set[object], sources: frozenset[object], solved: Mapping[object, Growth]) -> Growth:
    """What a node gets from outside its component, before its own weight."""
    growths = [ZERO] if n.name in sources else []
    growths += [solved[u].delayed(d) if isinstance(d, int) else solved[u].held(d.size) for u, d in n.arcs if u not in inside]
    return maximum(growths)


def _solve_cycle(block: Sequence[Node], inputs: Mapping[object, Growth]) -> tuple[Recurrence, dict[object, Growth]]:
    inner = {n.name: tuple((u, d) for u, d in n.arcs if u in inputs) for n in block}
    ratio, cycle = max_cycle_ratio([(u, n.name, n.weight, _most(d)) for n in block for u, d in inner[n.name]])
    fastest = max([ratio, *(g.rate for g in inputs.values() if g.reachable)])
    reach = max(_most(d) for arcs in inner.values() for _, d in arcs)
    groups = {d.size for arcs in inner.values() for _, d in arcs if isinstance(d, Held)}
    # Where a group begins an arc jumps: only whole groups repeat, and their rate is that of no cycle of the graph.
    unit = math.lcm(*groups) if groups else fastest.denominator
    values: dict[object, list[Value]] = {n.name: [] for n in block}
    tokens = 4 * reach + 4 * unit + max(g.start for g in inputs.values()) + max(n.absent for n in block)
    while tokens <= TOKEN_LIMIT:
        _simulate(block, inner, inputs, values, tokens)
        table = np.array([values[n.name] for n in block]).T
        for period in range(unit, (tokens - reach) // 3 + 1, unit):
            start = tokens - 2 * period - reach
            step = int(table[-1][0] - table[-1 - period][0] if groups else fastest * period)
            if _repeats(table, period, step, start) and _certified(block, inner, inputs, values, start, period, step):
                growths = {v: Growth(tuple(x[: start + period]), period, step).normal() for v, x in values.items()}
                start = max(g.start for g in growths.values())
                names = tuple(n.name for n in block)
                if groups:
                    ratio = fastest = Fraction(step, period)
                return Recurrence(names, start, period, step, ratio, cycle, fastest > ratio, tokens), growths
        tokens *= 2
    raise PassError(
        f"depth: no closed form found within {TOKEN_LIMIT} tokens for the cycle through "
        f"{', '.join('%' + str(n.name) for n in block[:4])}, ...: its delays and spans are too close to a tie. "
        "Use equal delays, or fewer different ones."
    )


def _simulate(block: Sequence[Node], inner: Mapping, inputs: Mapping, values: dict, tokens: int) -> None:
    """Extend the values of every node up to ``tokens`` tokens, exactly, in place."""
    begin = len(values[block[0].name])
    rows = [
        (values[n.name], [(values[u], d) for u, d in inner[n.name]],
         inputs[n.name] if inputs[n.name].reachable else None, n.weight, n.absent)
        for n in block
    ]
    for i in range(begin, tokens):
        for own, arcs, outside, weight, absent in rows:
            best = NEVER if outside is None else outside.at(i)
            for source, d in arcs:
                if (j := i - d if isinstance(d, int) else read_at(i, d)) >= 0 and source[j] > best:
                    best = source[j]
            own.append(best + weight if i >= absent else NEVER)


def _repeats(table: np.ndarray, period: int, step: int, start: int) -> bool:
    """Whether all values from ``start`` on are those one period earlier plus ``step``; cheap rows first."""
    later, earlier = table[start + period :], table[start:-period]
    return (
        bool(np.all(later[-1] - earlier[-1] == step))
        and bool(np.all(np.isfinite(earlier)))
        and bool(np.all(later - earlier == step))
    )


def _certified(
    block: Sequence[Node], inner: Mapping, inputs: Mapping[object, Growth], values: Mapping[object, list[Value]],
    start: int, period: int, step: int,
) -> bool:
    """Whether continuing the pattern for ever satisfies the recursion for ever.

    Claim: ``f_v(i + period) = f_v(i) + step`` from ``start`` on. Let ``i >= start + reach``. Every arc inside the
    component then repeats with the pattern, and so does an input of the same rate once its own period divides ours. So
    if the recursion restricted to those holds over one period (checked by number), it holds for all later tokens. A
    slower input is left out of that check and must stay at or below the pattern for ever (checked exactly).
    """
    rate = Fraction(step, period)
    reach = max(_most(d) for arcs in inner.values() for _, d in arcs)
    begin = start + reach
    for n in block:
        outside = inputs[n.name]
        own = values[n.name]
        pattern = Growth(tuple(own[: start + period]), period, step)
        equal = outside.reachable and outside.rate == rate
        if n.absent > start or (equal and (period % outside.period or outside.start > begin)):
            return False
        if not equal:
            from_token = dominates_from(pattern, outside.plus(n.weight))
            if from_token is None or from_token > begin:
                return False
        for i in range(begin, begin + period):
            best = max((values[u][read_at(i, d)] for u, d in inner[n.name]), default=NEVER)
            if equal:
                best = max(best, outside.at(i))
            if best + n.weight != own[i]:
                return False
    return True
