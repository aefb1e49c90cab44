"""``depthpass search``: from a saved model and a file of samples to specs and pictures."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import depthpass as dp
from depthpass import cli


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A saved model with a tokenizer of one word per token id."""
    path = tmp_path_factory.mktemp("saved")
    small.stock.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(13)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


@pytest.fixture
def run(capsys):
    def call(*args):
        capsys.readouterr()
        code = cli.main([str(a) for a in args])
        return code, *capsys.readouterr()

    return call


def test_a_sweep_with_everything_written(small, folder, run, tmp_path):
    ids, text = tmp_path / "ids.json", tmp_path / "text.jsonl"
    ids.write_text(json.dumps(small.samples))
    text.write_text("\n".join(json.dumps({"prompt": " ".join(f"w{i}" for i in p), "answer": " ".join(f"w{i}" for i in a)})
                              for p, a in small.samples))
    options = ("--method", "sweep", "--space", "rys", "--score", "log_prob", "--json")
    code, out, err = run("search", folder, "--samples", ids, *options, "--out", tmp_path / "found", "--plot", tmp_path / "p.svg",
                         "--heat-map", tmp_path / "m.svg")
    assert code == 0, err
    want = dp.search(small.live, small.samples, method="sweep", space="rys", score="log_prob")
    data = json.loads(out)
    assert [t["layers"] for t in data["trials"]] == [list(t.layers) for t in want.trials]
    assert data["best"]["searched"]["value"] == pytest.approx(want.best.score, rel=1e-10)
    assert {c["name"] for c in data["controls"]} == {"random", "input_blind"}
    assert dp.load_spec(tmp_path / "found" / "best.yaml")[0].layers == want.best.layers
    assert all((tmp_path / name).read_text().startswith("<svg") for name in ("p.svg", "m.svg"))
    code, again, _ = run("search", folder, "--samples", text, *options)
    assert code == 0 and json.loads(again)["trials"] == data["trials"]
    beam = ("search", folder, "--samples", ids, "--method", "beam", "--budget", 3, "--space", "{skip: [1], edits: 1}")
    code, plain, _ = run(*beam, "--resume", tmp_path / "trials")
    assert code == 0 and "control: random" in plain and "block visits:" in plain
    kept = (tmp_path / "trials").read_text()
    assert run(*beam, "--resume", tmp_path / "trials")[1] == plain and (tmp_path / "trials").read_text() == kept
    code, out, err = run(*beam, "--seed", 1, "--resume", tmp_path / "trials")
    assert code == 2 and out == "" and "seed: expected 0, got 1" in err


@pytest.mark.parametrize("change, words", [
    (("--method", "sweeep"), "Did you mean 'sweep'"), (("--budget", 0), "budget"), (("--space", "{skip: "), "--space"),
    (("--score", "exact"), "exact_match"), (("--samples", "gone.json"), "gone.json"),
    (("--resume", "samples.json"), "something else"), (("--resume", "gone/trials"), "no folder 'gone'"),
])
def test_what_is_wrong_is_said(folder, run, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "samples.json"
    file.write_text("[[[1, 2], [3]], [[2], [3]]]")
    code, out, err = run("search", folder, "--samples", file, *change)
    assert code == 2 and words in err and out == ""


@pytest.mark.parametrize("text, words", [
    ("[]", "at least one"), ("{", "JSON"), ('{"prompt": [1]}', "sample 0"), ("[[[1], [99]]]", "got 99"), ("3", "expected"),
])
def test_files_that_hold_no_samples(folder, run, tmp_path, text, words):
    file = tmp_path / "samples.json"
    file.write_text(text)
    code, _, err = run("search", folder, "--samples", file)
    assert code == 2 and words in err
    code, _, err = run("search", tmp_path, "--samples", file)
    assert code == 2
