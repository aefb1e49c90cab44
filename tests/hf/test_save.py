"""Checkpoints: written whole or not at all, read back by depthpass and by stock transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from turbos import enliven, stock_of, turbo_of

import depthpass as dp
from depthpass.errors import InputError, SpecError

BATCH = zoo.batch([8, 5])
pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture
def turbo():
    return turbo_of(stock_of("llama", tie_word_embeddings=True))


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def edit(path: Path, change):
    """Rewrite ``config.json``."""
    settings = json.loads((path / "config.json").read_text())
    change(settings)
    (path / "config.json").write_text(json.dumps(settings))


def files(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir()}


def test_what_is_written(turbo, tmp_path):
    turbo.save_pretrained(tmp_path)
    assert sorted(files(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["DepthpassLlamaForCausalLM"] and "dp.from_pretrained" in settings["model_type"]
    assert settings["depthpass"] == {"stock": {"model_type": "llama", "tie_word_embeddings": True}, "spec": {
        "depthpass": 1, "passes": [{"pass": "turboconn", "bridges": [[2, 0], [2, 1]], "group": 3, "rank": 6}],
    }}
    assert turbo.config.model_type == "llama" and turbo.config.to_dict()["model_type"] == "llama"
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() == turbo.state_dict().keys() - {"lm_head.weight"}  # tied: stored once
    assert all(torch.equal(t, turbo.state_dict()[n]) for n, t in held.items())


@pytest.mark.parametrize("size", ["50GB", "9KB"], ids=["whole", "sharded"])
def test_round_trip(turbo, tmp_path, size):
    turbo = dp.transform(dp.restore(turbo), turbo.depth_spec, chunk=2)
    enliven(turbo.depth, least=1)
    turbo.save_pretrained(tmp_path, max_shard_size=size)
    assert ((tmp_path / "model.safetensors.index.json").exists()) == (size == "9KB")
    loaded, info = dp.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert type(loaded) is type(turbo) and not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(turbo)) and loaded.depth_schedule.chunk == 2
    assert str(loaded.depth_program) == str(turbo.depth_program)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(**BATCH, **options), turbo.generate(**BATCH, **options))
    # The class of the model reads its own checkpoints, too.
    assert torch.equal(logits(type(turbo).from_pretrained(tmp_path)), logits(turbo))


def test_stock_transformers_loads_the_base_where_it_was_asked_for(turbo, tmp_path):
    turbo.save_pretrained(tmp_path, max_shard_size="9KB", stock=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(base) is transformers.LlamaForCausalLM and torch.equal(logits(base), logits(dp.restore(turbo)))
    assert base.lm_head.weight is base.model.embed_tokens.weight
    # And can be transformed like any stock model.
    again = dp.transform(base, turbo.depth_spec)
    again.depth.load_state_dict(turbo.depth.state_dict())
    assert torch.equal(logits(again), logits(turbo))


def test_a_restored_model_is_saved_as_a_stock_model(turbo, tmp_path):
    dp.restore(turbo).save_pretrained(tmp_path)
    assert "depthpass" not in json.loads((tmp_path / "config.json").read_text())
    assert not any(n.startswith("depth.") for n in load_file(tmp_path / "model.safetensors"))


def test_in_a_fresh_process(turbo, tmp_path):
    turbo.save_pretrained(tmp_path / "model", max_shard_size="9KB")
    torch.save((dict(BATCH), logits(turbo)), tmp_path / "example.pt")
    script = """
import sys, torch
import depthpass as dp
assert "transformers" not in sys.modules
model = dp.from_pretrained(sys.argv[1] + "/model")
assert model.lm_head.weight is model.model.embed_tokens.weight
batch, want = torch.load(sys.argv[1] + "/example.pt")
with torch.no_grad():
    assert torch.equal(model(**batch).logits, want)
