"""What the command line keeps between processes: the same report, without model code and without a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from depthpass.analysis import cost
from depthpass.report import kept
from depthpass.report.subject import Subject

CONFIG = {
    "model_type": "gemma2", "num_hidden_layers": 4, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 50, "sliding_window": 8, "layer_types": [
        "sliding_attention", "full_attention"] * 2,
}
SPECS = ["{pass: turboconn, bridges: [[3, 0]], group: 2, rank: 3}", "{pass: parallel_loop}",
         "{pass: relaxed_recursion, times: 2, rank: 2}"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "kept"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    yield tmp_path / "config.json"


def fresh(file: Path) -> Subject:
    """As in a process that has not imported models, in which nobody can have registered or patched any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "transformers.modeling_utils")
        return Subject.of_config(str(file))


def numbers(subject: Subject) -> list[dict[str, Any]]:
    return [subject.report(spec, seq_len=23, batch=2).to_dict() for spec in SPECS]


def test_a_second_process_counts_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = numbers(Subject.of(str(file)))
    assert numbers(fresh(file)) == wanted and len(list((file.parent / "kept").glob("*.json"))) == 1

    def never(*_: object) -> None:
        raise AssertionError("counted again")

    with monkeypatch.context() as patch:
        patch.setattr(cost, "model_cost", never)
        assert numbers(fresh(file)) == wanted
    code = ("import sys, json; from depthpass.cli import main; main(sys.argv[1:]); "
            "print(sorted({'transformers.modeling_utils', 'torch._dynamo'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, "report", str(file), "--spec", SPECS[0], "--seq-len", "23", "--batch", "2",
                           "--json"], capture_output=True, text=True, check=True)
    said, _, imported = done.stdout.rpartition("[")
    assert json.loads(said) == wanted[0] and imported.strip() == "]"


def test_what_cannot_be_trusted_is_counted_anew(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = fresh(file).report(SPECS[0], seq_len=23).to_json()
    entry, = (file.parent / "kept").glob("*.json")
    good = entry.read_text()
    with caplog.at_level("INFO", logger="depthpass"):
        for bad in ("", good[: len(good) // 2], good.replace('"ModelCost"', '"Path"'), good.replace('"Add"', '"exec"'), '["x"]'):
            assert bad != good
            entry.write_text(bad)
            assert kept.read(entry.stem) is None and "is not used" in caplog.text
            caplog.clear()
        assert fresh(file).report(SPECS[0], seq_len=23).to_json() == wanted and entry.read_text() == good
    if hasattr(os, "getuid"):
        entry.chmod(0o666)
        assert kept.read(entry.stem) is None
        entry.chmod(0o600)
    assert kept.read(entry.stem) is not None


def test_the_name_says_everything_that_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = fresh(file).key
    assert key is not None and Subject.of_config(str(file)).key is None  # models were imported here
    file.write_text(json.dumps(CONFIG | {"sliding_window": 9}))
    assert fresh(file).key not in (None, key)
    for other in ({"model_type": "nothing_of_theirs"}, {"auto_map": {}}, {"model_type": 3}):
        file.write_text(json.dumps(CONFIG | other))
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "transformers.modeling_utils")
            assert kept.key_of(CONFIG | other) is None
    monkeypatch.setattr(kept.metadata, "version", lambda name: "9.9")
    file.write_text(json.dumps(CONFIG))
    assert fresh(file).key != key and Subject.of_config(str(file), keep=False).key is None
    monkeypatch.setenv(kept.VARIABLE, "off")
    assert kept.folder() is None
