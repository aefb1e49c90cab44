"""The reference interpreter: runs every valid program, and means by each op what the op table says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.ir import Program, infer, parse_program
from depthpass.ir.interpret import Interpretation
from depthpass.testing import FEATURES, programs
from tests.passes.toy import WIDTH, Toy

RUNS = set(FEATURES) - {"pad", "operands"}


# A top-k route waits for later tokens, which a token loop does not have yet: never both in one program.
@settings(max_examples=60)
@given(st.sampled_from(("topk", "bridge")).flatmap(lambda out: programs(RUNS - {out}, width=WIDTH, max_steps=5)))
def test_every_valid_program_runs(program: Program) -> None:
    toy = Toy(program.blocks, 6)
    for block in toy.stack:
        block.gates.update({v["gate"]: toy.embed[0] for v in program.visits if v["gate"]})
    run = toy.run(program, toy.random_parameters(program))
    assert run.output().shape == (6, WIDTH)
    for name, kind in infer(program).items():
        values = [run.value(name, i) for i in range(6)]
        if kind.is_route:
            assert all(isinstance(v, bool) for v in values)
        elif kind.tokens is not None:
            assert [v is not None for v in values] == [run.value(kind.tokens, i) for i in range(6)]
        else:
            assert [v is not None for v in values] == [i >= kind.absent for i in range(6)]
            assert all(v is None or v.shape == (kind.width,) for v in values)


def rows(text: str, embed: list[float], parameters: dict[str, Tensor] | None = None) -> Interpretation:
    program = parse_program(f"program M blocks=1 width=1\n%e = embed\n{text.replace('; ', chr(10))}\noutput %e")
    return Interpretation(program, torch.tensor(embed)[:, None], [], lambda x: x, parameters)


def taken(run: Interpretation, name: str) -> list[int]:
    return [i for i in range(run.tokens) if run.value(name, i)]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("topk (%e) capacity 0.5", [1, 3]),
        ("topk (%e) capacity 0.7", [1, 2, 3]),
        ("topk (%e) capacity 0.7 rounding ceil", [0, 1, 2, 3]),
        ("topk (%e) capacity 0.1", [1]),
        ("topk (%e) capacity 1.0", [0, 1, 2, 3, 4]),
        ("threshold (%e) threshold 0.2", [1, 2, 3]),
        ("threshold (%e)", [1, 3]),
    ],
)
def test_routes_take_floor_or_ceil_and_the_first_of_equals(rule: str, want: list[int]) -> None:
    assert taken(rows(f"%r = route {rule}", [0.1, 0.5, 0.2, 0.5, 0.1]), "r") == want


def test_nested_routes_choose_among_the_outer_ones_tokens() -> None:
    run = rows("%r = route threshold (%e) threshold 2.0; %n = scale -1.0 (%e); %s = route topk (%n, %r) capacity 0.5; "
               "%g = gather (%e, %s); %b = scatter (%n, %g, %s); %c = scatter (%n, %g, %s) mode replace",
               [1.0, 2.0, 3.0, 4.0])
    assert (taken(run, "r"), taken(run, "s")) == ([1, 2, 3], [1, 2])
    assert run.stream("b").flatten().tolist() == [-1.0, 0.0, 0.0, -4.0]
    assert run.stream("c").flatten().tolist() == [-1.0, 2.0, 3.0, -4.0]


def test_choice_takes_tokens_whose_place_is_deep_enough() -> None:
    weight = {"d.weight": torch.tensor([[-1.0], [0.0], [1.0]]), "d.bias": torch.tensor([0.0, 0.5, 0.0])}
    text = "%s = linear d (%e) out 3; " + "; ".join(f"%r{d} = route choice (%s) depth {d}" for d in (1, 2, 3))
    run = rows(text, [-2.0, 0.1, 2.0], weight)
    assert [taken(run, f"r{d}") for d in (1, 2, 3)] == [[0, 1, 2], [1, 2], [2]]


def test_an_absent_summand_adds_nothing_not_a_projected_zero() -> None:
    weight = {"w.weight": torch.tensor([[1.0]]), "w.bias": torch.tensor([10.0])}
    run = rows("%d = delay 2 (%e); %w = linear w (%d) out 1; %a = add (%e, %w)", [1.0, 2.0, 3.0], weight)
    assert run.value("w", 1) is None
    assert run.stream("a").flatten().tolist() == [1.0, 2.0, 14.0]


def test_select_takes_the_first_that_reaches_and_else_the_last() -> None:
    run = rows("%g = act sigmoid (%e); %x = scale 2.0 (%e); %y = scale 3.0 (%e); "
               "%s = select cdf (%e, %x, %y, %g, %g, %g) cdf 0.6", [9.0, 0.0, -9.0])
    assert run.stream("s").flatten().tolist() == [9.0, 0.0, -27.0]


@pytest.mark.parametrize(
    "text",
    ["%p = pad 2 (%e)", "%p = noise 1.0", "%p = linear a (%e) out 1", "%p = block 0 (%e) slot 0 lora a lora_rank 1"],
)
def test_what_it_cannot_run_is_named(text: str) -> None:
    with pytest.raises(LoweringError, match="the interpreter cannot run %p"):
        rows(text, [1.0]).value("p", int("pad" in text))
