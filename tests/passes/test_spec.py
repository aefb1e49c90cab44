"""Specs: every form reads to the same passes, writing and reading is the identity, every mistake is named."""

from __future__ import annotations

import json
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from depthpass.errors import SpecError
from depthpass.passes import Pass, pass_class, pass_names
from depthpass.passes.base import default_of
from depthpass.passes.layer_program import LayerProgram
from depthpass.passes.turboconn import TurboConn
from depthpass.spec import dump_spec, load_spec, spec_hash, spec_to_json, spec_to_yaml
from depthpass.testing import turboconns

SPEC = (TurboConn(bridges=((3, 0), (2, 1)), group=8, alpha=1.0), LayerProgram((0, 1, 1, 2)))
YAML = """
depthpass: 1
passes:
  - pass: turboconn
    bridges: [[3, 0], [2, 1]]
    group: 8
    alpha: 1          # an integer is fine where a number is due
  - {pass: layer_program, layers: [0, 1, 1, 2]}
"""


def test_every_form_reads_to_the_same_passes(tmp_path: Path) -> None:
    data = yaml.safe_load(YAML)
    files = {"s.yaml": YAML, "s.yml": YAML, "s.json": json.dumps(data), "t.JSON": json.dumps(data, indent="\t")}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    forms: list[Any] = [
        SPEC, list(SPEC), data, data["passes"], tuple(data["passes"]), [SPEC[0], data["passes"][1]], YAML,
        json.dumps(data), json.dumps(data["passes"]), dump_spec(SPEC), spec_to_yaml(SPEC), spec_to_json(SPEC),
        *(tmp_path / f for f in files), *(str(tmp_path / f) for f in files),
    ]
    for form in forms:
        assert load_spec(form) == SPEC
    assert len({spec_hash(form) for form in forms}) == 1


@pytest.mark.parametrize(
    "form",
    [TurboConn(group=2), {"pass": "turboconn", "group": 2}, "pass: turboconn\ngroup: 2", "{pass: turboconn, group: 2}",
     '{"pass": "turboconn",\n\t"group": 2}'],
)
def test_one_pass_needs_no_list(form: Any) -> None:
    assert load_spec(form) == (TurboConn(group=2),)


def test_written_forms(golden) -> None:
    golden(f"{spec_to_yaml(SPEC)}---\n{spec_to_json(SPEC)}---\n{spec_hash(SPEC)}")


def _values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of the right type, most of which the pass then refuses for its own reasons."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(_values(args[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(_values, args))
    if origin is not None:
        return st.one_of(*map(_values, args))
    return {
        int: st.integers(0, 6), float: st.floats(0.0, 1.0), bool: st.booleans(), type(None): st.none(),
        str: st.sampled_from(("own", "first", "scope_a")),
    }[annotation]


@st.composite
def any_pass(draw: st.DrawFn) -> Pass | None:
    """Any registered pass with some options set, or None when it refuses them."""
    cls = pass_class(draw(st.sampled_from(pass_names())))
    types = cls.field_types()
    required = [f.name for f in fields(cls) if default_of(f) is MISSING]
    chosen = draw(st.lists(st.sampled_from(sorted(types)), max_size=3, unique=True)) if types else []
    try:
        return cls(**{k: draw(_values(types[k])) for k in {*required, *chosen}})
    except SpecError:
        return None


@given(st.lists(any_pass().filter(lambda p: p is not None), min_size=1, max_size=3))
def test_writing_and_reading_is_the_identity(spec: list[Pass]) -> None:
    want = tuple(spec)
    assert load_spec(dump_spec(want)) == want
    assert load_spec(spec_to_yaml(want)) == want
    assert load_spec(spec_to_json(want)) == want
    assert hash(load_spec(json.dumps(dump_spec(want)))) == hash(want)
    assert eval(repr(want), {type(p).__name__: type(p) for p in want}) == want


def test_a_pass_at_a_prompt_says_what_was_given() -> None:
    assert repr(SPEC[0]) == "TurboConn(bridges=((3, 0), (2, 1)), group=8, alpha=1.0)"
    assert repr(pass_class("loop")(1, 3, times=2)) == "Loop(start=1, end=3, times=2)"
    assert repr(pass_class("mixture_of_recursions")()) == "MixtureOfRecursions(recursions=3)"


@given(turboconns(5), turboconns(5))
def test_hashes_agree_just_when_specs_do(a: TurboConn, b: TurboConn) -> None:
    assert (spec_hash(a) == spec_hash(b)) == (a == b)
    assert spec_hash([a, b]) != spec_hash([a])


