"""Visit stacking by dependence analysis: which visits may share a call in a small step, on programs alone."""

import networkx as nx
import pytest
from hypothesis import HealthCheck, given, settings

import depthpass as dp
from depthpass.ir.program import plain, writes_slot
from depthpass.ir.text import parse_program
from depthpass.passes.base import Context
from depthpass.passes.pipeline import apply_spec
from depthpass.schedule.regions import schedule
from depthpass.schedule.stacking import MAX_TOKENS, Stack, steps
from depthpass.testing import FEATURES, programs


def program(*passes, blocks=3):
    return apply_spec(plain("LlamaForCausalLM", blocks, 8), list(passes), Context("LlamaForCausalLM", "llama", blocks, 8))


def sets(step):
    return [[(o["index"], o["slot"]) for o in s.visits] for s in step.stacks]


def test_the_loops_of_a_token_are_one_diagonal():
    (step,) = steps(program(dp.ParallelLoop(loops=3)))
    assert step.tokens == 1
    assert sets(step) == [[(b, b), (b, b + 3), (b, b + 6)] for b in range(3)]
    assert step.calls == 3


@pytest.mark.parametrize("kv", ["gated", "first", "own"])
def test_a_longer_shift_allows_longer_steps(kv):
    s = schedule(program(dp.ParallelLoop(loops=2, shift=4, kv=kv)))
    assert [t.tokens for t in s.stacked] == [4]
    assert s.step(1) is s.step(4) is s.stacked[0]
    assert s.step(5) is None
    # The shift is longer than any step that is worth stacking.
    (capped,) = steps(program(dp.ParallelLoop(loops=2, shift=100, kv=kv)))
    assert capped.tokens == MAX_TOKENS


def test_nothing_to_stack():
    for spec in (dp.ParallelLoop(loops=1), dp.ParallelLoop.iquest(), dp.Loop(start=0, end=2, times=3),
                 dp.TurboConn(bridges=[(2, 0)], group=2), dp.MixtureOfRecursions(recursions=2, mode="threshold")):
        assert schedule(program(spec, blocks=4)).stacked == ()
    assert schedule(program(dp.ParallelLoop(loops=2)), stack=False).stacked == ()


def test_a_bridge_that_ends_where_it_starts_again_keeps_the_stack():
    # Loops and a feedback bridge: with both delays at least one token, a one-token step still is one diagonal.
    both = schedule(program(dp.ParallelLoop(loops=2), dp.TurboConn(bridges=[(2, 0)], group=2, rank=2), blocks=3))
    assert sets(both.step(1)) == [[(b, b), (b, b + 3)] for b in range(3)]


WRITTEN = """
program Toy blocks=3 width=8 visits=5 slots=5
  %0 = embed
  %1 = block 0 (%0) slot 0
  %2 = block 1 (%1) slot 1
  %3 = block 2 (%2) slot 2
  %4 = delay 2 (%2)
  %5 = add (%0, %4)
  %6 = block 1 (%5) slot 3
  %7 = block 2 (%6) slot 4
  %8 = add (%3, %7)
  output %8
"""


def test_a_written_program_waits_for_the_visit_that_joins_later():
    # Block 1 of the second chain is ready at once, but waits for block 1 of the first chain.
    short, long = steps(parse_program(WRITTEN))
    assert (short.tokens, sets(short), short.calls) == (2, [[(1, 1), (1, 3)], [(2, 2), (2, 4)]], 3)
    # In a longer step the delay is a path from the first block 1 to the second; the last blocks still meet.
    assert (long.tokens, sets(long), long.calls) == (MAX_TOKENS, [[(2, 2), (2, 4)]], 4)


def test_visits_with_parameters_of_their_own_stay_apart():
    own = WRITTEN.replace("%6 = block 1 (%5) slot 3", "%6 = block 1 (%5) slot 3 lora a lora_rank 2")
    assert sets(steps(parse_program(own))[0]) == [[(2, 2), (2, 4)]]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs(tuple(set(FEATURES) - {"topk"})))
def test_every_order_respects_every_dependence(program):
    plan = schedule(program)
    for step in plan.stacked:
        flat = [o for item in step.items for o in (item.visits if isinstance(item, Stack) else (item,))]
        assert sorted(map(id, flat)) == sorted(map(id, program.ops))
        done, slots = set(), set()
        for item in step.items:
            visits = item.visits if isinstance(item, Stack) else (item,)
            for o in visits:
                # Within a stack no member may read another's result.
                if o.kind != "delay" or o["tokens"] < step.tokens:
                    assert set(o.args) <= done
            for o in visits:
                if o.kind == "block":
                    assert o["keys"] is None or o["keys"] in slots
                    slots.add(writes_slot(o))
            done |= {o.name for o in visits}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs(("repeat", "delay", "bridge", "keys", "gate"), max_blocks=2))
def test_members_of_a_stack_have_no_path_between_them(program):
    for step in schedule(program).stacked:
        graph = nx.DiGraph()
        for o in program.ops:
            if o.name and (o.kind != "delay" or o["tokens"] < step.tokens):
                graph.add_edges_from((a, o.name) for a in o.args)
        for stack in step.stacks:
            names = [n for n in stack.names if n in graph]
            assert not any(nx.has_path(graph, a, b) for a in names for b in names if a != b)
