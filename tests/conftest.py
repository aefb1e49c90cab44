"""Shared test set-up: one thread per process, golden files, hypothesis without wall-clock limits."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports torch: tiny models run fastest on one thread, and CI workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["DEPTHPASS_CACHE"] = "off"  # nothing of this user's
# With symbolic sizes, looking up what an op gives for fake tensors takes dynamo longer than computing it.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import pytest
from hypothesis import HealthCheck, settings

GOLDEN = Path(__file__).parent / "golden"

# Derandomised: the same examples on every machine, so that a red run can be repeated.
settings.register_profile(
    "depthpass", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("depthpass")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")
    parser.addoption("--codegen", action="store_true", help="let Inductor write code in every test that compiles")


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_no_garbage() -> Iterator[None]:
    """Rare garbage collections that walk what this module made: all of torch, transformers and kept captures take seconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)
    yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # else extension modules find their own objects alive at exit


@pytest.fixture(autouse=True)
def _graphs_instead_of_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests marked ``compile`` run the graphs that Inductor gets; those marked ``codegen``, and all with --codegen, its code.

    What is traced, cut, functionalised and handed to Inductor is the same. Its C++ is most of a first run: a second per kernel.
    ``codegen(of=...)`` writes code for the graphs that a test is about, and runs the others as they are.
    """
    marked = request.node.get_closest_marker
    if marked("compile") is None:
        yield
        return
    import torch
    from depthpass_lowering.executors import compiled
    from torch._dynamo.utils import counters
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor import compile_fx

    inner, given, kept = compile_fx._compile_fx_inner, [], counters["aot_autograd"]["autograd_cache_hit"]

    everything = request.config.getoption("--codegen")

    def write_code(gm, example_inputs, **options):
        if not everything and not marked("codegen").kwargs.get("of", lambda gm: True)(gm):
            return run_graph(gm, example_inputs, **options)
        given.append(gm)
        return inner(gm, example_inputs, **options)

    def run_graph(gm, example_inputs, **options):
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])  # as Inductor does: packed weights of oneDNN have no views
            gm.graph.erase_node(node)
        gm.recompile()
        return make_boxed_func(gm.forward)

    if marked("codegen") is not None:
        monkeypatch.setattr(compile_fx, "_compile_fx_inner", write_code)
        monkeypatch.setattr(compiled, "_SEGMENTS", weakref.WeakValueDictionary())  # no segment of a test without code
    elif not everything:
        monkeypatch.setattr(compile_fx, "_compile_fx_inner", run_graph)
    yield
    if marked("codegen") is not None:
        assert given or counters["aot_autograd"]["autograd_cache_hit"] > kept, "marked codegen, and Inductor got no graph"


@pytest.fixture
def one_capture() -> Iterator[None]:
    """Equal stock models are captured once in a test run."""
    from captured_once import captured_once

    with captured_once():
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with ``tests/golden/<module>/<test>.txt``; a missing file is a failure."""
    module = request.path.stem.removeprefix("test_")
    test = re.sub(r"[^\w.-]+", "-", request.node.name.removeprefix("test_")).strip("-")
    file = GOLDEN / module / f"{test}.txt"

    def check(text: str) -> None:
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        where = file.relative_to(GOLDEN.parent)
        if not file.exists():
            pytest.fail(f"golden file {where} is missing. Check the text, then run with --update-golden:\n{text}")
        assert text == file.read_text(encoding="utf-8"), f"differs from {where}; if meant, run with --update-golden"

    return check
