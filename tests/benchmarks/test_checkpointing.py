"""Compiled loops with gradient checkpointing need no more memory than eager ones."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_checkpointed_loops_peak_no_higher_compiled_than_eager(tmp_path, monkeypatch):
    """Each row comes from a process of its own. Neither the rows nor the tokens are as many as the model is wide: Inductor
    would take them for the width, and compile once more for the few tokens whose numbers are checked."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path = tmp_path / "out.json"
    options = ["--times", "8", "--tokens", "128", "--checkpointed", "--json", str(path)]
    assert importlib.import_module("run").main(["checkpointing", *options]) == 0
    (result,) = json.loads(path.read_text())["measurements"]
    rows = {r["label"]: r["value"]["median"] for r in result["rows"]}
    # Without checkpointing the same step needs three to four times as much, so a level that keeps activations shows here.
    assert 0 < rows["inductor, checkpointed"] <= 1.1 * rows["eager, checkpointed"], rows
