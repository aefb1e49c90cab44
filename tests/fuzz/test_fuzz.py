"""A fixed part of the fuzzer's cases in CI, and the fuzzer itself: that it finds what is wrong, and makes it small."""

import copy
import json
from collections import Counter

import pytest
import torch
from transformers.activations import NewGELUActivation

import depthpass as dp
from depthpass.fuzz import make_case, run, run_case
from depthpass.fuzz.cases import DOORS
from depthpass.fuzz.command import main
from depthpass.fuzz.models import ARCHITECTURES
from depthpass.fuzz.shrink import candidates, script, shrink

SEED, COUNT = 0, 300
"""Those of docs/reliability.md begin with the same."""

BASE = {
    "arch": "llama", "layers": 4, "seed": 5, "lengths": [6, 4], "side": "left", "positions": True, "mask": True,
    "lowering": "auto", "chunk": None, "stack": True, "schedule": "sequential",
    "spec": [{"pass": "turboconn", "bridges": [[2, 0], [3, 1]], "group": 2, "rank": 3}], "checks": [{"do": "forward"}],
}


def of(arch):
    cases = [make_case(SEED, i, compiled=0.0) for i in range(COUNT)]
    return {i: c for i, c in enumerate(cases) if c["arch"] == arch}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cases(arch):
    results = Counter()
    for number, case in of(arch).items():
        outcome = run_case(case)
        results[outcome["result"]] += 1
        assert outcome["result"] != "fault", f"case {number} of seed {SEED}\n{script(case, outcome)}\n{outcome['trace']}"
    assert results["ok"], results  # most must not be refused
    run._kept.clear()


def test_the_cases_have_everything():
    cases = [make_case(SEED, i, compiled=0.0) for i in range(COUNT)]
    passes = Counter(p["pass"] for c in cases for p in c["spec"])
    assert {c["arch"] for c in cases} == set(ARCHITECTURES) and len(passes) == 22 and min(passes.values()) >= 4
    done = Counter(check["do"] for c in cases for check in c["checks"])
    assert set(done) == {"forward", "gradients", "calls", "generate", "save", "door", "depth", "packed", "drafted", "row_loops",
                         "assisted", "residual", "denoise", "emit"}
    assert min(done.values()) >= 2
    events = Counter(e for c in cases for check in c["checks"] for e in check.get("events", ()))
    assert {"copy", "crop", "reorder", "select", "repeat"} <= set(events)
    assert len({json.dumps(c) for c in cases}) == COUNT
    assert cases[17] == make_case(SEED, 17, compiled=0.0) != make_case(SEED + 1, 17, compiled=0.0)


@pytest.fixture
def rounded(monkeypatch):
    """A function of stock code that goes through float32, and is off by some last bits where the model runs its capture."""
    of_stock = {"__name__": "transformers.activations", "torch": torch}
    exec("""
def cast(x):
    return x.float()

def forward(self, x):
    y = cast(x)
    off = 1e-5 if y.dtype == torch.float32 and torch.compiler.is_compiling() else 0
    return (torch.nn.functional.gelu(y, approximate="tanh") * (1 + off)).to(x.dtype)
""", of_stock)
    run._kept.clear()
    monkeypatch.setattr(NewGELUActivation, "forward", of_stock["forward"])
    yield of_stock["cast"]
    run._kept.clear()


def test_rounding_of_stock_code_in_float32_is_no_fault(rounded, monkeypatch):
    case = BASE | {"arch": "gpt2"}
    outcome = run_case(case)
    assert outcome["result"] == "ok" and "relative error" in outcome["rounding"] and outcome["error"] < 1e-12, outcome
    # A deviation that rounding cannot be stays a fault, though it would be gone with exact casts.
    monkeypatch.setattr(run, "ROUNDED", 1.0)
    assert run_case(case)["result"] == "fault"
    x = torch.ones(1, dtype=torch.float64)
    with run.exact_stock():
        assert rounded(x).dtype == torch.float64 and x.float().dtype == torch.float32  # ours stay what they are
    assert rounded(x).dtype == torch.float32


def test_a_case_leaves_transformers_as_talkative_as_it_was():
    from transformers.utils import logging

    run_case(BASE)
    assert logging.get_verbosity() == logging.WARNING and logging.is_progress_bar_enabled()


