"""The benchmark runner: every benchmark in its smallest size, and what happens to numbers that are wrong."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = sorted({p.stem for p in (BENCHMARKS / "suite").glob("*.py")} - {"sweep"})
"""All but the one that :func:`test_wrong_numbers_are_not_timed` runs."""
OPTIONS = {
    # What is left out is the same code for other models.
    "routed": ["--only", "train,decode"], "loops": ["--only", "training,growth"], "plt": ["--only", "token,kv"],
    "checkpointing": ["--checkpointed"],
    "turboconn": ["--only", "training"],
}


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


MEMORY = {"copy", "read alone"}
"""Rows that time memory, not a model."""


def module(name: str):
    return importlib.import_module(name)


def measured(name: str, tmp_path, *options: str) -> tuple[int, dict]:
    out = tmp_path / "out.json"
    status = module("run").main([name, "--tiny", "--json", str(out), *options])
    return status, json.loads(out.read_text())


@pytest.mark.usefixtures("one_capture")  # most of them build the same tiny Llama
@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs_and_checks_its_numbers(name, tmp_path, capfd):
    status, actual = measured(name, tmp_path, *OPTIONS.get(name, []))
    assert status == 0, capfd.readouterr().err
    assert actual["measurements"]
    for m in actual["measurements"]:
        (base,) = (r for r in m["rows"] if r["label"] == m["baseline"])
        assert base["ratio"]["median"] == 1
        for row in m["rows"]:
            assert row["values"] and row["ratio"]["least"] <= row["ratio"]["median"] <= row["ratio"]["most"]
            assert row["gate"] is None or row["gate"]["passed"]
            if m["quantity"] == "seconds" and row["label"] not in MEMORY:
                assert row["products"]["plain"] > 0
        # At most the stock model and the naive loop are what others are held against; moved memory has no numbers.
        others = {r["label"] for r in m["rows"] if r["gate"] is None} - MEMORY
        assert {label.split()[-1] for label in others} <= {"stock", "naive"}, m["title"]
        assert any(r["gate"] for r in m["rows"]), m["title"]
    if "training" in {m["part"] for m in actual["measurements"]}:
        assert all(r["gate"]["gradients"] < 1e-4 for r in actual["measurements"][0]["rows"] if r["gate"])
    assert actual["conditions"]["library"] and "product library" in capfd.readouterr().out


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capfd):
    naive = module("naive").NaiveGroups
    monkeypatch.setattr(naive, "__init__", lambda self, model, bridges, group, keep=naive.__init__: keep(
        self, model, bridges, group, gain=0.9
    ))
    status, actual = measured("sweep", tmp_path)
    assert status == 1
    (m,) = actual["measurements"]
    wrong = {r["label"]: r for r in m["rows"]}["auto"]
    assert wrong["values"] == [] and wrong["ratio"] is None and not wrong["gate"]["passed"]
    said = capfd.readouterr()
    assert "FAILED auto" in said.err and "not timed" in said.out


class Made:
    """A run with numbers of its own that counts its calls."""

    def __init__(self, **answer):
        self.numbers, self.calls = {k.replace("_", " "): torch.tensor(v) for k, v in answer.items()}, 0

    def __call__(self):
        self.calls += 1
        return float(self.calls)

    def answer(self):
        return self.numbers


def rows_of(runs: dict, right: dict, memory: bool = False, **options):
    declare, runner = module("declare"), module("runner")
    variants = {n: declare.Variant(lambda r=r: r, None if n == "base" else lambda: right) for n, r in runs.items()}
    m = declare.Measurement("part", "a title", "base", variants, **options)
    return runner.measure(m, runner.Options(repeat=3, warmup=2, memory=memory)).rows


def test_pairs_alternate_with_the_baseline_after_the_gate():
    right = Made(logits=[1.0, 2.0], gradient_of_w=[3.0])
    runs = {
        "good": Made(logits=[1.0, 2.0001], gradient_of_w=[3.0]), "base": right,
        "wrong output": Made(logits=[1.0, 2.1], gradient_of_w=[3.0]),
        "wrong gradient": Made(logits=[1.0, 2.0], gradient_of_w=[3.1]),
        "no gradient": Made(logits=[1.0, 2.0]),
        "one gradient too many": Made(logits=[1.0, 2.0], gradient_of_w=[3.0], gradient_of_v=[1.0]),
        "not a number": Made(logits=[1.0, float("nan")], gradient_of_w=[3.0]),
        "nothing": Made(),
    }
    base, good, *others = rows_of(runs, right.numbers)
    assert (base.label, good.label) == ("base", "good")
    assert good.gate.passed and len(good.ratios) == 3 and len(base.values) == 3
    assert runs["good"].calls == 2 + 1 + 3  # warm-up, products counted, timed
    for row in others:
        assert row.failed and not row.values and runs[row.label].calls == 0, row.label
    assert "gradient of w" in others[1].failed and "the oracle answers" in others[-1].failed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_of_one_call():
    class Large(Made):
        def __call__(self):
            super().__call__()
            return torch.ones(16 << 20).sum()  # 64 MiB that are given back

    base, large = rows_of({"base": Made(logits=[1.0]), "large": Large(logits=[1.0])}, {"logits": torch.ones(1)}, memory=True)
    assert base.peak_mib < 32 < 60 < large.peak_mib < 128


def test_a_wrong_baseline_times_nothing():
    declare, runner = module("declare"), module("runner")
    good = Made(logits=[1.0])
    m = declare.Measurement("part", "a title", "base", {
        "base": declare.Variant(lambda: Made(logits=[2.0]), lambda: good.numbers),
        "good": declare.Variant(lambda: good, lambda: good.numbers),
    })
    assert all(row.failed and not row.values for row in runner.measure(m, runner.Options(repeat=2)).rows)


def test_a_value_is_what_one_call_returns():
    base, twice = Made(logits=[1.0]), Made(logits=[1.0])
    twice.calls = 1
    _, row = rows_of({"base": base, "twice": twice}, base.numbers, quantity="value", unit="MiB")
    assert row.values == [2.0] and row.ratios == [2.0]


def test_a_busy_machine_is_a_warning():
    conditions = module("conditions")
    seen = conditions.observe("cpu", torch.float32, [conditions.Product(4, 256, 512, 40)], 1, 0.001)
    assert ("WARNING" in "\n".join(seen.lines())) == (seen.load > 0.5 * seen.cores)
    busy = conditions.Conditions("a CPU", 1, 2, 1.5, "malloc", "MKL", 1)
    quiet = conditions.Conditions("a CPU", 1, 2, 0.9, "malloc", "MKL", 1)
    assert "1.50 on 2 cores" in busy.warning and not quiet.warning
    (rate,) = seen.rates
    assert rate.plain > 0 and rate.chosen == (rate.packed is not None)
    few = conditions.rate(conditions.Product(4, 256, 512, 1), torch.float32, 0.001)
    assert few.packed == few.packed and not few.chosen, "a product that is used once is not packed"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "expected list or one of"), (["turbocon"], "got turbocon"), (["decode", "--only", "tokens"], "unknown tokens"),
        (["turboconn", "--lowering", "auto,inductr"], "got inductr"), (["turboconn", "--groups", "4,x"], "expected int values"),
        (["decode", "--repeat", "0"], "at least 1"), (["decode", "--width", "wide"], "invalid int"),
    ],
)
def test_bad_options_are_refused_before_anything_is_built(argv, said, capsys):
    try:
        status = module("run").main(argv)
    except SystemExit as error:
        status = error.code
    assert status == 2 and said in capsys.readouterr().err


def test_list_names_every_benchmark_and_its_parts(capsys):
    assert module("run").main(["list"]) == 0
    said = capsys.readouterr().out
    assert "turboconn " in said and "[training, forward]" in said
