"""The harness: what is run, what is not run again, twins and budgets, settings, pages; on models of a few steps."""

import json

import pytest
import torch
from transformers import LlamaConfig

import depthpass as dp
from examples import run
from examples.harness import experiment as harness
from examples.harness import pages, tables
from examples.harness.arms import Arm, config, stock
from examples.harness.experiment import Experiment, Runner
from examples.harness.problems import Parity
from examples.harness.settings import merge, settings
from examples.harness.store import Store
from examples.harness.training import Rows, measure, train

SMALL = ("model.width=16", "model.blocks=2", "model.heads=2", "model.feedforward=32", "train.steps=3", "train.rows=2",
         "train.length=8", "train.grow=null", "train.enough=null", "train.lr=[0.001, 0.01]", "pretrain.steps=2", "test_rows=4")
BRIDGE = [dp.TurboConn(bridges=[(1, 0)], group=2, rank=16)]
ONE = {"lr": [0.001]}


def arms(c):
    return [
        Arm("bridge", BRIDGE), Arm("params", train=ONE, twin="bridge", by="params"),
        Arm("compute", train=ONE, twin="bridge", by="training FLOPs"),
    ]


def measured(model, c, arm):
    return {"score": measure(model, Parity(), 8, c.test_rows)["loss"]}


