"""One subject per file, functions that fit on a screen: what CONTRIBUTING.md says, held."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [f for package in ("depthpass", "lowering", "kernels") for f in sorted((ROOT / package).rglob("*.py"))]
LINES, FUNCTION = 400, 60


@pytest.mark.parametrize("kind", ["files", "functions"])
def test_sizes(kind):
    assert len(FILES) > 100
    found = set()
    for path in FILES:
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if kind == "files":
            found |= {name} if len(text.splitlines()) > LINES else set()
        else:
            functions = (f for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{name}: {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno >= FUNCTION}
    assert not found
