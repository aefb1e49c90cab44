"""The depth table of the published systems: closed forms of programs written as text, and their brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import sympy

from depthpass.analysis.closed_form import n
from depthpass.analysis.depth import depth
from depthpass.ir import Program, plain
from tests.analysis.recorded import brute_depth
from tests.analysis.systems import (
    Text,
    bridged,
    encoder_decoder_feedback,
    jacobi,
    listed,
    looped,
    parallel_loops,
    recursions,
    thinking,
)


def floors(tokens: sympy.Expr, g: int) -> sympy.Expr:
    return sympy.floor(tokens / sympy.Integer(g))


SYSTEMS: dict[str, tuple[Callable[[], Program], sympy.Expr | int]] = {
    "stock": (lambda: plain("M", 6, 8), 6),
    "layer program": (lambda: listed(4, [0, 2, 1, 1, 3, 0]), 6),
    "intra-layer recurrence": (lambda: listed(4, [0, 0, 0, 0, 1, 1, 2, 3]), 8),
    "loops": (lambda: looped(1, 2, 1, 5), 1 + 5 * 2 + 1),
    "loops, first keys": (lambda: looped(1, 2, 1, 5, shared_keys=True), 1 + 5 * 2 + 1),
    "turboconn on input": (lambda: bridged(6, [(4, 1, 3)], on_input=True), 6 + 4 * floors(n - 1, 3)),
    "turboconn, 3 pads": (lambda: bridged(6, [(4, 1, 4)], pads=3), 6 + 3 * floors(n + 2, 4)),
    # 6 + 3*floor((n + 4 - 1)/4), which sympy does not recognise as the same.
    "turboconn, 4 pads": (lambda: bridged(6, [(4, 1, 4)], pads=4), 9 + 3 * floors(n - 1, 4)),
    "sparse control": (lambda: bridged(16, [(15, 0, 4)]), 16 + 15 * floors(n - 1, 4)),
    "all tokens recurrent": (lambda: bridged(6, [(4, 2, 1)], on_input=True), 6 + (n - 1) * 3),
    "encoder, recurrent decoder": (lambda: encoder_decoder_feedback(2, 3), 2 + 3 * n),
    "feedback to the embedding": (lambda: bridged(5, [(4, 0, 1)], on_input=True), 5 * n),
    "jacobi, 4 sweeps": (lambda: jacobi(6, 4, 4, 1, 2), 6 + 3 * sympy.Min(3, floors(n - 1, 2))),
    "parallel loops": (lambda: parallel_loops(4, 3), 4 * sympy.Min(3, n)),
    "parallel loops, own keys": (lambda: parallel_loops(4, 3, window=None), 4 * sympy.Min(3, n)),
    "loops with gated keys, no shift": (lambda: parallel_loops(4, 3, shift=False), 12),
    "mixture of recursions": (lambda: recursions(2, 3, "topk"), 2 + 2 * 3),
    "mixture of recursions, threshold": (lambda: recursions(2, 3, "threshold"), 2 + 2 * 3),
    "inner thinking": (lambda: thinking(6, (1, 3, 5), 3), 6 + 3 * 2),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_closed_form_of_system(name: str) -> None:
    build, expected = SYSTEMS[name]
    program = build()
    depths = depth(program)
    assert sympy.simplify(depths.formula - expected) == 0
    for tokens in (1, 2, 4, 7):
        assert brute_depth(program, tokens) == depths.at(tokens) == sympy.sympify(expected).subs(n, tokens)


@pytest.mark.parametrize("g", [1, 2, 3, 5])
def test_one_bridge(g: int) -> None:
    for blocks in range(2, 6):
        for s, d in itertools.combinations(range(blocks), 2):
            depths = depth(bridged(blocks, [(d, s, g)]))
            assert depths.formula == blocks + floors(n - 1, g) * (d - s)
            assert depths.rate == Fraction(d - s, g)
            assert depths.certificate.cycle_ratio == depths.rate


@pytest.mark.parametrize("g", [1, 4, 6, 16, 64])
@pytest.mark.parametrize(
    ("blocks", "sources", "destinations", "span", "count", "longest"),
    [(16, range(0, 16, 2), range(0, 16, 2), 5, 15, 14), (32, range(6, 31, 2), range(7, 26, 2), 6, 45, 23)],
)
def test_published_bands(
    blocks: int, sources: range, destinations: range, span: int, count: int, longest: int, g: int
) -> None:
    bridges = [(s, d, g) for s in sources for d in destinations if s - d > span]
    assert len(bridges) == count
    depths = depth(bridged(blocks, bridges))
    assert depths.formula == blocks + longest * floors(n - 1, g)
    assert depths.at(155) == blocks + longest * (154 // g)
    path = depths.critical_path(155)
    assert len(path) == depths.at(155)
    assert [step.token for step in path] == sorted(step.token for step in path)
    assert path[-1].block == blocks - 1 and path[-1].token == 154


def test_published_band_by_brute_force() -> None:
    bridges = [(s, d, 2) for s in range(0, 16, 2) for d in range(0, 16, 2) if s - d > 5]
    program = bridged(16, bridges)
    assert [brute_depth(program, k) for k in (1, 2, 3, 6)] == [16, 16, 30, 44]


@pytest.mark.parametrize("seed", range(40))
def test_mixed_delays_are_an_unbounded_knapsack(seed: int) -> None:
    """depth = L + max sum k_e (s_e - d_e) over multisets of bridges with sum k_e delay_e <= n - 1."""
    rng = random.Random(seed)
    blocks = rng.randint(3, 8)
    pairs = rng.sample(list(itertools.combinations(range(blocks), 2)), k=rng.randint(1, 3))
    bridges = [(s, d, rng.randint(1, 7)) for d, s in pairs]
    depths = depth(bridged(blocks, bridges))
    gain = [0]
    for budget in range(1, 90):
        gain.append(max([gain[-1], *(gain[budget - g] + s - d for s, d, g in bridges if g <= budget)]))
    assert [depths.at(k + 1) for k in range(90)] == [blocks + v for v in gain]
    assert [depths.formula.subs(n, k + 1) for k in range(30)] == [blocks + v for v in gain[:30]]
    assert depths.rate == max(Fraction(s - d, g) for s, d, g in bridges)


def test_near_ties_have_a_long_start_and_stay_exact() -> None:
    """Two bridges of nearly equal gain per token: the slower one fills remainders for hundreds of tokens."""
    depths = depth(bridged(32, [(31, 0, 64), (30, 1, 59)]))
    gain = [0]
    for budget in range(1, 3000):
        gain.append(max([gain[-1], *(gain[budget - g] + s for s, g in ((31, 64), (29, 59)) if g <= budget)]))
    assert depths.growth.start > 500
    assert all(depths.at(k + 1) == 32 + gain[k] for k in range(3000))


def test_cycles_of_different_rates_in_series() -> None:
    """The faster upper cycle wins in the long run, although its periods share no factor with the lower one's."""
    depths = depth(bridged(32, [(8, 0, 63), (18, 9, 64), (30, 19, 61)]))
    assert depths.formula == 32 + 11 * floors(n - 1, 61)
    assert {r.cycle_ratio for r in depths.certificate.recurrences} == {
        Fraction(8, 63), Fraction(9, 64), Fraction(11, 61)
    }


def test_a_top_k_route_between_two_cycles_adds_their_rates() -> None:
    t = Text(4)
    x = t.visit(0, t.emit(f"add (%1, {t.emit('delay 2 (%low)')})"))
    t.line(f"%low = linear a ({x}) out 8")
    route = t.emit(f"route topk ({t.emit('linear r (%low) out 1')}) capacity 0.5")
    sub = t.visit(1, t.emit(f"gather ({x}, {route})"))
    x = t.emit(f"scatter ({x}, {sub}, {route})")
    y = t.run([2, 3], t.emit(f"add ({x}, {t.emit('delay 3 (%high)')})"))
    t.line(f"%high = linear b ({y}) out 8")
    program = t.end(y)
    depths = depth(program)
    assert depths.rate == Fraction(1, 2) + Fraction(2, 3)
    assert depths.certificate.cycle_ratio == Fraction(2, 3)
    assert [depths.at(k) for k in range(1, 10)] == [brute_depth(program, k) for k in range(1, 10)]
    assert depths.notes
    assert [len(depths.critical_path(k)) for k in range(1, 10)] == [depths.at(k) for k in range(1, 10)]