TRIAL = Experiment("a trial", arms, lambda c, arm: Parity(), measured, lambda figure, summary: figure.subplots(),
                   lambda c: {"loss": "score", "missing": "no.such"}, before=lambda c, arm: Parity(last=1), form="{:.3f}")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Two seeds of all arms, interrupted after the second run and taken up again; the runs that were made, and the summary."""
    store, c = Store(tmp_path_factory.mktemp("runs") / "trial.jsonl"), settings("parity", None, SMALL)
    lines = []

    def say(text):
        lines.append(text)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner("trial", TRIAL, c, store, 2, say=say).run()
    with store.path.open("a") as file:
        file.write('{"arm": "cut o')  # as a crash leaves a line
    summary = Runner("trial", TRIAL, c, store, 2, say=lines.append).run()
    return store, c, lines, summary


def test_every_run_is_made_once(trial):
    store, c, lines, _ = trial
    assert len(lines) == len(set(lines)) == len(store.records()) == 3 + 2 + 2  # two rates on seed 0, the better one on seed 1
    again = []
    Runner("trial", TRIAL, c, store, 2, say=again.append).run()
    more = Runner("trial", TRIAL, c, store, 3, say=again.append).run(missing=False)
    assert again == [] and len(more.runs["bridge"]) == 2
    other = Runner("trial", TRIAL, settings("parity", None, (*SMALL, "train.rows=3")), store, 1)
    assert other.fingerprint(other.arms["bridge"]) != store.records()[0]["settings"]  # other settings are other runs
    fewer = Runner("trial", TRIAL, settings("parity", None, (*SMALL, "arms.groups=[1]")), store, 1)
    assert fewer.fingerprint(fewer.arms["bridge"]) == store.records()[0]["settings"]


def test_the_rate_is_the_first_seeds_best(trial):
    for name, tried in trial[3].sweep.items():
        best = max(tried, key=tried.get)
        assert [(r["seed"], r["lr"]) for r in trial[3].runs[name]] == [(0, best), (1, best)]


def test_twins_cost_as_much(trial):
    runs = trial[3].runs
    bridge, params, compute = (runs[n][0] for n in ("bridge", "params", "compute"))
    assert params["costs"]["depth"] == compute["costs"]["depth"] == 2 < bridge["costs"]["depth"]
    assert abs(params["costs"]["parameters"] / bridge["costs"]["parameters"] - 1) < 0.05
    assert compute["costs"]["parameters"] < params["costs"]["parameters"]
    for mine, other in zip(runs["compute"], runs["bridge"]):
        # It ends with the step that reaches the budget.
        assert mine["flops"] * (1 - 1 / mine["steps"]) < other["flops"] <= mine["flops"]


def test_tables_and_files(trial, tmp_path):
    summary = trial[3]
    text = tables.page(summary, TRIAL, "python examples/run.py trial")
    assert text.count("| bridge |") == 2 and "seeds: 2" in text and " to " in text
    page = tmp_path / "page.md"
    pages.put(page, "trial", text)
    pages.put(page, "trial", "other")
    assert page.read_text().count("results: trial") == 1 and "other" in page.read_text() and "bridge" not in page.read_text()
    held = json.loads(json.dumps(pages.thinned(tables.plain(summary, "x"), 1)))
    assert held["runs"][0]["arm"] == "bridge" and [r["lr"] for r in held["others"]] == [lr for lr in (0.001, 0.01)
                                                                                       if lr != held["runs"][0]["lr"]]
    store, again = Store(tmp_path / "kept.jsonl"), []  # a kept result is taken up where it ended
    assert store.take([*held["runs"], *held["others"]]) == 7 and store.take(held["runs"]) == 0
    Runner("trial", TRIAL, trial[1], store, 2, say=again.append).run()
    assert again == []


def test_a_budget_needs_its_arm(trial, tmp_path):
    runner = Runner("trial", TRIAL, trial[1], Store(tmp_path / "none.jsonl"), 1, only=["compute"], say=lambda text: None)
    with pytest.raises(ValueError, match=r"'bridge', seed 0, whose training FLOPs it takes. Run that"):
        runner.run()


def test_settings():
    assert settings("parity").train.rows == 48 and settings("parity", "quick").train.length == 12
    assert settings("parity", "gpu", ("train.rows=7",)).train.rows == 7
    with pytest.raises(ValueError, match=r"there is no train.row; known here"):
        settings("parity", None, ("train.row=7",))
    assert settings("parity", None, ("train.lr=[1e-3, 2]", "pretrain.lr=5E-4")).train.lr == [0.001, 2]  # in YAML 1e-3 is a word
    for wrong in ("train.lr=1e-3", "train.lr=[fast]", "train.rows=many", "train.rows=true", "before=3", "arms.no_window=1",
                  "train=3", "lengths=[12, [24]]", "train.rows=[", "train.rows={}"):
        with pytest.raises(ValueError, match=rf"^--set: expected {wrong.partition('=')[0]}"):
            settings("parity", None, (wrong,))
    for name in run.names():
        for overlay in (None, "quick", "gpu"):
            c, experiment = settings(name, overlay), run.load(name)
            actual = experiment.arms(c)
            assert len({a.name for a in actual}) == len(actual) > 0
            for arm in actual:  # at the real width: heads fit it, and the last position is there
                assert config(merge(c.model, arm.model), experiment.problem(c, arm).vocabulary).max_position_embeddings >= max(
                    [*c.get("lengths", []), c.get("hops", 0), c.train.length])


def test_rows_grow_after_two_good_batches():
    rows = Rows(8, 4, step=3, at=0.9)
    seen = []
    for right in (1, 0.5, 1, 1, 1, 1, 1):
        rows.see(right)
        seen.append(rows.now)
    assert seen == [4, 4, 4, 7, 7, 8, 8]


def test_a_run_of_so_many_seconds_ends_with_the_step_that_reaches_them():
    c = settings("parity", None, SMALL)
    model = stock(config(c.model, 3), 0)
    assert train(model, Parity(), c.train, 1e-3, 0, seconds=1e-9, count=False).steps == 1
    assert train(model, Parity(), c.train, 1e-3, 0, seconds=0.2, count=False).steps > c.train.steps


def test_equal_bases_are_trained_before_once(monkeypatch):
    calls = []
    c = settings("parity", None, SMALL)

    def counted(model, problem, plan, *more, **options):
        calls.append(problem)
        return train(model, problem, plan, *more, **options)

    monkeypatch.setattr(harness, "train", counted)
    runner = Runner("trial", TRIAL, c, None, 1)
    first = runner.base(runner.arms["bridge"], 0, 3, "cpu")
    again = runner.base(runner.arms["compute"], 0, 3, "cpu")
    assert len(calls) == 1 and isinstance(first.config, LlamaConfig)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert all(a is not b for a, b in zip(first.parameters(), again.parameters()))


def test_a_comma_and_a_blank_belong_to_a_name():
    assert run.parts("TurboConn,stock, 2 blocks,T2MLR") == ["TurboConn", "stock, 2 blocks", "T2MLR"]


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["list"]) == 0 and "parity" in capsys.readouterr().out
    (tmp_path / "file").touch()
    for bad in (["no_such"], ["parity", "--seeds", "0"], ["publish"], ["parity", "--set", "train.row=1"],
                ["parity", "--arms", "none"], ["parity", "--arms", "TurboConn,none"], ["list", "parity"], ["parity", "--gpu"],
                ["pairity"], ["parity", "--out", str(tmp_path / "file" / "x")],
                ["publish", "parity", "--out", str(tmp_path)], ["show", "parity", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            run.main(bad)
    said = capsys.readouterr().err
    assert "Did you mean" in said and "expected a folder that can be written" in said
    assert "train.row" in said and "expected a CUDA device" in said and "Run it first" in said
