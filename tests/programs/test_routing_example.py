"""The example of routed recurrence runs, for two steps of narrow models."""

import json
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "mixture_of_recursions.py"


def test_the_example_runs(tmp_path, monkeypatch):
    out = tmp_path / "mor"
    args = ["--steps", "2", "--width", "16", "--batch", "1", "--only", "4 layers", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *args])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    found = json.loads(out.with_suffix(".json").read_text())
    assert len(found) == 4
    first = next(iter(found.values()))["curve"][-1][0]
    for name, r in found.items():
        # Equal FLOPs up to one step, and as many losses as were asked for.
        assert abs(r["curve"][-1][0] - first) <= max(r["curve"][-1][0], first) / min(r["steps"], 3), name
        assert (r["causal_loss"] is None) == ("MoR" not in name and "ITT" not in name)
    assert "block visits" in out.with_suffix(".html").read_text()
    assert out.with_suffix(".svg").exists()
