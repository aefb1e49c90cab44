"""The pipeline: verifies around every pass, keeps provenance, renumbers, and never touches what it was given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given

from depthpass.errors import PassError, SpecError, VerifyError
from depthpass.ir import Program, op, plain
from depthpass.passes import Context, Pass, apply_spec
from depthpass.passes.identity import Identity
from depthpass.passes.loop import Loop
from depthpass.passes.recurrence import Repeat
from depthpass.passes.turboconn import TurboConn
from depthpass.testing import programs

STOCK = plain("M", 4, 8)


@dataclass(frozen=True)
class Scale(Pass):
    """Scale the output, or break the program."""

    name: ClassVar[str] = "scale_output"

    by: float = 2.0
    broken: bool = False

    def apply(self, program: Program, ctx: Context) -> Program:
        new = op("scale", "nowhere" if self.broken else program.output, name="fresh", by=self.by)
        return replace(program, ops=(*program.ops[:-1], new, op("output", "fresh")))


def test_one_pass_or_a_sequence() -> None:
    want = apply_spec(STOCK, Scale(), Context.of(STOCK))
    assert apply_spec(STOCK, [Scale()], Context.of(STOCK)) == apply_spec(STOCK, (Scale(),), Context.of(STOCK)) == want
    assert [o.kind for o in want][-2:] == ["scale", "output"]


def test_result_is_renumbered_and_input_untouched() -> None:
    text = str(STOCK)
    after = apply_spec(STOCK, [Scale(), TurboConn(bridges=[(2, 0)])], Context.of(STOCK))
    assert [o.name for o in after if o.name] == [str(i) for i in range(len(after.ops) - 1)]
    assert str(STOCK) == text


@given(programs())
def test_identity_changes_nothing(program: Program) -> None:
    assert apply_spec(program, Identity(), Context.of(program)) == program


def test_callback_sees_every_step() -> None:
    steps: list[tuple[Pass, Program, Program]] = []
    spec = (Repeat(1, 3), TurboConn(bridges=[(5, 0)]))
    after = apply_spec(STOCK, spec, Context.of(STOCK), on_pass=lambda *step: steps.append(step))
    assert [s[0] for s in steps] == list(spec)
    assert steps[0][1] == STOCK and steps[0][2] == steps[1][1] and steps[1][2] == after
    assert [len(s[2].visits) for s in steps] == [6, 6]


def test_provenance_names_the_pass_that_made_or_changed_an_op() -> None:
    @dataclass(frozen=True)
    class Swap(Pass):
        """Let the last visit run block 0."""

        name: ClassVar[str] = "swap"

        def apply(self, program: Program, ctx: Context) -> Program:
            last = program.visits[-1]
            return program.map_ops(lambda o: o.with_attrs(index=0) if o is last else o)

    after = apply_spec(STOCK, [Scale(), Scale(by=0.5), Repeat(1, 3), Swap(), Swap()], Context.of(STOCK))
    assert [o.note for o in after if o.kind == "scale"] == ["scale_output()", "scale_output(by=0.5)"]
    assert [o.note for o in after.visits] == ["", "", "", *["repeat(start=1, end=3, times=2)"] * 2, "swap()"]
    assert after.ops[-1].note == ""
    again = apply_spec(after, TurboConn(bridges=[(2, 0)], group=3), Context.of(after))
    assert {o.note for o in again if o.kind == "delay"} == {"turboconn(group=3): bridge 2 -> 0"}
    assert sum(o.note == "swap()" for o in again) == 1


def test_long_labels_are_cut() -> None:
    assert TurboConn(bridges=[(2, 0)]).label == "turboconn(group=4)"
    assert Repeat(1, 3).label == "repeat(start=1, end=3, times=2)"
    assert Loop(1, 3, damped=True, taps=True, inject="add", lora_rank=3).label == (
        "loop(start=1, end=3, times=2, damped=True, inject=add, ..)")


def test_a_pass_that_breaks_a_program_is_named() -> None:
    with pytest.raises(VerifyError, match="%nowhere is not defined anywhere") as error:
        apply_spec(STOCK, [Identity(), Scale(broken=True)], Context.of(STOCK))
    assert error.value.__notes__[-1].startswith("after the pass scale_output(broken=True); applied to:\nprogram M")


def test_a_broken_program_is_refused_before_any_pass() -> None:
    broken = replace(STOCK, ops=STOCK.ops[:-1])
    with pytest.raises(VerifyError, match="exactly one output"):
        apply_spec(broken, Identity(), Context.of(broken))


@pytest.mark.parametrize("spec", [None, [], (), ["turboconn"], {"pass": "turboconn"}, TurboConn])
def test_other_specs_are_refused(spec) -> None:
    with pytest.raises(SpecError, match=r"expected (a pass or a sequence of passes|at least one pass)"):
        apply_spec(STOCK, spec, Context.of(STOCK))


def test_context_of_another_model_is_refused() -> None:
    with pytest.raises(PassError, match="expected 4 blocks of width 8 as in the program, got 5 blocks of width 8"):
        apply_spec(STOCK, Identity(), Context.of(plain("M", 5, 8)))


def test_context_holds_facts() -> None:
    ctx = Context.of(STOCK, "llama", max_position_embeddings=64)
    assert (ctx.model, ctx.model_type, ctx.blocks, ctx.width) == ("M", "llama", 4, 8)
    assert ctx.facts["max_position_embeddings"] == 64
    with pytest.raises(TypeError):
        ctx.facts["x"] = 1  # type: ignore[index]


def test_a_pass_without_apply_says_so() -> None:
    @dataclass(frozen=True)
    class Empty(Pass):
        name: ClassVar[str] = "empty"

    with pytest.raises(NotImplementedError, match=r"Empty must define apply\(program, ctx\)"):
        apply_spec(STOCK, Empty(), Context.of(STOCK))
