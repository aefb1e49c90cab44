"""Depth of random programs against brute force, the parts of the API, and bad input."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest

from depthpass.analysis.bruteforce import brute_depth, unrolled
from depthpass.analysis.closed_form import n
from depthpass.analysis.depth import Step, depth
from depthpass.errors import PassError, SpecError
from depthpass.ir import Program, parse_program, plain, verify
from tests.analysis.random_programs import random_program

BRIDGE = """
program M blocks=4 width=8
  %0 = embed
  %1 = block 0 (%0) slot 0
  %2 = block 1 (%1) slot 1
  %3 = delay 2 (%6)
  %4 = add (%2, %3)
  %5 = block 2 (%4) slot 2
  tap middle (%5)
  %6 = linear down (%5) out 8
  %7 = block 3 (%5) slot 3
  %8 = norm (%7)
  output %8
"""
WAITING = """
program M blocks=1 width=8
  %0 = embed
  %1 = delay 3 (%6)
  %2 = add (%0, %1)
  %3 = linear score (%2) out 1
  %4 = route topk (%3) capacity 0.5
  %5 = gather (%2, %4)
  %7 = block 0 (%5) slot 0
  %6 = scatter (%2, %7, %4)
  %8 = norm (%6)
  output %8
"""


@pytest.fixture
def bridge() -> Program:
    return verify(parse_program(BRIDGE))


@pytest.mark.parametrize("chunk", range(12))
def test_random_programs_equal_brute_force(chunk: int) -> None:
    """Closed form, value, critical path, rate and the cycle ratio of 25 random programs per case."""
    for seed in range(25 * chunk, 25 * chunk + 25):
        program = random_program(seed, routes=chunk % 3 != 0, pads=chunk % 3 != 1)
        try:
            found = depth(program)
        except PassError:
            # A top-k route on a delay cycle: brute force cannot order the unrolled graph either.
            with pytest.raises(SpecError, match="has a cycle"):
                brute_depth(program, 20)
            continue
        for tokens in (1, 3, 7):
            assert found.at(tokens) == brute_depth(program, tokens), (seed, tokens)
            assert found.formula.subs(n, tokens) == found.at(tokens), (seed, tokens)
            assert len(found.critical_path(tokens)) == found.at(tokens), (seed, tokens)
        check_path(program, found.critical_path(3), 3)
        assert depth(program, "inner").at(4) == brute_depth(program, 4, "inner"), seed
        if not any(o.kind == "route" for o in program):
            assert found.rate <= found.certificate.cycle_ratio or not found.certificate.recurrences, seed


def check_path(program: Program, path: list[Step], tokens: int) -> None:
    """Each visit of a critical path can be reached from the one before in the unrolled graph."""
    graph = unrolled(program, tokens)
    for a, b in pairwise(path):
        assert nx.has_path(graph, ("value", a.visit, a.token), ("value", b.visit, b.token))


def test_long_rows_of_random_programs_keep_to_the_closed_form() -> None:
    grown = 0
    for seed in range(400, 430):
        program = random_program(seed, routes=False, pads=False, max_delay=4)
        found = depth(program)
        grown += found.rate > 0
        assert found.at(25) == brute_depth(program, 25), seed
    assert grown >= 5


def test_parts_of_a_depth(bridge: Program) -> None:
    found = depth(bridge)
    assert str(found) == "4 + floor((n - 1)/2)"
    assert [found.at(k) for k in range(1, 7)] == [4, 4, 5, 5, 6, 6]
    assert found.at(10**9 + 1) == 4 + 5 * 10**8
    (recurrence,) = found.certificate.recurrences
    assert (recurrence.period, recurrence.step, recurrence.driven) == (2, 1, False)
    assert set(recurrence.nodes) == {"3", "4", "5", "6"}
    assert set(found.certificate.cycle) <= {"3", "4", "5", "6"}
    assert found.critical_path(4) == [
        Step("1", 0, 1), Step("2", 1, 1), Step("5", 2, 1), Step("5", 2, 3), Step("7", 3, 3)
    ]


def test_depth_of_a_tap(bridge: Program) -> None:
    assert str(depth(bridge, "middle")) == "3 + floor((n - 1)/2)"
    assert depth(bridge, "middle").critical_path(1)[-1] == Step("5", 2, 0)


def test_weights(bridge: Program) -> None:
    assert str(depth(bridge, weight="sublayers")) == "8 + 2*floor((n - 1)/2)"
    assert depth(bridge, weight="attention").growth == depth(bridge, weight="mlp").growth == depth(bridge).growth
    uneven = {0: 1, 1: 0, 2: 5, 3: 2}
    assert [depth(bridge, weight=uneven).at(k) for k in (1, 3, 5)] == [8, 13, 18]
    assert brute_depth(bridge, 5, weights=uneven) == 18


def test_top_k_on_a_cycle_is_refused() -> None:
    program = verify(parse_program(WAITING))
    with pytest.raises(PassError, match=r"route %4 lies on a delay cycle"):
        depth(program)


@pytest.mark.parametrize("tokens", [0, -3, 1.5, True, "4"])
def test_bad_lengths(bridge: Program, tokens: object) -> None:
    with pytest.raises(SpecError, match="n: expected a number of tokens of at least 1"):
        depth(bridge).at(tokens)  # type: ignore[arg-type]


def test_bad_outputs_and_weights(bridge: Program) -> None:
    with pytest.raises(SpecError, match="Did you mean 'middle'"):
        depth(bridge, "midle")
    with pytest.raises(SpecError, match="has no taps"):
        depth(plain("M", 2, 8), "middle")
    with pytest.raises(SpecError, match="Did you mean 'visits'"):
        depth(bridge, weight="visit")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"weight\[3\]"):
        depth(bridge, weight={0: 1, 1: 1, 2: 1})
    with pytest.raises(SpecError, match=r"weight\[2\]"):
        depth(bridge, weight={0: 1, 1: 1, 2: -1, 3: 1})