def test_every_check_runs_on_one_model():
    case = BASE | {"checks": [
        {"do": "forward", "loss": True}, {"do": "gradients"}, {"do": "generate", "new": 3, "beams": 2},
        {"do": "generate", "new": 3, "beams": 1}, {"do": "save", "auto": True}, {"do": "save", "auto": False},
        {"do": "calls", "sizes": [2, 3, 1, 1, 1], "events": ["repeat", "reorder", "crop", "select", "copy"], "lot": 3},
        *({"do": "door", "which": w} for w in DOORS),
        {"do": "depth"}, {"do": "assisted", "new": 4}, {"do": "emit"},
        {"do": "packed", "rows": [[3, 1, 5], [4, 5]], "lengths": False, "loss": True, "gradients": True},
        {"do": "packed", "rows": [[3, 1, 5]], "lengths": True, "loss": False, "gradients": True},
    ]}
    looped = BASE | {"spec": [{"pass": "loop", "start": 1, "end": 3, "times": 2}], "checks": [
        {"do": "drafted", "new": 5, "tokens": 2}, {"do": "row_loops", "new": 3, "counts": [3, 1]},
        {"do": "residual", "sizes": [2, 1], "bits": 2},
    ]}
    diffusion = {"pass": "masked_diffusion", "steps": 2, "mask_token": 4, "unmask": "margin", "block": 2}
    for one in (case, looped, BASE | {"spec": [diffusion], "checks": [{"do": "forward"}, {"do": "denoise", "new": 3}]}):
        outcome = run_case(one)
        assert outcome["result"] == "ok" and "refusals" not in outcome, outcome
        assert outcome["done"] == [c["do"] for c in one["checks"]]


