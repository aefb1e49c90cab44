"""FSDP2, DDP and accelerate in two processes: what one process computes on the whole batch. And the lines of the docs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/distributed.md").read_text()


def launch(words, folder, timeout=600):
    """Run a command in a folder with this checkout in front; returns what it prints."""
    places = [str(ROOT / p) for p in ("", "lowering", "kernels", "tests")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
           "CUDA_VISIBLE_DEVICES": "", "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What two processes have measured, by case."""
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).with_name("two_processes.py"))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    lines = launch(words, folder).splitlines()
    return {r["case"]: r for r in (json.loads(line) for line in lines if line.startswith('{"case"'))}


CASES = ["turboconn root", "turboconn parts", "turboconn accelerate, wrapped", "loop ddp, enabled", "loop accelerate, wrapped",
         "feedback decoder", "t2mlr and latents enabled", "relaxed blocks", "diffusion ddp, enabled",
         "emitted loop", "emitted plt"]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(reports, case):
    one = reports[case]
    assert one["gradients"] < 1e-10 and one["largest"] > 1e-3
    assert one["moved"] > 1e-3, "no new parameter has a gradient"


@pytest.mark.parametrize("case", ["turboconn root", "turboconn accelerate, wrapped", "loop accelerate, wrapped"])
def test_sharded_models_generate_and_save(reports, case):
    one = reports[case]
    assert one["tokens"] and one["decoder"] < 1e-12 and one["saved"] < 1e-12


@pytest.mark.parametrize("case", ["emitted loop", "emitted plt"])
def test_sharded_emitted_models_generate(reports, case):
    assert reports[case]["tokens"]


def test_gradients_of_the_decoder_alone_and_accumulated(reports):
    assert reports["decoder alone"]["gradients"] < 1e-10 and reports["decoder alone"]["largest"] > 1e-3
    assert reports["accumulated"]["gradients"] < 1e-10


def test_distributed_checkpoints(reports):
    assert reports["checkpoint"]["difference"] < 1e-12 and reports["checkpoint"]["sharded"]


@pytest.mark.parametrize("warm", [False, True])
def test_mixed_precision_is_the_stock_models(reports, warm):
    one = reports[f"bfloat16 {warm}"]
    assert one["dtype"] == "torch.bfloat16" and one["logits"] and one["gradients"]


def test_flattened_parameters_are_refused_by_name(reports):
    for flat in ("one", "parameters", "blocks"):
        assert "FSDP1" in reports[f"flat {flat}"]["error"] and "fully_shard" in reports[f"flat {flat}"]["error"]


@pytest.mark.parametrize("words", [w for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for w in block.splitlines()])
def test_lines_of_the_docs(tmp_path, words):
    for text in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    launch(words.split(), tmp_path)
    assert list(tmp_path.glob("*/model.safetensors"))


def test_trainer_shards_resumes_and_saves(tmp_path, monkeypatch):
    """Its sharded checkpoints, and the model that is gathered at the end, against one process on the same rows."""
    import torch

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import trainer_processes as script

    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script.__file__]
    (line,) = (x for x in launch(words, tmp_path).splitlines() if x.startswith('{"sharded"'))
    report = json.loads(line)
    assert report["sharded"] and report["resumed"] == 0 and report["loaded"] == 0
    assert not list((tmp_path / "first/checkpoint-2").glob("*.safetensors"))
    one = script.trainer(tmp_path / "one", 4)
    before = script.weights(one.model)
    one.train()
    after, there = script.weights(one.model), torch.load(tmp_path / "there.pt")
    assert after.keys() == there.keys() and script.gap(after, there) < 1e-8
    assert all((before[n] - after[n]).abs().max() > 1e-3 for n in after if n.startswith("depth."))
