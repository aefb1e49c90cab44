"""A save replaces a folder's files whole or not at all, whichever file-system call fails, and wherever it is killed."""

import builtins
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import zoo
from turbos import enliven, stock_of, turbo_of

import depthpass as dp
from depthpass.hf.checkpoints.files import interrupted, recover, replacing

BATCH = zoo.batch([8, 5])
pytestmark = pytest.mark.usefixtures("one_capture")
CALLS = [(os, n) for n in "replace rename unlink remove rmdir mkdir scandir listdir open stat lstat".split()]
CALLS += [(builtins, "open"), (io, "open")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class Nth:
    """Lets the n-th file-system call below a folder act differently."""

    def __init__(self, monkeypatch, folder: Path, n: int | None, act):
        self.count, self.n, self.act, self.folder = 0, n, act, str(folder)
        for module, name in CALLS:
            monkeypatch.setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, real):
        def call(*args, **kwargs):
            if any(self.folder in str(a) for a in args if isinstance(a, str | Path)):
                self.count += 1
                if self.count == self.n:
                    self.act()
            return real(*args, **kwargs)

        return call


def fail():
    raise OSError(28, "No space left on device")


def killed():
    os._exit(9)


def in_a_child(action) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write(folder: Path, names: dict[str, str]):
    for name, text in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


OLD = {"config.json": "old", "model-00001-of-00002.safetensors": "old1", "model-00002-of-00002.safetensors": "old2",
       "model.safetensors.index.json": "old", "tokenizer.json": "mine", "generation_config.json": "old", "deep/a.json": "old"}
NEW = {"config.json": "new", "model-00001-of-00003.safetensors": "new1", "model-00002-of-00003.safetensors": "new2",
       "model-00003-of-00003.safetensors": "new3", "model.safetensors.index.json": "new", "generation_config.json": "new",
       "deep/a.json": "new", "deep/b.json": "new"}
AFTER = {k: v for k, v in OLD.items() if not k.startswith("model-")} | NEW


def texts(folder: Path) -> dict[str, str]:
    return {k: v.decode() for k, v in files(folder).items()}


def save(folder: Path):
    with replacing(folder) as stage:
        write(stage, NEW)


def calls_of_a_save(tmp_path, monkeypatch, old) -> int:
    write(tmp_path / "count", old)
    with monkeypatch.context() as patch:
        counter = Nth(patch, tmp_path / "count", None, None)
        save(tmp_path / "count")
    assert texts(tmp_path / "count") == ({**AFTER} if old else NEW)
    return counter.count


@pytest.mark.parametrize("old", [OLD, {}], ids=["over old files", "a new folder"])
def test_every_call_that_fails(old, tmp_path, monkeypatch):
    total = calls_of_a_save(tmp_path, monkeypatch, old)
    assert total > 30
    for n in range(1, total + 1):
        target = tmp_path / f"t{n}" / "model"
        if old:
            write(target, old)
        raised = False
        with monkeypatch.context() as patch:
            Nth(patch, target, n, fail)
            try:
                save(target)
            except OSError:
                raised = True
        if raised:
            assert (texts(target) == old) if old else not target.parent.exists(), n
        else:
            assert texts(target) == (AFTER if old else NEW), n
        assert not list(target.parent.rglob(".saving-*")), n


def test_every_call_at_which_it_is_killed(tmp_path, monkeypatch):
    total = calls_of_a_save(tmp_path, monkeypatch, OLD)
    seen = set()
    for n in range(1, total + 1):
        target = tmp_path / f"t{n}"
        write(target, OLD)

        def action(target=target, n=n):
            with pytest.MonkeyPatch.context() as patch:
                Nth(patch, target, n, killed)
                save(target)

        assert in_a_child(action) == 9
        visible = {k: v for k, v in texts(target).items() if not k.startswith(".saving-")}
        if "config.json" in visible:  # it is a checkpoint: the old one, or the new one
            assert visible in (OLD, AFTER), n
        copy = tmp_path / f"c{n}"
        shutil.copytree(target, copy)
        recover(target)
        assert texts(target) in (OLD, AFTER) and not list(target.glob(".saving-*")), n
        seen.add(texts(target) == OLD)
        save(copy)
        assert texts(copy) == AFTER and not list(copy.glob(".saving-*")), n
    assert seen == {True, False}


def test_a_running_save_is_left_alone(tmp_path):
    with replacing(tmp_path) as stage:
        write(stage, NEW)
        assert interrupted(tmp_path) == []
        recover(tmp_path)
        assert texts(stage) == NEW
    other = tmp_path / ".saving-00000000-1-abc"  # of another machine, just now
    other.mkdir()
    assert interrupted(tmp_path) == []
    os.utime(other, (0, 0))
    assert interrupted(tmp_path) == [other]


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def test_models_in_several_shards(tmp_path, monkeypatch):
    turbo = turbo_of(stock_of("llama"))
    target = tmp_path / "model"
    turbo.save_pretrained(target, max_shard_size="9KB")
    before, old = files(target), logits(turbo)
    enliven(turbo, seed=5)
    new = logits(turbo)
    with monkeypatch.context() as patch:
        counter = Nth(patch, tmp_path / "count", None, None)
        turbo.save_pretrained(tmp_path / "count", max_shard_size="5KB")
    failures = 0
    for n in range(1, counter.count + 40):  # there are more with old files in the way
        with monkeypatch.context() as patch:
            Nth(patch, target, n, fail)
            try:
                turbo.save_pretrained(target, max_shard_size="5KB")
            except OSError:
                assert files(target) == before, n
                failures += 1
                continue
        assert not list(target.glob(".saving-*"))
        assert torch.equal(logits(dp.from_pretrained(target)), new), n
        shutil.rmtree(target)
        target.mkdir()
        for name, held in before.items():
            (target / name).write_bytes(held)
    assert failures > 20 and torch.equal(logits(dp.from_pretrained(target)), old)


@pytest.mark.parametrize("moment", ["while files are written", "while they move"])
def test_loading_brings_the_old_model_back(tmp_path, moment):
    turbo = turbo_of(stock_of("llama"))
    turbo.save_pretrained(tmp_path, max_shard_size="9KB")
    old, before = logits(turbo), files(tmp_path)

    def action():
        enliven(turbo, seed=5)
        real = os.replace

        def replace(source, goal):
            moving = "/new/" in str(source) and Path(goal).name == "model.safetensors.index.json"
            if moving if moment == "while they move" else Path(goal).name == "plan.json":
                os._exit(9)
            real(source, goal)

        os.replace = replace
        turbo.save_pretrained(tmp_path, max_shard_size="5KB")

    assert in_a_child(action) == 9
    assert list(tmp_path.glob(".saving-*")) and (tmp_path / "config.json").exists() == (moment == "while files are written")
    assert torch.equal(logits(dp.from_pretrained(tmp_path)), old)
    assert files(tmp_path) == before and not list(tmp_path.glob(".*"))
    assert json.loads((tmp_path / "config.json").read_text())["depthpass"]
