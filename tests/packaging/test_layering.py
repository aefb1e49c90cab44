"""Imports point one way, importing stays light, and nothing here shadows the distribution called `kernels`."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"depthpass": ROOT / "depthpass", "depthpass_lowering": ROOT / "lowering/depthpass_lowering",
            "depthpass_kernels": ROOT / "kernels/depthpass_kernels"}
OURS = set(PACKAGES)


def imports(path: Path, top_level_only: bool = False):
    """``(module, whether at module level)`` of every import of a file."""
    tree = ast.parse(path.read_text())
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    typing = {n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
              for n in ast.walk(i)}
    for node in ast.walk(tree):
        if node in typing or (top_level_only and node in lazy):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def files(package: str):
    return sorted(PACKAGES[package].rglob("*.py"))


def test_every_package_has_files():
    assert all(len(files(p)) > 3 for p in PACKAGES)


@pytest.mark.parametrize("package", sorted(OURS))
def test_arrows(package):
    allowed = {"depthpass": {"depthpass"}, "depthpass_kernels": {"depthpass_kernels"}, "depthpass_lowering": OURS}
    for path in files(package):
        for name in imports(path, top_level_only=True):
            top = name.split(".")[0]
            if top in OURS:
                assert top in allowed[package], f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_import_nothing_of_ours_even_lazily():
    for path in files("depthpass_kernels"):
        assert not {n.split(".")[0] for n in imports(path)} & (OURS - {"depthpass_kernels"}), path


def test_transformers_only_in_capture_and_hf():
    for package in OURS:
        for path in files(package):
            inside = path.is_relative_to(ROOT / "depthpass/hf") or path.is_relative_to(ROOT / "depthpass/capture")
            # The fuzzer builds stock models and runs their blocks as they are.
            allowed = inside or path == ROOT / "depthpass/demo.py" or path.is_relative_to(ROOT / "depthpass/fuzz")
            # Emitted files are transformers code.
            allowed = allowed or path.is_relative_to(ROOT / "depthpass/emit")
            found = {n for n in imports(path) if n.split(".")[0] == "transformers"}
            assert allowed or not found, f"{path.relative_to(ROOT)} imports {found}"


def test_import_is_light():
    code = "import sys, depthpass; print(sorted({'transformers', 'triton'} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_kernels_folder_shadows_nothing():
    """An importable top-level `kernels` breaks every `from transformers import ...`."""
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "lowering/__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or "site-packages" in found.origin


def test_public_names_resolve():
    import depthpass as dp

    for name in [n for n in dir(dp) if not n.startswith("_") and n not in ("annotations", "importlib")]:
        assert getattr(dp, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'transfrom'"):
        _ = dp.transfrom
