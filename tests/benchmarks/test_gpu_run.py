"""The GPU run: how it starts, ends and resumes stages, and a rehearsal of what it measures on tiny CPU tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

STUB = '''
import time


def quick(stage):
    with stage.alone():
        stage.record("a number", ms=1.5)


def crashes(stage):
    stage.record("before the crash", ms=2.5)
    with stage.attempt("a case that raises"):
        raise ValueError("wrong number")
    stage.record("after it", ms=3.5)
    import os
    os._exit(7)


def hangs(stage):
    stage.record("before it hangs", ms=4.5)
    with stage.beside_others():
        time.sleep(600)


def waits(stage):
    crashed = stage.out / "crashes.json"
    while not crashed.exists() or "failed with" not in crashed.read_text():
        time.sleep(0.1)
    with stage.alone():
        stage.record("broken elsewhere", labels=stage.broken("crashes"))
'''


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The module of the run, with stages of its own."""
    (tmp_path / "stub_stages.py").write_text(STUB)
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path[:0] = [{str(BENCHMARKS)!r}, {str(tmp_path)!r}]\nimport gpu\n"
        "gpu.PLANS = tuple(gpu.Plan(n, 'stub_stages', limit) for n, limit in "
        "(('quick', 60), ('crashes', 60), ('hangs', 6), ('waits', 60)))\n"
        f"gpu.__file__ = {str(driver)!r}\n"
        "sys.exit(gpu.main())\n"
    )
    return driver


def call(script: Path, *options: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=300, env=env)


def results(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}.json").read_text())


def test_a_stage_that_crashes_or_hangs_keeps_what_it_found_and_stops_nobody(gpu, tmp_path):
    out = tmp_path / "out"
    done = call(gpu, "--rehearse", "--out", str(out), "--jobs", "4", "--budget", "120")
    assert done.returncode == 1, done.stderr
    assert results(out, "quick")["status"] == "done"
    crashed, hung, waited = (results(out, n) for n in ("crashes", "hangs", "waits"))
    assert crashed["status"] == "failed with 7"
    assert [r["label"] for r in crashed["results"]] == ["before the crash", "a case that raises", "after it"]
    assert "ValueError: wrong number" in crashed["results"][1]["error"]
    assert hung["status"].startswith("ended after") and hung["results"][0]["ms"] == 4.5
    # It got its turn although another stage hung, and was told what had failed.
    assert waited["status"] == "done" and waited["results"][0]["labels"] == ["a case that raises"]
    assert "a case that raises" in done.stdout and "3 failures" in done.stdout
    again = call(gpu, "--rehearse", "--out", str(out), "--resume", "--stages", "quick,crashes", "--jobs", "1")
    assert "quick.json" not in again.stdout.split("##")[0] and "# crashes.json" in again.stdout


def test_a_budget_ends_the_run(gpu, tmp_path):
    done = call(gpu, "--rehearse", "--out", str(tmp_path / "out"), "--jobs", "1", "--budget", "3", "--stages", "hangs,waits")
    assert done.returncode == 1 and "waits: not started within the budget" in done.stdout


def test_without_a_gpu_it_says_so_and_a_misspelt_stage_is_refused(tmp_path):
    import torch

    if not torch.cuda.is_available():
        done = call(BENCHMARKS / "gpu.py", "--out", str(tmp_path))
        assert done.returncode == 1 and "needs a CUDA device" in done.stdout
    done = call(BENCHMARKS / "gpu.py", "--rehearse", "--stages", "trainning", "--out", str(tmp_path))
    assert done.returncode == 2 and "unknown trainning" in done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """What the card will run, on tiny CPU tensors: kernels in the interpreter, a level, attention, a training step."""
    numpy = pytest.importorskip("numpy")
    triton = pytest.importorskip("triton")
    if triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
    stages = "environment,kernels.0,kernels.7,levels.0,attention,training.3"
    done = call(BENCHMARKS / "gpu.py", "--rehearse", "--out", str(tmp_path), "--jobs", "2", "--budget", "280", "--stages", stages)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert results(tmp_path, "kernels.0")["results"][-1]["passed"] > 0
    (row,) = (r for r in results(tmp_path, "training.3")["results"] if r["label"] == "g=3 scheduled")
    assert row["ms"] > 0 and row["floor"] >= 1
