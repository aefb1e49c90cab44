"""The page about passes and the examples in docstrings run as written."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

from depthpass.passes import pass_names, registry

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"
MODULES = sorted({t.partition(":")[0] for t in registry.BUILTIN.values()} | {"depthpass.spec", "depthpass.ir.program"})


def test_every_block_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    # A module of its own, because annotations of a pass are looked up where its class says it was made.
    module = types.ModuleType("passes_page")
    monkeypatch.setitem(sys.modules, "passes_page", module)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), module.__dict__)


def test_the_page_names_every_pass() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## What comes with depthpass")[1].split("\n## ")[0]
    assert {n for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for n in re.findall(r"`(\w+)`", row)} == set(
        pass_names())


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS).failed == 0
