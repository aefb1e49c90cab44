"""Growth sequences, cycle ratios and closed forms, each against a direct computation."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import networkx as nx
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from depthpass.analysis.closed_form import closed_form, format_formula, n
from depthpass.analysis.cycle_ratio import max_cycle_ratio
from depthpass.analysis.growth import NEVER, UNREACHED, Growth, dominates_from, maximum, total
from depthpass.analysis.maxplus import Node, solve

HORIZON = 120


@st.composite
def growths(draw: st.DrawFn) -> Growth:
    """A nondecreasing sequence, absent for some tokens, with a random periodic tail."""
    absent, prefix, period = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 6))
    rises = draw(st.lists(st.integers(0, 3), min_size=prefix + period, max_size=prefix + period))
    values = list(itertools.accumulate(rises, initial=draw(st.integers(0, 9))))[: prefix + period]
    step = values[-1] - values[prefix] + draw(st.integers(0, 4))
    return Growth((NEVER,) * absent + tuple(values), period, step)


def head(f: Growth) -> list[float]:
    return [f.at(i) for i in range(HORIZON)]


@given(st.lists(growths(), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_maximum_is_pointwise(sequences: list[Growth]) -> None:
    assert head(maximum(sequences)) == [max(s.at(i) for s in sequences) for i in range(HORIZON)]


@given(growths(), growths(), st.integers(0, 7), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_sum_delay_advance_and_absence_are_pointwise(f: Growth, g: Growth, k: int, w: int) -> None:
    assert head(total(f, g)) == [f.at(i) + g.at(i) for i in range(HORIZON)]
    assert head(f.delayed(k)) == [f.at(i - k) for i in range(HORIZON)]
    assert head(f.advanced(k)) == [f.at(i + k) for i in range(HORIZON)]
    assert head(f.absent_before(k).plus(w)) == [NEVER if i < k else f.at(i) + w for i in range(HORIZON)]
    assert head(f.normal()) == head(f)


@given(growths())
@settings(max_examples=100, deadline=None)
def test_normal_form_is_unique(f: Growth) -> None:
    stretched = Growth(tuple(f.at(i) for i in range(f.start + 2 + 3 * f.period)), 3 * f.period, 3 * f.step)
    assert stretched.normal() == f.normal()


@given(growths(), growths())
@settings(max_examples=150, deadline=None)
def test_domination_holds_from_the_token_it_names(upper: Growth, lower: Growth) -> None:
    begin = dominates_from(upper, lower)
    far = range(2 * HORIZON)
    if begin is None:
        assert any(upper.at(i) < lower.at(i) for i in far if i >= HORIZON) or upper.rate < lower.rate
    else:
        assert all(upper.at(i) >= lower.at(i) for i in far if i >= begin)
        assert begin == 0 or upper.at(begin - 1) < lower.at(begin - 1)


@given(growths().filter(lambda f: f.at(0) != NEVER))
@settings(max_examples=120, deadline=None)
def test_closed_form_is_exact(f: Growth) -> None:
    formula = closed_form(f)
    assert [formula.subs(n, i + 1) for i in range(40)] == [f.at(i) for i in range(40)]


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        (Growth((16,)), "16"),
        (Growth((16,) * 4, 4, 14), "16 + 14*floor((n - 1)/4)"),
        (Growth((5,), 1, 3), "3*n + 2"),
        (Growth((16, 16, 16, 30), 4, 14), "16 + 14*floor(n/4)"),
        (Growth((8, 16, 24)), "8*min(3, n)"),
        (Growth((5, 5, 8, 8, 11)), "5 + 3*min(2, floor((n - 1)/2))"),
        (Growth((5, 5, 7, 10), 3, 8),
         "{5 if n <= 1; 2 + 2*floor(n/3) + 3*floor((n - 1)/3) + 3*floor((n + 1)/3) otherwise}"),
        (Growth((4, 9)), "{4 if n <= 1; 9 otherwise}"),
    ],
)
def test_text_of_closed_forms(growth: Growth, text: str) -> None:
    assert format_formula(closed_form(growth)) == text


def test_many_jumps_become_a_table_by_remainder() -> None:
    growth = Growth((1, 2, 3, 4, 5, 7, 7), 7, 8)
    formula = closed_form(growth)
    assert formula.has(sympy.Mod)
    assert [formula.subs(n, i + 1) for i in range(30)] == [growth.at(i) for i in range(30)]


@pytest.mark.parametrize("seed", range(60))
def test_cycle_ratio_equals_the_best_simple_cycle(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 6)
    arcs = [
        (rng.randrange(count), rng.randrange(count), rng.randint(0, 4), rng.randint(1, 5))
        for _ in range(rng.randint(1, 10))
    ]
    graph = nx.MultiDiGraph()
    graph.add_weighted_edges_from((u, v, i) for i, (u, v, _, _) in enumerate(arcs))
    best = Fraction(0)
    for cycle in nx.simple_cycles(nx.DiGraph(graph)):
        pairs = list(zip(cycle, cycle[1:] + cycle[:1]))
        choices = itertools.product(*([e["weight"] for e in graph[u][v].values()] for u, v in pairs))
        for chosen in choices:
            best = max(best, Fraction(sum(arcs[i][2] for i in chosen), sum(arcs[i][3] for i in chosen)))
    ratio, cycle = max_cycle_ratio(arcs)
    assert ratio == best
    if cycle:
        assert all(nx.DiGraph(graph).has_edge(u, v) for u, v in zip(cycle, cycle[1:] + cycle[:1]))


def test_a_cycle_without_delay_is_refused() -> None:
    with pytest.raises(ValueError, match="without a delay"):
        max_cycle_ratio([(0, 1, 1, 0), (1, 0, 1, 0)])


@pytest.mark.parametrize("seed", range(40))
def test_solved_systems_equal_long_simulations(seed: int) -> None:
    """Growth of random periodic graphs, several interleaved cycles, against 400 tokens of the plain recursion."""
    rng = random.Random(seed)
    count = rng.randint(2, 8)
    nodes = []
    for v in range(count):
        arcs = {(rng.randrange(v), 0) for _ in range(2) if v} | {(rng.randrange(count), rng.randint(1, 9))}
        nodes.append(Node(v, tuple(arcs) if v else (), rng.randint(0, 3)))
    nodes[0] = Node(0, ((count - 1, rng.randint(1, 4)),) if rng.random() < 0.5 else (), 1)
    actual, recurrences = solve(nodes, frozenset([0]))
    x: dict[object, list[float]] = {v.name: [] for v in nodes}
    for i in range(400):
        for v in nodes:
            best = 0 if v.name == 0 else NEVER
            for u, d in v.arcs:
                best = max(best, x[u][i - d] if i >= d else NEVER)
            x[v.name].append(best + v.weight)
    for v in nodes:
        assert [actual[v.name].at(i) for i in range(400)] == x[v.name]
    for r in recurrences:
        assert r.driven or Fraction(r.step, r.period) == r.cycle_ratio


def test_nodes_that_no_path_reaches_are_said_so() -> None:
    actual, recurrences = solve([Node("a", ()), Node("b", (("b", 1),), 1)], frozenset(["a"]))
    assert actual["b"] == UNREACHED and not recurrences


@pytest.mark.parametrize("height", [40, 50])
def test_an_input_that_jumps_after_the_first_pattern_is_not_missed(height: int) -> None:
    """b grows by 1 per token; at token 10 its input jumps above it, though it is no faster in the long run."""
    nodes = [
        Node("s", ()),
        Node("a", (("s", 0), ("a", 50)), height),
        Node("j", (("s", 0), ("a", 10))),
        Node("b", (("j", 0), ("b", 1)), 1),
    ]
    actual, recurrences = solve(nodes, frozenset(["s"]))
    expected, last = [], 0
    for i in range(400):
        jump = height * (1 + (i - 10) // 50) if i >= 10 else 0
        last = max(jump, last) + 1
        expected.append(last)
    assert [actual["b"].at(i) for i in range(400)] == expected
    assert {r.nodes: r.cycle_ratio for r in recurrences} == {("a",): Fraction(height, 50), ("b",): Fraction(1)}


def test_cycles_driven_from_outside_are_marked() -> None:
    nodes = [Node("s", ()), Node("a", (("s", 0), ("a", 1)), 3), Node("b", (("a", 0), ("b", 2)), 1)]
    actual, recurrences = solve(nodes, frozenset(["s"]))
    assert [r.driven for r in recurrences] == [False, True]
    assert actual["b"].rate == 3