def test_lists_and_tuples_are_one() -> None:
    spec = TurboConn(bridges=[[3, 0]], sources=None)
    assert spec == TurboConn(bridges=((3, 0),)) and hash(spec) == hash(TurboConn(bridges=((3, 0),)))
    assert LayerProgram(range(3)) == LayerProgram([0, 1, 2])
    assert type(TurboConn(alpha=1).alpha) is float


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "0.00001", "1.e-5"])
def test_numbers_of_every_spelling(text: str) -> None:
    assert load_spec(f"{{pass: turboconn, init_std: {text}}}") == (TurboConn(init_std=1e-5),)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"pass": "turbocon"}, "pass: unknown name 'turbocon'. Did you mean 'turboconn'? Known: "),
        ({"pass": "turboconn", "grup": 4}, "turboconn: unknown field 'grup'. Did you mean 'group'? Fields: bridges,"),
        ({"pass": "turboconn", "group": "4"}, "turboconn.group: expected an integer, got '4' (str). Write the number"),
        ({"pass": "turboconn", "group": 4.0}, "turboconn.group: expected an integer, got 4.0 (float). Write 4."),
        ({"pass": "turboconn", "group": None}, "turboconn.group: expected an integer, got None (NoneType)"),
        ({"pass": "turboconn", "bridges": [[3]]}, "expected a list of (integer, integer) or null, got [[3]] (list)"),
        ({"pass": "turboconn", "group": 0}, "turboconn.group: expected at least 1 token, got 0"),
        ({"pass": "layer_program"}, "layer_program.layers: expected a list of integers, got nothing. The field has no"),
        ({"pass": 3}, "spec.passes[0].pass: expected the name of a pass, got 3 (int)"),
        ({"pas": "turboconn"}, "spec: unknown field 'pas'. Did you mean 'pass'?"),
        ({"depthpass": 1, "passes": [], "extra": 1}, "spec: unknown field 'extra'"),
        ({"turboconn": {"group": 4}}, "spec: unknown field 'turboconn'. Write 'pass: turboconn' and its fields beside it."),
        ({"pass": "turboconn", "depthpass": 1}, "expected either one mapping with 'pass' or the full form"),
        ({"depthpass": 2, "passes": []}, "reads schema versions up to 1, got 2. Update depthpass"),
        ({"depthpass": "1", "passes": []}, "spec.depthpass: expected the schema version, at most 1, got '1'"),
        ({"depthpass": True, "passes": []}, "spec.depthpass: expected the schema version, at most 1, got True"),
        ({"depthpass": 1}, "spec.passes: expected a list of passes, got None (NoneType)"),
        ({"passes": "turboconn"}, "spec.passes: expected a list of passes, got 'turboconn' (str)"),
        ({"passes": []}, "expected at least one pass, got an empty spec. The pass 'identity' changes nothing"),
        ([], "expected at least one pass, got an empty spec"),
        ([{"pass": "identity"}, "turboconn"], "spec.passes[1]: expected a pass or a mapping with 'pass', got 'turbo"),
        ([{"Pass": "turboconn"}], "spec.passes[0]: the field 'pass' with the name of the pass is missing; got 'Pass'"),
        ([{}], "the field 'pass' with the name of the pass is missing; got an empty mapping"),
        (None, "spec: expected a pass, a list of passes, a mapping, a path or YAML text, got None (NoneType)"),
        (TurboConn, "spec: expected a pass, a list of passes"),
        ("", "spec text: expected at least one pass, got an empty spec"),
        ("# nothing", "got an empty spec"),
        ("turbocon", "spec text: expected a mapping with 'pass' or 'passes', or a list of passes, got 'turbocon'. Did you"),
        ("{pass: turboconn", "spec text: not valid YAML or JSON: while parsing a flow mapping"),
        ("pass: turboconn\ngroup: 2\ngroup: 4", "the field 'group' is given twice"),
        ('{"pass": "turboconn", "group": 2, "group": 4}', "the field 'group' is given twice"),
        ("? [a]\n: 1", "not valid YAML or JSON: while constructing a mapping"),
        ("!!python/object:os.system {}", "not valid YAML or JSON"),
    ],
)
def test_bad_specs(source: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec(source)
    assert message in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "turbo.yaml").write_text(YAML)
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b"pass: \xff")
    (tmp_path / "spec.txt").write_text(YAML)
    for name, message in {
        "turbi.yaml": "No such file or directory. Did you mean 'turbo.yaml'?",
        "empty.json": "got an empty spec",
        "latin.yaml": "cannot be read: not UTF-8 text",
    }.items():
        for path in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(SpecError) as error:
                load_spec(path)
            assert message in str(error.value) and name in str(error.value)
    with pytest.raises(SpecError, match=r"spec.txt': expected a name ending in \.yaml, \.yml, \.json"):
        load_spec(tmp_path / "spec.txt")
    with pytest.raises(SpecError, match="Is a directory"):
        (tmp_path / "folder.yaml").mkdir()
        load_spec(tmp_path / "folder.yaml")
