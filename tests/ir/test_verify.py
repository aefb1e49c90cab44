"""The rules of the IR: every rule has a program that breaks just that rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthpass.errors import VerifyError
from depthpass.ir import OPS, Op, Program, infer, op, parameters, parse_program, plain, verify
from depthpass.testing import programs


@given(programs())
def test_random_programs_are_accepted_in_every_naming(program: Program) -> None:
    assert verify(program) is program
    renamed = program.map_ops(
        lambda o: replace(o, name=o.name and f"v{o.name}", args=tuple(f"v{a}" for a in o.args))
    )
    assert verify(renamed).renumbered() == program.renumbered() == program


def _swap(program: Program, at: int, new: Op | None) -> Program:
    ops = [*program.ops[:at], *([new] if new else []), *program.ops[at + 1 :]]
    return replace(program, ops=tuple(ops))


@given(programs(), st.data())
def test_broken_programs_are_rejected_with_their_text(program: Program, data: st.DataObject) -> None:
    """Break one op of a valid program in a way that no program survives."""
    at = data.draw(st.integers(0, len(program.ops) - 1))
    o = program.ops[at]
    ways = {
        "twice": o.name and replace(program, ops=(*program.ops[:at], o, *program.ops[at:])),
        "no output": o.kind == "output" and _swap(program, at, None),
        "undefined": o.args and _swap(program, at, replace(o, args=("nowhere", *o.args[1:]))),
        "itself": o.args and o.name and o.kind != "delay"
        and _swap(program, at, replace(o, args=(o.name, *o.args[1:]))),
        "too few": o.args and _swap(program, at, replace(o, args=o.args[: OPS[o.kind].args[0] - 1])),
        "too many": OPS[o.kind].args[1] is not None and _swap(program, at, replace(o, args=("0",) * 5)),
        "kind": _swap(program, at, replace(o, kind="nothing", attrs=())),
        "no index": o.kind == "block" and _swap(program, at, o.with_attrs(index=None)),
        "block": o.kind == "block" and _swap(program, at, o.with_attrs(index=program.blocks)),
        "slot": o.kind == "block" and _swap(program, at, o.with_attrs(slot=-1)),
        "keys": o.kind == "block" and _swap(program, at, o.with_attrs(keys=99)),
        "zero delay": o.kind == "delay" and _swap(program, at, o.with_attrs(tokens=0)),
        "type": o.kind == "scale" and _swap(program, at, o.with_attrs(by=1)),
    }
    for way, broken in ways.items():
        if broken:
            with pytest.raises(VerifyError) as error:
                verify(broken)
            assert error.value.__notes__[0] == str(broken), way


HEAD = (
    "program M blocks=2 width=8; %e = embed; %r = linear s (%e) out 1; "
    "%t = route threshold (%r); %g = gather (%e, %t); "
)
RULES = {
    "use before definition": ("%a = scale 2.0 (%b); %b = scale 2.0 (%e); output %b",
        "used before it is defined; only delay"),
    "empty cycle": ("%a = delay 1 (%b); %b = scale 2.0 (%a); output %e", "cycle meets no stream that every token has"),
    "slot twice": ("%a = block 0 (%e) slot 0; %b = block 1 (%a) slot 0; output %b", "slot 0 is already written by %a"),
    "absent into a block": ("%a = delay 3 (%e); %b = block 0 (%a) slot 0; output %b", "absent at the first 3 tokens"),
    "absent output": ("%a = delay 3 (%e); output %a", "expected a stream that every token has"),
    "keys of another block": (
        "%a = block 0 (%e) slot 0; %b = block 1 (%a) slot 1 keys 0; output %b", "holds keys of block 0"),
    "keys of a later visit": (
        "%a = block 0 (%e) slot 0 keys 1; %b = block 0 (%a) slot 1; output %b", "before %b writes it"),
    "keys nobody writes": ("%a = block 0 (%e) slot 0 keys 7; output %a", "reads slot 7, which no visit writes"),
    "gate without window": (
        "%a = block 0 (%e) slot 0; %b = block 0 (%a) slot 1 keys 0 gate x; output %b", "a gate needs keys"),
    "window without gate": ("%a = block 0 (%e) slot 0 window 2; output %a", "'window' means nothing without 'gate'"),
    "step without clock": ("%a = block 0 (%e) slot 0 modulate m step 2; output %a", "means nothing without 'clock'"),
    "clock without modulate": ("%a = block 0 (%e) slot 0 clock c; output %a", "means nothing without 'modulate'"),
    "lora without rank": ("%a = block 0 (%e) slot 0 lora x; output %a", "means nothing without 'lora_rank'"),
    "block of another width": ("%a = linear x (%e) out 4; %b = block 0 (%a) slot 0; output %b",
        "expected width 8, got width 4"),
    "sum of widths": ("%a = linear x (%e) out 4; %b = add (%e, %a); output %b", "expected equal widths"),
    "product of widths": ("%a = linear x (%e) out 4; %b = mul (%e, %a); output %b", "equal widths, or one of 1"),
    "route in arithmetic": ("%a = add (%e, %t); output %a", "expected streams, got a route"),
    "sum over different tokens": ("%a = add (%e, %g); output %a", "arguments over the same tokens"),
    "delay of routed tokens": ("%a = delay 1 (%g); %b = add (%e, %a); output %b", "scatter them back first"),
    "delay of later routed tokens": (
        "%a = delay 1 (%b); %c = add (%e, %a); %b = gather (%c, %t); output %c", "scatter them back first"),
    "delay of a route": ("%a = delay 1 (%t); output %e", "expected a stream, got a route"),
    "routed output": ("output %g", "expected a stream that every token has"),
    "gather twice": ("%a = gather (%g, %t); output %e", "expected a stream over all tokens"),
    "gather without route": ("%a = gather (%e, %e); output %e", "expected (stream, route)"),
    "scatter of another route": (
        "%u = route threshold (%r); %a = scatter (%e, %g, %u); output %a", "stream over the route's tokens"),
    "score of width 8": ("%a = route threshold (%e); output %e", "expected a score of width 1, got width 8"),
    "topk without capacity": ("%a = route topk (%r); output %e", "capacity for rule topk"),
    "choice without depth": ("%a = route choice (%e); output %e", "depth for rule choice"),
    "capacity of a threshold": ("%a = route threshold (%r) capacity 0.5; output %e", "'capacity' belongs to rule topk"),
    "capacity above 1": ("%a = route topk (%r) capacity 1.5; output %e", "a capacity in (0, 1], got 1.5"),
    "nest in a stream": ("%a = route threshold (%r, %e); output %e", "a route to nest in"),
    "unknown rule": ("%a = route topp (%r); output %e", "'rule' must be one of topk, threshold, above, choice"),
    "unknown function": ("%a = act relu6 (%e); output %a", "'fn' must be one of"),
    "trim without pad": ("%a = trim 2 (%e); output %a", "expected 0 pad tokens to trim, got 2"),
    "different pads": ("%p = pad 2 (%e); %a = add (%p, %e); output %a", "arguments over the same tokens"),
    "pads that grow": (
        "%a = delay 1 (%b); %b = pad 1 (%e); %c = pad 1 (%b); %d = add (%c, %a); output %e", "over the same tokens"),
    "select of one": ("%a = select cdf (%e, %e, %r) cdf 0.5; output %a", "T streams followed by T gates"),
    "cdf of zero": ("%a = select cdf (%e, %r) cdf 0.0; output %a", "expected a cdf in (0, 1]"),
    "taps of one name": ("tap a (%e); tap a (%e); output %e", "tap names must differ"),
    "tap of routed tokens": ("tap a (%g); output %e", "expected a stream that every token has"),
    "parameter twice": ("%a = linear x (%e) out 4; %b = linear x (%e) out 3; output %e",
        "'x.weight' is declared twice"),
    "identity of another width": ("%a = linear x (%e) out 4 identity true; output %e",
        "identity needs a last argument"),
    "width of zero": ("%a = linear x (%e) out 0; output %e", "expected out of at least 1, got 0"),
    "infinite": ("%a = scale inf (%e); output %a", "'by' must be a finite number"),
    "output of another width": ("output %r", "expected width 8, got width 1"),
    "two outputs": ("output %e; output %e", "exactly one output, as the last op"),
}


def program_of(text: str) -> Program:
    """A program of width 8 that begins with %e = embed, a score %r, a route %t and its tokens %g."""
    return parse_program((HEAD + text).replace("; ", "\n"))


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    text, message = RULES[rule]
    with pytest.raises(VerifyError) as error:
        verify(program_of(text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Program("M", 0, 8, ()), "blocks and width of at least 1"),
        (Program("a b", 1, 8, ()), "a model name without spaces"),
        (Program("M", 1, 8, ()), "exactly one output"),
        (Program("M", 1, 8, (op("embed", name="a b"), op("output", "a b"))), "a value's name has letters"),
        (Program("M", 1, 8, (op("embed", name="0"), op("norm", "0"), op("output", "0"))), "needs a result"),
        (Program("M", 1, 8, (op("embed", name="0"), op("tap", "0").with_attrs(name="a b"), op("output", "0"))),
         "'name' must be a name of letters"),
    ],
)
def test_rules_that_text_cannot_break(program: Program, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(program)


def test_types() -> None:
    types = infer(program_of("%a = delay 3 (%b); %b = add (%e, %a); %c = delay 2 (%a); %d = mul (%c, %r); output %b"))
    assert {k: (types[k].width, types[k].tokens, types[k].absent) for k in types} == {
        "e": (8, None, 0), "r": (1, None, 0), "t": (0, None, 0), "g": (8, "t", 0), "a": (8, None, 3), "b": (8, None, 0),
        "c": (8, None, 5), "d": (8, None, 5),
    }


def test_a_slow_cycle_is_absent_until_its_slowest_entry() -> None:
    """%x exists from token 20 on, however often the short cycle is walked."""
    text = "program M blocks=1 width=8\n%e = embed\n%a = delay 20 (%e)\n%b = delay 3 (%x)\n%x = add (%a, %b)\n"
    assert infer(parse_program(text + "%y = add (%e, %x)\noutput %y"))["x"].absent == 20


def test_parameters_of_every_kind() -> None:
    program = parse_program(
        "program M blocks=1 width=8\n%e = embed\n%a = linear low (%e) out 3 init 0.5\n%b = linear up (%a, %e) out 8 "
        "bias false identity true\n%c = weigh phi (%b) init 0.0\n%d = rms (%c) name gain\n%f = rms (%d)\n"
        "%g = weigh phi (%f) init 0.0\noutput %g"
    )
    actual = {p.name: (p.shape, p.init, p.fill, p.identity) for p in parameters(verify(program)).values()}
    assert actual == {
        "low.weight": ((3, 8), 0.5, None, False),
        "low.bias": ((3,), 0.0, None, False),
        "up.weight": ((8, 11), 0.02, None, True),
        "phi.weight": ((8,), 0.0, 0.0, False),
        "gain.weight": ((8,), 0.0, 1.0, False),
    }


def test_plain_needs_no_parameters() -> None:
    assert parameters(verify(plain("M", 3, 8))) == {}
