"""Lowered programs: golden texts of every system, round trip, and every rule broken once."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthpass.errors import ParseError, PassError, SpecError, VerifyError
from depthpass.ir import Op, Program, parse_program, plain
from depthpass.lowered import CALLS, lower, parse_lowered, verify_lowered
from depthpass.passes import Context, apply_spec
from depthpass.passes.turboconn import TurboConn
from depthpass.schedule import schedule
from depthpass.testing import programs

GOLDEN = Path(__file__).parents[1] / "golden"
SYSTEMS = {f.stem: f for folder in ("programs", "turboconn") for f in sorted((GOLDEN / folder).glob("*.txt"))}


def lowered(program: Program, call: str, level: str = "auto"):
    plan = schedule(program)
    return lower(plan, call, level, step=plan.step(1) if call == "token" else None)


@pytest.mark.parametrize("system", SYSTEMS)
def test_golden(system: str, golden) -> None:
    program = parse_program(SYSTEMS[system].read_text())
    texts = [str(lowered(program, call)) for call in ("train", "token")]
    golden("\n\n".join(texts))
    for text in texts:
        assert str(parse_lowered(text)) == text


def run(o: Op) -> Op:
    """An op without what only says how its parameters begin; a visit without keys of its own has no slot either."""
    if o.kind != "block":
        return o
    own = o["keys"] is None or o["gate"] is not None
    return o.with_attrs(gate_init=None, lora_rank=None, untied=None, slot=o["slot"] if own else o["keys"])


@settings(max_examples=40)
@given(programs(), st.sampled_from(sorted(CALLS)), st.sampled_from(["auto", "eager", "inductor"]))
def test_random_programs_lower_and_read_back(program: Program, call: str, level: str) -> None:
    try:
        actual = lowered(program, call, level)
    except PassError:  # a top-k route on a delay cycle
        return
    assert parse_lowered(str(actual)) == actual
    assert sorted(str(run(o)) for region in actual for o in region.program_ops) == sorted(str(run(o)) for o in program.ops)
    served = {v["slot"] for v in program.visits if v["keys"] is None or v["gate"] is not None}
    assert {o.writes for region in actual for o in region.ops if o.writes is not None} == served


BRIDGE = """lowered M call=train level=auto blocks=2 width=8
region 0 parallel level eager
  %0 = embed
  out %0
region 1 chunks of 2 level scheduled
  in %0
  %1 = delay 2 (%4)  line %1
  %2 = add (%0, %1)
  %3:k = keys 0 (%2)  writes slot 0
  %3:a = attend 0 (%2)  reads slot 0
  %3 = finish 0 (%2, %3:a)
  %4:k = keys 1 (%3)  writes slot 1
  %4:a = attend 1 (%3)  reads slot 1
  %4 = finish 1 (%3, %4:a)
  line %1 (%4) tokens 2
  out %4
  last %0