print("equal", type(model).__name__)
"""
    root = Path(__file__).parents[2]
    places = [str(root), str(root / "lowering"), str(root / "kernels")]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("equal LlamaForCausalLM")


@pytest.mark.parametrize("dtype", ["auto", torch.float32, "float16", torch.bfloat16], ids=str)
def test_dtype_is_passed_on(turbo, tmp_path, dtype):
    turbo.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path, dtype=dtype)
    want = {"auto": torch.bfloat16, "float16": torch.float16}.get(dtype, dtype)
    assert {p.dtype for p in loaded.parameters()} == {want}


def test_device_map_and_settings_are_passed_on(turbo, tmp_path):
    turbo.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path, device_map={"": "cpu"}, attn_implementation="eager", use_cache=False)
    assert loaded.config._attn_implementation == "eager" and loaded.config.use_cache is False
    assert torch.allclose(logits(loaded)[1, 3:], logits(turbo)[1, 3:], atol=1e-4)
    given = transformers.AutoConfig.from_pretrained(tmp_path, rms_norm_eps=0.5)
    assert dp.from_pretrained(tmp_path, config=given).config.rms_norm_eps == 0.5


def test_heads_and_experts(tmp_path):
    torch.manual_seed(0)
    head = turbo_of(enliven(AutoModelForSequenceClassification.from_config(zoo.config("llama", 3, num_labels=3)).eval()))
    head.save_pretrained(tmp_path / "head")
    loaded = dp.from_pretrained(tmp_path / "head")
    assert type(loaded) is type(head) and torch.equal(logits(loaded), logits(head))
    experts = turbo_of(stock_of("mixtral"))
    experts.save_pretrained(tmp_path / "experts", max_shard_size="20KB")
    assert torch.equal(logits(dp.from_pretrained(tmp_path / "experts")), logits(experts))


def test_a_stale_checkpoint_does_not_shadow_a_new_one(turbo, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for sizes in (["50GB", "9KB"], ["9KB", "50GB"], ["5KB", "9KB"]):
        for seed, size in enumerate(sizes):
            enliven(turbo, seed=seed)
            turbo.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(logits(dp.from_pretrained(tmp_path)), logits(turbo))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {f for f in files(tmp_path) if f.endswith(".safetensors")} == set(index.values())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", ["config", "weights", "second shard"])
def test_a_failed_save_changes_nothing(turbo, tmp_path, monkeypatch, moment):
    target = tmp_path / "model"
    turbo.save_pretrained(target, max_shard_size="9KB")
    before = files(target)
    enliven(turbo, seed=5)
    written = []

    def fail(*args, **kwargs):
        written.append(1)
        if moment == "second shard" and len(written) < 2:
            return save_file(*args, **kwargs)
        raise OSError(28, "No space left on device")

    where = "safe_save_file" if moment != "config" else None
    if where:
        monkeypatch.setattr(transformers.modeling_utils, where, fail)
    else:
        monkeypatch.setattr(type(turbo.config), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        turbo.save_pretrained(target, max_shard_size="9KB")
    assert written and files(target) == before
    with pytest.raises(OSError, match="No space left"):
        turbo.save_pretrained(tmp_path / "new" / "model")
    assert not (tmp_path / "new" / "model").exists()
    monkeypatch.undo()


def test_only_safetensors(turbo, tmp_path):
    with pytest.raises(InputError, match="safe_serialization: expected True, got False"):
        turbo.save_pretrained(tmp_path / "a", safe_serialization=False)
    assert not (tmp_path / "a").exists()
    turbo.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="use_safetensors: expected True, got False"):
        dp.from_pretrained(tmp_path, use_safetensors=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="save_directory: expected a folder, got the file"):
        turbo.save_pretrained(tmp_path / "file")
    torch.save(turbo.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        dp.from_pretrained(tmp_path)


def test_other_checkpoints_are_refused(turbo, tmp_path):
    dp.restore(turbo).save_pretrained(tmp_path / "stock")
    with pytest.raises(SpecError, match=r"this is a stock model.*dp.transform\(model, spec\)"):
        dp.from_pretrained(tmp_path / "stock")
    with pytest.raises(OSError, match="nowhere"):
        dp.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SpecError, match=r"holds a PEFT adapter, not a model.*PeftModel.from_pretrained"):
        dp.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["depthpass"].pop("spec"), "config.depthpass: expected a mapping with 'spec'"),
    (lambda c: c["depthpass"].update(chunks=2), "unknown field 'chunks'. Did you mean 'chunk'"),
    (lambda c: c["depthpass"].update(chunk=4), "chunk: expected at most 3"),
    (lambda c: c["depthpass"]["spec"].update(depthpass=9), "schema versions up to 1, got 9. Update depthpass"),
    (lambda c: c["depthpass"]["spec"]["passes"][0].update(**{"pass": "turbocon"}), "Did you mean 'turboconn'"),
    (lambda c: c["depthpass"]["spec"]["passes"][0].update(bridges=[[2, 1]]),
     r"weights that the spec does not know: depth.turboconn.s2_d0.down.bias, .* and 1 more"),
    (lambda c: c["depthpass"]["spec"]["passes"][0].update(bridges=[[2, 0], [2, 1], [1, 0]]),
     r"the spec needs weights that the checkpoint does not have: depth.turboconn.s1_d0"),
    (lambda c: c.update(architectures=["NoSuchModel"], model_type="llamas"), "expected the name of a transformers class"),
])
def test_a_config_that_does_not_fit_is_refused(turbo, tmp_path, change, message):
    turbo.save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises((SpecError, dp.PassError), match=message):
        dp.from_pretrained(tmp_path)


def test_weights_of_other_shapes_are_refused(turbo, tmp_path):
    turbo.save_pretrained(tmp_path)
    edit(tmp_path, lambda c: c["depthpass"]["spec"]["passes"][0].update(rank=5))
    with pytest.raises((SpecError, RuntimeError), match="mismatch"):
        dp.from_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"do not have the shapes of the spec: depth.turboconn.s2_d0.down"):
        dp.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_an_unknown_class_name_is_no_reason_to_load_another_class(turbo, tmp_path):
    turbo.save_pretrained(tmp_path)
    edit(tmp_path, lambda c: c.update(architectures=["MyFork"]))
    with pytest.raises(SpecError, match=r"expected the name of a transformers class.*MyFork.*model_class=YourClass"):
        dp.from_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path, model_class=transformers.LlamaForCausalLM)
    assert isinstance(loaded, transformers.LlamaForCausalLM) and torch.equal(logits(loaded), logits(turbo))