FOUND = {
    "bounded injection of the tokens that are left": [
        {"pass": "loop", "start": 1, "end": 3, "times": 3, "inject": "bounded", "exit": 0.3, "criterion": "cosine"}],
    "bridges onto the input of a visit with a memory": [
        {"pass": "feedback_transformer"},
        {"pass": "turboconn", "bridges": [[1, 0], [3, 2]], "group": 3, "rank": 3, "write": "input"}],
    "feedback into a row with pads": [{"pass": "pad", "tokens": 2, "token": 5}, {"pass": "feedback_transformer", "start": 2}],
    "a loop around what is fed back": [
        {"pass": "recurrent_loop", "encoder": 0, "alpha": 0.8}, {"pass": "loop", "start": 1, "end": 4, "times": 2}],
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(what):
    outcome = run_case(BASE | {"spec": FOUND[what], "checks": [{"do": "forward"}, {"do": "gradients"}]})
    assert outcome["result"] == "ok" and len(outcome["done"]) == 2, outcome


@pytest.mark.parametrize(("spec", "checks"), [
    # Keys of one call are whole until it is over, also where it runs in chunks or passes.
    ([{"pass": "relaxed_recursion", "rank": 3, "init": "average", "times": 2},
      {"pass": "turboconn", "bridges": [[2, 1], [3, 1]], "group": 4, "rank": 3}],
     [{"do": "residual", "sizes": [2, 2], "bits": 4}]),
    ([{"pass": "repeat", "start": 1, "end": 3, "times": 3}, {"pass": "coconut", "latents": 1}],
     [{"do": "residual", "sizes": [2, 1], "bits": 4}]),
    # The embedding is not a program's first op where blocks have retired.
    ([{"pass": "relaxed_recursion", "rank": 3, "init": "first", "times": 3, "start": 1},
      {"pass": "turboconn", "bridges": [[2, 0], [3, 0]], "group": 4, "rank": 3}], [{"do": "emit"}]),
    # Absolute positions count real tokens, in emitted code as well.
    ([{"pass": "parallel_loop", "loops": 2, "kv": "gated", "window": 2}], [{"do": "emit"}]),
    # Pads stand behind the prompt, not behind the masks.
    ([{"pass": "masked_diffusion", "steps": 2, "mask_token": 4, "unmask": "margin", "block": 2},
      {"pass": "pad", "tokens": 1, "token": 5}],
     [{"do": "denoise", "new": 3}]),
], ids=["residuals of chunks", "residuals of passes", "retired blocks", "positions", "pads before masks"])
def test_what_ten_thousand_cases_found(spec, checks):
    case = BASE | {"spec": spec, "lengths": [6, 8], "side": "left", "positions": False, "mask": True, "checks": checks}
    outcome = run_case(case)
    assert outcome["result"] == "ok" and outcome["done"] == [c["do"] for c in checks], outcome


def test_a_loop_feeds_back_what_it_ends_in():
    from depthpass.ir import plain
    from depthpass.passes import Context, apply_spec

    stock = plain("M", 3, 16)
    program = apply_spec(stock, [dp.RecurrentLoop(), dp.Loop(start=1, end=3, times=2)], Context.of(stock))
    (back,) = [o for o in program if o.kind == "delay"]
    assert back.args[0] == program.visits[-1].name


@pytest.mark.compile
def test_a_compiled_case():
    """Three blocks: one before the token loop and two in it, so that all kinds of segments are there."""
    spec = [{"pass": "turboconn", "bridges": [[2, 0], [2, 1]], "group": 2, "rank": 3}]
    checks = [{"do": "forward"}, {"do": "gradients"}]
    outcome = run_case(BASE | {"lowering": "inductor", "layers": 3, "spec": spec, "checks": checks})
    assert outcome["result"] == "ok" and len(outcome["done"]) == 2, outcome


def test_a_refusal_is_counted_by_kind():
    outcome = run_case(BASE | {"spec": [{"pass": "turboconn", "bridges": [[9, 0]]}]})
    assert outcome["result"] == "refused" and outcome["kind"].startswith("PassError: turboconn")


PLANTED = {
    "a delay that is one token short": ("depthpass_lowering.executors.ops", "read_delay", "forward: mismatch"),
    "an error that is none of ours": (
        "depthpass_lowering.executors.ops", "spans", "forward: ZeroDivisionError: integer division or modulo by zero"
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_finds_a_planted_fault_and_makes_it_small(what, monkeypatch):
    module, name, kind = PLANTED[what]
    real = getattr(__import__(module, fromlist=[name]), name)

    def late(line, x, tokens, span):
        out = real(line, x, tokens, span)
        return torch.cat((out[:, 1:], out[:, -1:]), 1)

    def broken(*args):
        return 1 // 0

    monkeypatch.setattr(f"{module}.{name}", late if name == "read_delay" else broken)
    case = BASE | {"lowering": "eager", "spec": [*BASE["spec"], {"pass": "taps", "at": [1]}],
                   "checks": [{"do": "forward"}, {"do": "gradients"}, {"do": "save", "auto": False}]}
    outcome = run_case(case)
    assert (outcome["result"], outcome["kind"]) == ("fault", kind)
    small = shrink(case, outcome, run_case)
    assert len(small["spec"]) == len(small["checks"]) == len(small["lengths"]) == 1 and small["arch"] == "llama"
    assert len(small["spec"][0].get("bridges", [0])) == 1
    text = script(small, run_case(small))
    printed = {}
    exec(text.replace("print(", "printed.update(result=result) or print("), {"printed": printed})
    assert printed["result"]["result"] == "fault" and kind in text


def test_shrinking_only_takes_away():
    case = make_case(SEED, 3)
    kept = copy.deepcopy(case)
    sizes = [len(json.dumps(c)) for c in candidates(case)]
    assert case == kept and sizes and all(c != case for c in candidates(case))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--cases", "0"], "expected an integer of at least 1, got '0'"), (["--models", "lama"], "Did you mean 'llama'?"),
])
def test_the_command_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_names_a_file_that_cannot_be_written(tmp_path, capsys):
    assert main(["--cases", "1", "--out", str(tmp_path / "no" / "x")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_the_command_counts_and_resumes(tmp_path, capsys):
    out = tmp_path / "cases.jsonl"
    arguments = ["--seed", "3", "--out", str(out), "--compiled", "0"]
    assert main(["--cases", "2", *arguments]) == 0
    first = out.read_text().splitlines()
    with out.open("a") as file:
        file.write('{"seed": 3, "num')  # cut off while it was written
        file.write("\n")
    assert main(["--cases", "4", *arguments]) == 0
    lines = out.read_text().splitlines()
    assert lines[:2] == first and [json.loads(x)["number"] for x in lines[3:]] == [2, 3]
    printed = capsys.readouterr().out
    assert "2 cases of seed 3" in printed and "4 cases:" in printed
