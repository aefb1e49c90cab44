"""The pages about cost and complexity, and the examples in docstrings, run as written."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["cost.md", "complexity.md"])
def test_page_runs(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("module", ["depthpass.tasks.registry", "published_costs"])
def test_docstring_examples(module):
    actual = doctest.testmod(importlib.import_module(module))
    assert actual.attempted and not actual.failed


def test_the_pages_name_what_exists():
    from depthpass.analysis.complexity import complexity

    text = (DOCS / "complexity.md").read_text(encoding="utf-8")
    cited = set(re.findall(r"\b2\d{3}\.\d{5}\b", text))
    import sympy as sp

    n = sp.Symbol("n", positive=True)
    said = {s.citation for p in ("log", "bf16")
            for s in complexity(sp.log(n), n, p, cot_steps=sp.log(n), diffusion_steps=sp.log(n))}
    assert {c for c in said if c[:1] == "2"} == cited
