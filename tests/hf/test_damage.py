"""Damaged checkpoints: one error that says what is wrong, and with which file."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from turbos import enliven, spec, stock_of

import depthpass as dp

pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in shards and one in a single file."""
    turbo = dp.transform(stock_of("llama"), spec())
    enliven(turbo.depth, least=1)
    folder = tmp_path_factory.mktemp("saved")
    turbo.save_pretrained(folder / "shards", max_shard_size="9KB")
    turbo.save_pretrained(folder / "whole")
    return folder


def config(change):
    def damage(folder):
        settings = json.loads((folder / "config.json").read_text())
        change(settings)
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


def options(change):
    return config(lambda c: change(c["depthpass"]["spec"]["passes"][0]))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def cut(name, part):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return damage


def weights(change):
    def damage(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return damage


def index(change):
    def damage(folder):
        file = folder / "model.safetensors.index.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return damage


SHARD = "model-00002-of-"
CASES = {
    "another rank": ("whole", options(lambda p: p.update(rank=5)), "config.json and model.safetensors do not belong together"),
    "a rank that is no number": ("whole", options(lambda p: p.update(rank="5")), "turboconn.rank: expected an integer"),
    "chunk true": ("whole", config(lambda c: c["depthpass"].update(chunk=True)), "config.depthpass.chunk: expected an integer"),
    "more layers": ("whole", config(lambda c: c.update(num_hidden_layers=4)), r"needs weights .*model\.layers\.3\."),
    "fewer layers": ("whole", config(lambda c: c.update(num_hidden_layers=2)), r"positions in 0\.\.1|does not know"),
    "layers of no number": ("whole", config(lambda c: c.update(num_hidden_layers="x")), r"config\.json.*num_hidden_layers"),
    "a billion layers": ("whole", config(lambda c: c.update(num_hidden_layers=10**9)), "hidden_layers|at most|visits"),
    "another width": ("whole", config(lambda c: c.update(hidden_size=64)), "do not have the shapes of"),
    "heads that do not divide": ("whole", config(lambda c: c.update(num_attention_heads=5)), "config.json"),
    "no class": ("whole", config(lambda c: c.update(architectures=["DepthpassAutoConfig"])), "name of a transformers class"),
    "a function": ("whole", config(lambda c: c.update(architectures=["Depthpasspipeline"])), "name of a transformers class"),
    "a number": ("whole", config(lambda c: c.update(architectures=[7])), "name of a transformers class"),
    "no stock type": ("whole", config(lambda c: c["depthpass"].pop("stock")), "stock.model_type"),
    "an unknown type": ("whole", config(lambda c: c["depthpass"]["stock"].update(model_type="x")), "transformers|model type"),
    "no JSON": ("whole", text("config.json", '{"model_type": '), r"config\.json: expected JSON"),
    "a list": ("whole", text("config.json", "[]"), r"config\.json"),
    "deep JSON": ("whole", text("config.json", "[" * 100000), r"config\.json"),
    "digits": ("whole", text("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), r"config\.json"),
    "cut weights": ("whole", cut("model.safetensors", 0.7), r"model\.safetensors \(\d+ bytes\): not a whole"),
    "no weights at all": ("whole", cut("model.safetensors", 0), r"model\.safetensors \(0 bytes\): not a whole"),
    "weights removed": ("whole", lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: expected the file"),
    "one weight less": ("whole", weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), r"layers\.1\.mlp\.up_proj"),
    "one new weight less": ("whole", weights(lambda w: w.pop("depth.turboconn.s2_d0.up.weight")), r"s2_d0\.up\.weight"),
    "one weight more": ("whole", weights(lambda w: w.update(extra=torch.ones(1))), "does not know: extra"),
    "a cut shard": ("shards", lambda f: cut(next(f.glob(SHARD + "*")).name, 0.5)(f), SHARD + r"\d+\.safetensors \(\d+ bytes\)"),
    "a shard less": ("shards", lambda f: next(f.glob(SHARD + "*")).unlink(), SHARD + r"\d+\.safetensors: expected the file"),
    "no index": ("shards", lambda f: (f / "model.safetensors.index.json").unlink(), r"model\.safetensors: expected the file or"),
    "an index of nothing": ("shards", text("model.safetensors.index.json", "{}"), r"index\.json: expected a mapping"),
    "no index JSON": ("shards", text("model.safetensors.index.json", "{"), r"index\.json: expected JSON"),
    "an index that forgets": ("shards", index(lambda i: [i["weight_map"].pop(k) for k in list(i["weight_map"])[:9]]),
                              "needs weights"),
    "times that never end": ("whole", options(lambda p: (p.clear(), p.update({"pass": "loop", "times": "n**n**n"}))),
                             r"loop\.times"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_and_where(saved, tmp_path, case):
    kind, damage, message = CASES[case]
    shutil.copytree(saved / kind, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(dp.DepthpassError, match=message) as caught:
        dp.from_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)
    if "class" not in message:  # an Auto class has a class of its own
        with pytest.raises(Exception):  # noqa: B017 (transformers' own error, or ours)
            AutoModelForCausalLM.from_pretrained(tmp_path / "m")


MANGLED = (None, True, -1, 10**9, 1.5, "x", [], {"a": 1}, ["x"])


def places(value, path=()):
    """Paths of everything in a JSON value, a list's first entry for all."""
    yield path
    for key in value if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("spec", [
    [dp.Loop(0, 2, times=2, kv="first", lora_rank=2), dp.TurboConn(bridges=[(3, 0)], group=2, rank=2)],
    [dp.ParallelLoop(loops=2, window=3), dp.Taps(at=(1,))],
], ids=["loop", "parallel"])
def test_a_config_that_was_changed_by_hand_is_one_error_that_names_it(spec, tmp_path):
    turbo = dp.transform(stock_of("llama"), spec, schedule="fixed_point" if spec[0].name == "parallel_loop" else "sequential")
    turbo.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    loaded = []
    for path in places(settings["depthpass"]):
        for value in MANGLED:
            section = at = {"depthpass": json.loads(json.dumps(settings["depthpass"]))}
            *keys, last = ("depthpass", *path)
            for key in keys:
                at = at[key]
            same, at[last] = at[last] == value and type(at[last]) is type(value), value
            (tmp_path / "config.json").write_text(json.dumps(settings | section))
            try:
                dp.from_pretrained(tmp_path)
            except dp.DepthpassError as error:
                assert str(tmp_path) in str(error), (path, value)
            else:
                loaded += [] if same else [(path, value)]
    # A window has no greatest size, and a head that is stored is not tied, whatever the config says.
    sound = {(("spec", "passes", 0, "window"), 10**9), (("stock", "tie_word_embeddings"), True)}
    assert set(loaded) <= sound


def test_what_is_not_damaged(saved, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        dp.from_pretrained(tmp_path / "nowhere")
    assert isinstance(dp.from_pretrained(saved / "shards"), transformers.LlamaForCausalLM)
    with pytest.raises(Exception) as caught:  # the caller's mistake, not the checkpoint's
        dp.from_pretrained(saved / "whole", dtype="float33")
    assert not isinstance(caught.value, dp.CheckpointError)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(saved / "whole", num_labels=3)
    head.save_pretrained(tmp_path / "head")
    other = dp.from_pretrained(tmp_path / "head", num_labels=5, ignore_mismatched_sizes=True)
    assert other.score.weight.shape[0] == 5
    with pytest.raises(dp.CheckpointError, match=r"score\.weight \(3, 32\) instead of \(5, 32\)"):
        dp.from_pretrained(tmp_path / "head", num_labels=5)
