"""Every experiment from settings to files, at its settings for a card on the CPU: narrow models, two steps, few arms."""

import pytest

from examples import run

NARROW = ("device=cpu", "model.width=16", "model.feedforward=16", "model.heads=2", "train.rows=4", "train.warmup=1",
          "train.steps=2", "train.lr=[0.001]")
GROWN = ("model.blocks=2", "pretrain.rows=2", "pretrain.steps=2", "test_rows=4", "train.length=8")
DEPTH = (*GROWN, "lengths=[8]", "pretrain.length=8")
CHANGES = {
    "addition": (DEPTH, ["TurboConn g=1"]),
    "arithmetic": ((*GROWN, "hops=16", "lengths=[8]", "pretrain.length=8"), ["TurboConn g=2"]),
    "depth_task": (DEPTH, ["Feedback"]),
    "fixed_point": (("hops=16", "test_rows=4", "model.blocks=2", "train.length=8"), ["text, TurboConn g=4"]),
    "layer_gradients": (("arms.steps=[2]", "responses=2", "model.blocks=2", "modulus=5", "sizes=[2, 3]"), None),
    "loops": (("train.steps=9", "test_rows=4", "shift.every=2", "shift.patience=1", "shift.d1=9", "shift.d2=99",
               "train.length=12", "test_times=[4]", "shown_times=[4]", "targets=[9.0]", "times=4", "hops=2"),
              ["always", "SHIFT"]),
    "p_hop": (("model.blocks=1", "test_rows=4", "train.length=12", "lengths=[12]", "test_times=[2]", "arms.times=2", "hops=1"),
              ["1 block"]),
    "p_hop_depth": (("model.blocks=2", "test_rows=4", "train.length=8", "lengths=[8]", "hops=1"), ["loop"]),
    "parity": ((*GROWN, "hops=16", "lengths=[8]", "pretrain.length=8"), ["TurboConn g=4", "stock, window 8"]),
    "parity_text": ((*GROWN, "hops=0", "lengths=[12]", "pretrain.length=8"), ["TurboConn g=1"]),
    "s5": (DEPTH, ["T2MLR"]),
    "search": (("test_rows=4", "model.blocks=2", "samples=8", "budget=3", "train.length=12", "hops=1", "arms.loops=[]"), None),
    "trees": ((*GROWN, "hops=16", "lengths=[8]", "pretrain.length=8"), ["TurboConn g=1"]),
}


@pytest.mark.parametrize("name", [n for n in run.names() if n != "text"])  # which has a file of its own
def test_it_runs(name, tmp_path):
    changes, arms = CHANGES[name]
    summary = run.run(name, seeds=1, overlay="gpu", out=tmp_path, arms=arms, changes=(*NARROW, *changes))
    runs = {arm: r[0] for arm, r in summary.runs.items()}
    assert all(tmp_path.joinpath(f"{name}-gpu").with_suffix(s).stat().st_size for s in (".json", ".md", ".png"))
    assert summary.minutes > 0
    if name == "loops":  # one iteration until the second evaluation, at step 4, then four
        assert runs["SHIFT"]["flops"] < 0.8 * runs["always"]["flops"]
        assert runs["always"]["measures"]["flops_to"]["9.0"] == runs["always"]["curve"][0][1]
    if name == "parity_text":
        assert len(list((tmp_path / "bases").glob("*.safetensors"))) == 1
