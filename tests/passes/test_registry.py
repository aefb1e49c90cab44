"""Passes by name: lazy, extensible from other packages, never two of one name; and what every pass owes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib import metadata
from typing import ClassVar

import pytest

from depthpass.errors import SpecError
from depthpass.ir import Program, plain
from depthpass.passes import Context, Pass, apply_spec, pass_class, pass_names, register, registry
from depthpass.passes.identity import Identity
from depthpass.passes.turboconn import TurboConn
from depthpass.spec import dump_spec, load_spec


@dataclass(frozen=True)
class Reverse(Pass):
    """Visit the blocks in reverse."""

    name: ClassVar[str] = "reverse"

    def apply(self, program: Program, ctx: Context) -> Program:
        from depthpass.passes.layer_program import LayerProgram

        return LayerProgram(tuple(reversed(range(ctx.blocks)))).apply(program, ctx)


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    yield
    registry._entry_points.cache_clear()


def with_entry_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    actual = [metadata.EntryPoint(name, value, registry.GROUP) for name, value in points]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: actual if group == registry.GROUP else [])
    registry._entry_points.cache_clear()


@pytest.mark.parametrize("name", pass_names())
def test_every_pass_keeps_the_contract(name: str) -> None:
    cls = pass_class(name)
    assert cls.name == name and is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert cls.numerics in ("exact", "reassociated", "changing")
    doc = cls.__doc__ or ""
    assert "rewrite:" in doc
    for f in fields(cls):
        assert f"\n        {f.name}: " in doc, f"{name}.{f.name} is not in the docstring's Args"
    assert set(cls.shown) <= {f.name for f in fields(cls)}


def test_listing_passes_imports_none_of_them() -> None:
    code = (
        "import sys; from depthpass.passes.registry import pass_names; assert 'turboconn' in pass_names(); "
        "print([m for m in sys.modules if m in ('torch', 'transformers', 'depthpass.passes.turboconn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_registered_pass_works_like_a_built_in_one() -> None:
    assert register(Reverse) is Reverse and register(Reverse) is Reverse
    assert "reverse" in pass_names()
    stock = plain("M", 3, 8)
    spec = load_spec("pass: reverse")
    assert dump_spec(spec) == {"depthpass": 1, "passes": [{"pass": "reverse"}]}
    assert [v["index"] for v in apply_spec(stock, spec, Context.of(stock)).visits] == [2, 1, 0]


def test_an_entry_point_works_like_a_built_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry_points(monkeypatch, ("reverse", f"{__name__}:Reverse"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Reverse.__module__])
    assert load_spec({"pass": "reverse"}) == (Reverse(),)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (("turboconn", "other.package:Turbo"),
         "two passes are called 'turboconn': depthpass.passes.turboconn:TurboConn and other.package:Turbo"),
        (("other", "no.such.module:Pass"),
         "'other' is registered as 'no.such.module:Pass', which cannot be imported: No module"),
        (("other", "depthpass.passes.identity:Nothing"), "which cannot be imported: module"),
        (("other", "depthpass.passes.identity:Identity"), "expected a subclass of Pass with that name, got"),
        (("other", "depthpass.passes.identity:dataclass"), "expected a subclass of Pass with that name, got"),
    ],
)
def test_bad_entry_points(monkeypatch: pytest.MonkeyPatch, point: tuple[str, str], message: str) -> None:
    with_entry_points(monkeypatch, point)
    with pytest.raises(SpecError) as error:
        pass_class("other")
    assert message in str(error.value)


def test_the_same_entry_point_twice_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry_points(monkeypatch, ("identity", "depthpass.passes.identity:Identity"))
    assert pass_class("identity") is Identity


def test_names_belong_to_one_pass() -> None:
    @dataclass(frozen=True)
    class Impostor(Pass):
        name: ClassVar[str] = "turboconn"

    with pytest.raises(SpecError, match=r"the name 'turboconn' already belongs to 'depthpass\.passes\.turboconn:"):
        register(Impostor)
    with pytest.raises(SpecError, match="expected the class that is registered under this name, got"):
        dump_spec(Impostor())
    with pytest.raises(SpecError, match="expected a subclass of Pass with a class attribute `name`"):
        register(Pass)
    with pytest.raises(SpecError, match="unknown name 'reverse'"):
        dump_spec(Reverse())
    assert register(TurboConn) is TurboConn
