"""The experiment on text: equal training FLOPs, routed models scored causally, decode times; a few steps of narrow models."""

from examples import run

SMALL = ("device=cpu", "model.width=16", "model.feedforward=32", "model.heads=2", "train.steps=4", "train.warmup=1",
         "train.rows=2", "train.length=16", "train.lr=[0.001]", "test_rows=4", "arms.stock=[]", "arms.systems=[PLT-2, MoR-3]")


def test_arms_take_as_many_flops(tmp_path):
    summary = run.run("text", seeds=1, overlay="gpu", out=tmp_path, changes=SMALL)
    runs = {arm: r[0] for arm, r in summary.runs.items()}
    stock = runs["stock, 4 blocks"]
    for arm in ("PLT-2", "MoR-3"):
        assert stock["flops"] <= runs[arm]["flops"] < stock["flops"] + runs[arm]["flops"] / runs[arm]["steps"]
        assert runs[arm]["steps"] < stock["steps"] == 4
    assert runs["MoR-3"]["measures"]["causal"] > 0 and "causal" not in runs["PLT-2"]["measures"]
    assert runs["PLT-2"]["measures"]["decode_ms"] > 0 and (tmp_path / "text-gpu.png").exists()
