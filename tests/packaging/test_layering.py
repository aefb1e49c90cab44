"""Imports point one way, importing stays light, and nothing here shadows the distribution called `kernels`."""

import ast
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import networkx as nx
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


# Room -> rooms it may import, lazy imports counted too; CONTRIBUTING.md has the map in words. The compiler backend and
# the recorder of live models are the part of the lowering that stands above the Hugging Face room.
BACKEND = ("depthpass_lowering.backend", "depthpass_lowering.executors.recording")
BASE = {"errors", "limits", "prompt", "log", "annotations"}
ROOMS = {
    "errors": set(), "log": set(), "limits": {"errors"}, "prompt": {"limits"}, "losses": {"annotations", "errors", "limits"},
    "annotations": {"errors", "limits"},
    "ir": BASE, "capture": {"errors"},
    "passes": BASE | {"ir", "analysis"}, "spec": BASE | {"passes"},
    "schedule": BASE | {"ir", "analysis"}, "lowered": BASE | {"ir", "schedule"},
    "plan": BASE | {"ir", "passes", "schedule", "spec"},
    "analysis": BASE | {"ir", "capture", "passes", "schedule", "lowered", "hf", "tasks"},
    "lowering": BASE | {"ir", "capture", "analysis", "schedule", "lowered", "kernels"},
    "diffusion": BASE | {"passes"},
    "hf": BASE | {"diffusion", "ir", "capture", "passes", "spec", "schedule", "lowered", "plan", "analysis", "lowering", "emit"},
    "backend": BASE | {"ir", "capture", "passes", "spec", "schedule", "lowered", "plan", "hf", "lowering"},
    "tasks": BASE | {"losses", "hf"},
    "emit": BASE | {"ir", "hf", "passes"},
    "recipes": BASE | {"passes", "hf"},
    "testing": {"ir", "passes"},
    "kernels": set(),
}
"""Every other room (report, compared, equal, search, cli, fuzz, demo, doctor) is for people and may import all of these."""

# Inside the Hugging Face room: what its lower rooms may import of the others.
INSIDE_HF = {
    "modules": set(), "caches": {"modules"}, "calls": {"caches", "modules"},
    "switching": {"calls", "checkpoints", "modules", "hf"}, "training": {"switching", "modules", "hf"},
}

# Circles that are still to be cut; none may be added.
KNOWN = [
    {"depthpass.ir.program", "depthpass.ir.text"},
    {"depthpass.lowered.program", "depthpass.lowered.text"},
    {f"depthpass_lowering.executors.{n}" for n in (
        "base", "chunk_loop", "compiled", "eager", "graphed", "levels", "scheduled")},
    {"depthpass.analysis.gradient_sets", "depthpass.analysis.gradients"},
    # Continuous batching runs the emitted layers of a model, and emitting takes a model.
    {"depthpass.emit.folder", "depthpass.emit.twin", "depthpass.hf.checkpoints.materialize", "depthpass.hf.model",
     "depthpass.hf.switching.switch", "depthpass.hf.transform"},
]


def modules():
    """Every module of ours by name."""
    for package, folder in PACKAGES.items():
        for path in files(package):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@functools.cache
def imported():
    """``(module, module it imports)`` of all of ours, lazy imports counted; ``import_module`` with a literal, too."""
    return tuple(_imported())


def _imported():
    names = dict(modules())
    for module, path in names.items():
        tree = ast.parse(path.read_text())
        typing = {n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
                  for b in i.body for n in ast.walk(b)}
        for node in ast.walk(tree):
            actual = []
            if node in typing:
                continue
            if isinstance(node, ast.Import):
                actual = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                actual = [f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in names else node.module for a in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
                literal = node.args[0]
                actual = [literal.value] if isinstance(literal, ast.Constant) and isinstance(literal.value, str) else []
            yield from ((module, name) for name in actual if name in names)


def room(module):
    if module.startswith(BACKEND):
        return "backend"
    if module.startswith(("depthpass_lowering", "depthpass_kernels")):
        return module.split(".")[0].removeprefix("depthpass_")
    return module.split(".")[1] if "." in module else "depthpass"


def test_no_import_circles_lazy_ones_counted():
    graph = nx.DiGraph(imported())
    circles = [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert [c for c in circles if not any(c <= known for known in KNOWN)] == []


def test_pass_files_are_short():
    """One subject each; the docstring counts."""
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "depthpass" / "passes").glob("*.py")}
    assert len(lengths) > 30 and not {name: n for name, n in lengths.items() if n > 150}


def test_rooms_import_what_the_map_allows():
    wrong = {(a, b) for a, b in imported()
             if room(a) in ROOMS and room(a) != room(b) and room(b) != "depthpass" and room(b) not in ROOMS[room(a)]}
    assert not wrong
    # Without the analyses, which rooms of programs ask and which look at live models, the map itself has no circle.
    graph = nx.DiGraph((a, b) for a, allowed in ROOMS.items() for b in allowed)
    graph.remove_edges_from([("hf", "emit"), ("hf", "diffusion")])
    assert nx.is_directed_acyclic_graph(graph.subgraph(set(graph) - {"analysis"}))


def test_rooms_inside_hf():
    def inside(module):
        parts = module.split(".")
        return None if parts[:2] != ["depthpass", "hf"] else parts[2] if len(parts) > 3 else "hf"

    pairs = {(inside(a), inside(b)) for a, b in imported()}
    assert {a for a, _ in pairs} >= set(INSIDE_HF)
    assert not {(a, b) for a, b in pairs if b and a != b and a in INSIDE_HF and b not in INSIDE_HF[a]}


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
            actual = {n for n in imports(path) if n.split(".")[0] == "transformers"}
            assert allowed or not actual, f"{path.relative_to(ROOT)} imports {actual}"


def test_import_is_light():
    code = "import sys, depthpass; print(sorted({'transformers', 'triton'} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_kernels_folder_shadows_nothing():
    """An importable top-level `kernels` breaks every `from transformers import ...`."""
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "lowering/__init__.py").exists()
    actual = importlib.util.find_spec("kernels")
    assert actual is None or actual.origin is None or "site-packages" in actual.origin


def test_public_names_resolve():
    import depthpass as dp
    from depthpass.passes.registry import BUILTIN

    groups = [name for group in dp.GROUPS.values() for name in group]
    assert len(groups) == len(set(groups))
    assert set(dp.__all__) == {*groups, "GROUPS", "kernels", "lowering", "tasks", "recipes"}
    assert {v.partition(":")[2] for v in BUILTIN.values()} <= set(dp.GROUPS["passes"])
    for name in [n for n in dir(dp) if not n.startswith("_") and n not in ("annotations", "importlib")]:
        assert getattr(dp, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'transfrom'"):
        _ = dp.transfrom