region 2 parallel level eager
  in %4
  %5 = norm (%4)
  output %5
  last %4"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("chunks of 2", "chunks of 3", "a future read"),
        ("chunks of 2 level", "parallel level", "a future read"),
        ("reads slot 1", "reads slot 7", "expected keys into the last slot that it attends to"),
        ("writes slot 1", "writes slot 0", "expected keys into the last slot that it attends to"),
        ("  %4:k = keys 1 (%3)  writes slot 1\n  %4:a = attend 1 (%3)  reads slot 1",
         "  %4:k = keys 1 (%3)  writes slot 0\n  %4:a = attend 1 (%3)  reads slot 0", "slot 0 is written twice"),
        ("  %4:k = keys 1 (%3)  writes slot 1\n  %4:a = attend 1 (%3)  reads slot 1",
         "  %4:a = attend 1 (%3)  reads slot 0", "reads slot 0, which holds keys of another block"),
        ("  %4:k = keys 1 (%3)  writes slot 1\n", "", "reads slot 1 before it is written"),
        ("keys 1 (%3)", "keys 1 (%5)", "reads %5 before it is there"),
        ("  %3 = finish 0 (%2, %3:a)\n  %4:k = keys 1 (%3)  writes slot 1\n",
         "  %4:k = keys 1 (%2)  writes slot 1\n  %3 = finish 0 (%2, %3:a)\n", "expected keys, attend and finish next"),
        ("finish 1 (%3, %4:a)", "finish 1 (%2, %4:a)", "expected finish of %3 and %4:a"),
        ("finish 1 (%3", "finish 0 (%3", "expected parts of one block"),
        ("attend 1 (%3)  reads slot 1", "attend 1 (%3)  reads slot 0, slot 1", "expected 1 slots to attend to, got 2"),
        ("%2 = add", "%0 = add", "%0 is defined twice"),
        ("  out %4", "  out %5", "hands out %5, which it does not have"),
        ("  in %4", "  in %3", "reads %3 before an earlier region hands it out"),
        ("  out %4\n  last %0", "  out %4\n  last %0, %4", "reads %4 before an earlier region hands it out"),
        ("  last %4", "  last %0", "lets go of %0, which it does not hold"),
        ("  line %1 (%4) tokens 2\n", "", "reads line %1, which the region does not keep so"),
        ("  output %5\n", "", "exactly one output"),
        ("%2 = add (%0, %1)", "%2 = norm (%0)", "op norm in a hand-scheduled chunk"),
    ],
)
def test_every_rule_is_checked_from_the_text(old: str, new: str, message: str) -> None:
    assert verify_lowered(parse_lowered(BRIDGE)) and BRIDGE.count(old) == 1
    broken = parse_lowered(BRIDGE.replace(old, new))
    with pytest.raises(VerifyError, match=message) as error:
        verify_lowered(broken)
    assert error.value.__notes__[0] == str(broken)


def test_what_is_no_text_is_named_with_its_line() -> None:
    for broken, message in ((BRIDGE[8:], "first line"), (BRIDGE.replace("attend 0", "attendd 0"), "line 10"),
                            (BRIDGE.replace("reads slot 0", "reads slot x"), "accesses such as")):
        with pytest.raises(ParseError, match=message):
            parse_lowered(broken)
    with pytest.raises(SpecError, match=r"call: expected one of train.*Did you mean 'train'"):
        lower(schedule(plain("M", 2, 8)), "trian")


def test_levels_follow_the_call_and_what_was_asked_for() -> None:
    stock = plain("M", 4, 16)
    program = apply_spec(stock, TurboConn(bridges=[(2, 1)], group=2), Context.of(stock))

    def level(call, asked):
        return next((r.level, r.reason) for r in lowered(program, call, asked) if r.serial)

    assert level("train", "auto") == ("scheduled", None) and level("score", "cudagraph") == ("cudagraph", None)
    assert level("token", "auto") == ("eager", "one chunk without gradients") and level("train", "eager") == ("eager", None)
    assert {r.level for r in lowered(program, "train", "inductor")} == {"inductor"}
    modulated = program.map_ops(lambda o: o.with_attrs(modulate="m") if o.kind == "block" and o["index"] == 2 else o)
    (region,) = [r for r in lower(schedule(modulated)) if r.serial]
    assert (region.level, region.reason) == ("eager", "block 2 is modulated by its visit")
    with pytest.raises(VerifyError, match="level 'scheduled' can run, got block 2 is modulated"):
        verify_lowered(replace(lower(schedule(modulated)), regions=tuple(
            replace(r, level="scheduled", reason=None) if r.serial else r for r in lower(schedule(modulated))
        )))


def test_a_copied_schedule_leaves_what_was_lowered_behind() -> None:
    plan = schedule(plain("M", 2, 8))
    plan.lowered["made"] = lambda: None  # as little to be pickled as a capture is
    for copied in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), copy.copy(plan)):
        assert str(copied.program) == str(plan.program) and not copied.lowered and len(copied.regions) == len(plan.regions)
