"""Program text: prints, parses, round-trips, and says where a text is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthpass.errors import ParseError
from depthpass.ir import Op, Program, format_program, op, parse_program, plain
from depthpass.testing import programs


@given(programs())
def test_print_then_parse_is_the_identity(program: Program) -> None:
    assert parse_program(format_program(program)) == program


@given(programs(), st.data())
def test_notes_round_trip_and_mean_nothing(program: Program, data: st.DataObject) -> None:
    note = st.text(st.characters(categories=("L", "N", "P", "S")), max_size=12)
    noted = program.map_ops(lambda o: replace(o, note=data.draw(note)))
    assert parse_program(str(noted)) == noted
    assert noted.without_notes() == program


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_their_exact_value(by: float) -> None:
    program = Program("M", 1, 4, (op("embed", name="0"), op("scale", "0", name="1", by=by), op("output", "1")))
    assert parse_program(str(program)).ops[1]["by"] == by


def test_hand_written_text_may_be_loose() -> None:
    text = """
    # a comment line
      program   M  width=4 blocks=1      # provenance

    %x = embed
      %y.1 = block 0 ( %x )   slot 0
    output %y.1   # the end
    """
    assert parse_program(text).renumbered() == parse_program(
        "program M blocks=1 width=4\n%0 = embed\n%1 = block 0 (%0) slot 0\noutput %1 # the end"
    )


def test_defaults_are_left_out_and_equal() -> None:
    line = "%1 = linear a (%0) out 4 init 0.02 bias true"
    written = parse_program(f"program M blocks=1 width=4\n%0 = embed\n{line}\noutput %1")
    assert str(written).splitlines()[2] == "  %1 = linear a (%0) out 4"
    assert dict(written.ops[1].attrs) == {"name": "a", "out": 4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%1 = blok 0 (%0) slot 0", "line 3: unknown op 'blok'. Did you mean 'block'?"),
        ("%1 = block 0 (%0) slto 0", "line 3: 'block' has no attribute 'slto'. Did you mean 'slot'?"),
        ("%1 = block zero (%0) slot 0", "line 3: 'index' must be a int, got 'zero'"),
        ("%1 = block (%0) slot 0", "line 3: 'block' needs 'index' right after its name"),
        ("%1 = block 0 (%0 slot 0", "line 3: '(' is never closed"),
        ("%1 = block 0 (0) slot 0", "expected a value like %3 between the brackets, got '0'"),
        ("%1 = block 0 (%0) slot", "attribute 'slot' has no value"),
        ("%1 = block 0 (%0) slot 0 slot 1", "attribute 'slot' is given twice"),
        ("block 0 (%0) slot 0", "line 3: 'block' needs a result"),
        ("%1 = tap x (%0)", "line 3: 'tap' has no result"),
        ("%1 = linear a (%0) out 4 bias maybe", "'bias' must be a bool, got 'maybe'"),
        ("%1 =", "line 3: unknown op ''"),
    ],
)
def test_bad_lines_are_named(line: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        parse_program(f"program M blocks=1 width=4\n%0 = embed\n{line}\noutput %1")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty program text"),
        ("  # only a comment", "empty program text"),
        ("%0 = embed", "expected 'program NAME blocks=.. width=..'"),
        ("program M blocks=1", "expected 'program NAME blocks=.. width=..'"),
        ("program M blocks=1 width=4 depth=3", "unknown header field 'depth'"),
        ("program M blocks=1 width=4 visits=2\n%0 = embed\noutput %0", "header says visits=2, the ops have 0"),
    ],
)
def test_bad_headers_are_named(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message.replace(".", r"\.")):
        parse_program(text)


def test_plain(golden) -> None:
    golden(str(plain("LlamaForCausalLM", blocks=4, width=64)))


def test_an_op_refuses_an_attribute_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="'delay' has no attribute 'slot'; it has tokens"):
        op("delay", "0", slot=1)
    assert op("delay", "0", tokens=2).with_attrs(tokens=3) == Op("delay", "", ("0",), (("tokens", 3),))
