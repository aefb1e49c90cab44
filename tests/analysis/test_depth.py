"""Depth of random programs against brute force, the parts of the API, and bad input."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings

from depthpass.analysis.closed_form import n
from depthpass.analysis.depth import PathVisit, depth
from depthpass.errors import PassError, SpecError
from depthpass.ir import Program, parse_program, plain, verify
from depthpass.testing import programs
from tests.analysis.random_programs import random_program
from tests.analysis.recorded import brute_depth, unrolled

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
    """Closed form, value, critical path, rate and the cycle ratio of 30 random programs per case."""
    for seed in range(30 * chunk, 30 * chunk + 30):
        program = random_program(seed, routes=chunk % 3 != 0, pads=chunk % 3 != 1)
        try:
            depths = depth(program)
        except PassError:
            # A top-k route on a delay cycle: brute force cannot order the unrolled graph either.
            with pytest.raises(SpecError, match="has a cycle"):
                brute_depth(program, 20)
            continue
        for tokens in (1, 3, 10):
            assert depths.at(tokens) == brute_depth(program, tokens), (seed, tokens)
            assert depths.formula.subs(n, tokens) == depths.at(tokens), (seed, tokens)
            assert len(depths.critical_path(tokens)) == depths.at(tokens), (seed, tokens)
        check_path(program, depths.critical_path(3), 3)
        assert depth(program, "inner").at(4) == brute_depth(program, 4, "inner"), seed
        if not any(o.kind == "route" for o in program):
            assert depths.rate <= depths.certificate.cycle_ratio, seed


@given(programs())
@settings(max_examples=60)
def test_programs_of_the_shared_strategy_equal_brute_force(program: Program) -> None:
    try:
        depths = depth(program)
    except PassError:
        with pytest.raises(SpecError, match="has a cycle"):
            brute_depth(program, 20)
        return
    assert [depths.at(k) for k in (1, 2, 6)] == [brute_depth(program, k) for k in (1, 2, 6)]
    for tap in program.taps:
        assert depth(program, tap["name"]).at(5) == brute_depth(program, 5, tap["name"])


def check_path(program: Program, path: list[PathVisit], tokens: int) -> None:
    """Each visit of a critical path can be reached from the one before in the unrolled graph."""
    graph = unrolled(program, tokens)
    for a, b in pairwise(path):
        assert nx.has_path(graph, (a.visit, a.token), (b.visit, b.token))


def test_long_rows_of_random_programs_keep_to_the_closed_form() -> None:
    grown = 0
    for seed in range(1000, 1040):
        program = random_program(seed, routes=False, pads=False, max_delay=4)
        depths = depth(program)
        grown += depths.rate > 0
        assert depths.at(25) == brute_depth(program, 25), seed
    assert grown >= 10


def test_parts_of_a_depth(bridge: Program) -> None:
    depths = depth(bridge)
    assert str(depths) == "4 + floor((n - 1)/2)"
    assert [depths.at(k) for k in range(1, 7)] == [4, 4, 5, 5, 6, 6]
    assert depths.at(10**9 + 1) == 4 + 5 * 10**8
    (recurrence,) = depths.certificate.recurrences
    assert (recurrence.period, recurrence.step, recurrence.driven) == (2, 1, False)
    assert set(recurrence.nodes) == {"3", "4", "5", "6"}
    assert set(depths.certificate.cycle) <= {"3", "4", "5", "6"}
    assert depths.critical_path(4) == [
        PathVisit("1", 0, 1), PathVisit("2", 1, 1), PathVisit("5", 2, 1), PathVisit("5", 2, 3), PathVisit("7", 3, 3)
    ]


def test_depth_of_a_tap(bridge: Program) -> None:
    assert str(depth(bridge, "middle")) == "3 + floor((n - 1)/2)"
    assert depth(bridge, "middle").critical_path(1)[-1] == PathVisit("5", 2, 0)


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


def same_as_brute_force(text: str, lengths: range) -> list[int]:
    program = verify(parse_program(text))
    actual = [depth(program).at(k) for k in lengths]
    assert actual == [brute_depth(program, k) for k in lengths]
    return actual


def test_a_value_is_absent_until_all_its_arguments_are_there() -> None:
    """The linear map of a shallow delayed stream and a deep one adds nothing at the first four tokens."""
    assert same_as_brute_force("""
        program M blocks=3 width=8
          %0 = embed
          %1 = block 0 (%0) slot 0
          %2 = block 1 (%1) slot 1
          %3 = block 2 (%2) slot 2
          %4 = delay 4 (%0)
          %5 = linear both (%4, %3) out 8
          %6 = add (%0, %5)
          %7 = norm (%6)
          output %7
        """, range(1, 7)) == [0, 0, 0, 0, 3, 3]


def test_pads_do_not_lengthen_what_was_computed_before_them() -> None:
    """The recurrence runs over real tokens only; a visit on pads reads keys that end with the last real token."""
    recurrence = """
        program M blocks=2 width=8
          %0 = embed
          %1 = delay 1 (%3)
          %2 = add (%0, %1)
          %3 = block 0 (%2) slot 0
        """
    assert same_as_brute_force(f"""{recurrence}
          %4 = pad 3 (%3)
          %5 = block 1 (%4) slot 1
          output %5
        """, range(1, 6)) == [2, 3, 4, 5, 6]
    assert same_as_brute_force(f"""{recurrence}
          %4 = pad 3 (%0)
          %5 = block 0 (%4) slot 1 keys 0
          output %5
        """, range(1, 6)) == [1, 2, 3, 4, 5]


def test_windows_count_where_pads_are_shallower_than_real_tokens() -> None:
    """What is computed at the deep token 0 is absent; the pads that have it look back one token or at all of them."""
    text = """
        program M blocks=2 width=8
          %0 = embed
          %1 = block 1 (%0) slot 0
          %2 = block 1 (%1) slot 1
          %3 = pad 5 (%2)
          %4 = pad 5 (%0)
          %5 = block 0 (%4) slot 2
          %6 = block 0 (%3) slot 3 keys 2 gate g window {window}
          %7 = delay 4 (%4)
          %8 = linear both (%6, %7) out 8
          %9 = add (%4, %8)
          output %9
        """
    assert same_as_brute_force(text.format(window=1), range(1, 8)) == [1, 1, 1, 1, 3, 3, 3]
    assert same_as_brute_force(text.format(window=9), range(1, 8)) == [3, 3, 3, 3, 3, 3, 3]
