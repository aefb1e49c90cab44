"""Every further experiment from settings to files, on narrow models and few steps."""

import pytest

from examples import run

NARROW = ("model.width=16", "model.feedforward=16", "model.heads=2", "train.rows=4", "train.warmup=1")
CHANGES = {
    "loops": ("train.steps=9", "test_rows=4", "shift.every=2", "shift.patience=1", "shift.d1=9", "shift.d2=99", "train.length=12",
              "test_times=[4]", "shown_times=[4]", "targets=[9.0]"),
    "search": ("train.steps=2", "test_rows=4", "model.blocks=2", "samples=8", "budget=3", "train.length=12", "hops=1"),
    "layer_gradients": ("arms.steps=[2]", "responses=2", "model.blocks=2"),
    "fixed_point": ("train.steps=2", "hops=16", "test_rows=4", "model.blocks=2", "train.length=8"),
    "trees": ("train.steps=2", "pretrain.steps=2", "pretrain.rows=4", "test_rows=4", "lengths=[12]"),
    "parity_text": ("arms.stock=[]", "pretrain.steps=2", "pretrain.rows=2", "pretrain.length=8", "train.steps=2", "test_rows=4",
                    "lengths=[12]", "model.blocks=2"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_runs(name, tmp_path):
    summary = run.run(name, seeds=1, overlay="quick", out=tmp_path, changes=(*NARROW, *CHANGES[name]))
    runs = {arm: r[0] for arm, r in summary.runs.items()}
    assert all(tmp_path.joinpath(f"{name}-quick").with_suffix(s).stat().st_size for s in (".json", ".md", ".png"))
    assert summary.minutes > 0
    if name == "loops":  # one iteration until the second evaluation, at step 4, then four
        assert runs["SHIFT"]["flops"] < 0.8 * runs["always"]["flops"]
        assert runs["always"]["measures"]["flops_to"]["9.0"] == runs["always"]["curve"][0][1]
    if name == "parity_text":
        assert len(list((tmp_path / "bases").glob("*.safetensors"))) == 1
