"""Emitted folders against the transformed model: outputs, every gradient, generation with transformers' own caches."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaForSequenceClassification,
    StaticCache,
)
from turbos import enliven, transformed

import depthpass as dp
from depthpass.cli import main

LOOP = dp.Loop(start=1, end=3, times=2)
RICH = dp.Loop(start=1, end=3, times=3, damped=True, inject="concat", taps=True, kv="first")
BATCH = zoo.batch([9, 6])
REAL = BATCH["attention_mask"].bool()
POSITIONS = (BATCH["attention_mask"].cumsum(-1) - 1).clamp(min=0)
pytestmark = pytest.mark.usefixtures("one_capture")

# One kind of program on each architecture; windows are smaller than the rows.
CASES = {
    "llama": dp.TurboConn(bridges=((3, 0), (2, 1)), group=3, rank=5),
    "qwen3": [LOOP, dp.TurboConn(bridges=((5, 0),), group=2, rank=None, write="input")],
    "mistral": dp.ParallelLoop(loops=2, window=3),
    "gemma3_text": RICH,
    "gpt2": dp.ParallelLoop.loopcoder_v2(loops=3, window=2),
    "opt": dp.Loop(start=0, end=4, times=2, normalize="loop", exit=0.6, skip=False),
    "gpt_neox": dp.ParallelLoop.iquest(window=3, loops=2),
    "phi": dp.Loop(start=1, end=3, times=2, lora_rank=3, timestep=True),
    "mixtral": [dp.IntraLayerRecurrence([1, 2, 1, 2]), dp.Taps(at=[1, 3], head=True)],
    "gpt_oss": dp.LayerProgram([0, 1, 1, 2, 3, 1]),
    "olmo2": [dp.Loop(start=1, end=3, times=2, residual="1/n", inject="bounded"),  # norms behind the branches
              dp.TurboConn(bridges=((5, 0),), group=2, rank=4)],
    "gpt_neox beside": dp.SameLayerState(end=2),
    "phi beside": [dp.Loop(start=1, end=3, times=2), dp.SumNorms()],
    "cohere": dp.Loop(start=1, end=3, times=2, timestep="zero"),  # parallel branches
    "starcoder2": [dp.Loop(start=1, end=3, times=2, scales=True), dp.T2MLR(start=1, end=4, rescaled=True, residual=0.3)],
    "smollm3": dp.FeedbackTransformer(start=1),
    "qwen2": dp.RecurrentLoop(encoder=1, interval=3, gate="token"),
    "olmo": dp.MixtureOfRecursions(recursions=2, mode="threshold", kv="updated", taps=True),
    "phi3": dp.MixtureOfRecursions(recursions=2, router="token", balancing="loss_free", taps=True),
    "ernie4_5": [dp.MixtureOfDepths(mode="threshold", taps=True), dp.TurboConn(bridges=((2, 0),), group=3, rank=5)],
    "exaone4": dp.InnerThinking(steps=2, mode="threshold", taps=True),
    "glm4": [dp.Loop(start=1, end=3, times=3, exit=0.5), dp.SameLayerState(end=1)],  # a network runs token by token
    "gemma": [dp.Loop.huginn(1, 3), dp.SumNorms()],
    "granite": dp.Loop(start=1, end=3, times=4, exit=0.1, criterion="kl"),  # logits are scaled
    "nemotron": dp.Loop(start=1, end=3, times=4, exit=1, criterion="argmax", kv="latest", taps=True),
    "stablelm": dp.Loop(start=1, end=3, times=2, kv="first", timestep=True),  # blocks that keep arguments from their attention
}


def loaded(path, like, **more):
    """What transformers makes of a folder, with buffers in the precision that the model has been cast to."""
    reloaded = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=like.dtype, attn_implementation=like.config._attn_implementation, **more).eval()
    if like.dtype == torch.float64 and hasattr(reloaded, "set_experts_implementation"):
        reloaded.set_experts_implementation("eager")
    theirs = dict(like.named_buffers())
    for key, buffer in reloaded.named_buffers():
        if ".layers." not in key and key in theirs:
            buffer.data = theirs[key].clone()
    return reloaded


def emitted_name(model, key):
    """Where a parameter of a transformed model stands in the emitted one; None = nowhere."""
    layers, decoder, visits = model._depth.layers, model._depth.decoder, model.depth_program.visits
    if key.startswith(layers + "."):
        number, _, rest = key[len(layers) + 1 :].partition(".")
        place = next((p for p, o in enumerate(visits) if o["index"] == int(number)), None)
        if place is None:
            return None
        path, _, leaf = rest.rpartition(".")
        updated = visits[place]["lora"] and f"depth.{visits[place]['lora']}.{path}.a" in dict(model.named_parameters())
        return f"{layers}.{place}.{path}.base.{leaf}" if updated else f"{layers}.{place}.{rest}"
    if not key.startswith("depth."):
        return key
    for place, o in enumerate(visits):
        if o["lora"] and key.startswith(f"depth.{o['lora']}."):
            return f"{layers}.{place}.{key[len('depth..') + len(o['lora']) :]}"
    return f"{decoder}.{key}"


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:emit. the losses that train routers")
def test_equals_the_transformed_model(name, tmp_path):
    model = transformed(name.partition(" ")[0], CASES[name])
    dp.emit(model, tmp_path / "out")
    reloaded = loaded(tmp_path / "out", model)
    visits = model.depth_program.visits
    assert reloaded.config.num_hidden_layers == len(visits)
    assert sorted(m.layer_idx for m in reloaded.modules() if hasattr(m, "q_norm") or "Attention" in type(m).__name__
                  if hasattr(m, "layer_idx")) == list(range(len(visits)))
    mine, theirs = (m(**BATCH, position_ids=POSITIONS) for m in (model, reloaded))
    close(theirs.logits[REAL], mine.logits[REAL])
    weight = torch.randn(mine.logits.shape, dtype=mine.logits.dtype, generator=torch.Generator().manual_seed(0))
    for output in (mine, theirs):
        (output.logits * weight * REAL[..., None]).sum().backward()
    named, seen = dict(reloaded.named_parameters()), 0
    for key, p in model.named_parameters():
        other = emitted_name(model, key)
        if other is not None and p.grad is not None:
            close(named[other].grad, p.grad)
            seen += bool(p.grad.any())
    assert seen > 10
    for tap, stream in getattr(mine, "taps", {}).items():
        close(theirs.taps[tap][REAL], stream[REAL])
        if stream.dtype == torch.bool:
            assert 0 < stream[REAL].sum() < REAL.sum(), "a route that takes some of the tokens"
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(reloaded.generate(**BATCH, **settings), model.generate(**BATCH, **settings))


def test_weights_are_stored_once_and_again(tmp_path):
    model = transformed("llama", dp.Loop(start=1, end=3, times=4), torch.float32)
    dp.emit(model, tmp_path / "out")
    reloaded = loaded(tmp_path / "out", model)
    assert sum(p.numel() for p in reloaded.parameters()) == sum(p.numel() for p in dp.restore(model).parameters())
    reloaded.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            assert sum(".mlp.up_proj." in key for key in file.keys()) == 4  # noqa: SIM118
    again = loaded(tmp_path / "again", model)
    assert again.model.layers[3].mlp.up_proj.weight is again.model.layers[1].mlp.up_proj.weight
    assert torch.equal(again(**BATCH).logits, reloaded(**BATCH).logits)


@pytest.mark.parametrize("spec", [CASES["llama"], CASES["mistral"], dp.FeedbackTransformer(start=2), CASES["olmo"],
                                  dp.Loop(start=1, end=3, times=3, exit=0.8, criterion="state", kv="latest")],
                         ids=["turboconn", "plt", "feedback", "mor", "exit"])
@pytest.mark.filterwarnings("ignore:emit. the losses that train routers")
def test_caches_of_transformers(spec, tmp_path):
    model = transformed("llama", spec)
    dp.emit(model, tmp_path / "out")
    reloaded = loaded(tmp_path / "out", model)
    want = reloaded(**BATCH, position_ids=POSITIONS).logits
    close(want[REAL], model(**BATCH, position_ids=POSITIONS).logits[REAL])
    for cache in (DynamicCache(config=reloaded.config), StaticCache(config=reloaded.config, max_cache_len=16)):
        seen = []
        for a, b in ((0, 5), (5, 6), (6, 9)):
            seen.append(reloaded(input_ids=BATCH["input_ids"][:, a:b], attention_mask=BATCH["attention_mask"][:, :b],
                              position_ids=POSITIONS[:, a:b], use_cache=True, **{zoo.CACHE: cache}).logits)
        close(torch.cat(seen, 1)[REAL], want[REAL])
    settings = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    plain = reloaded.generate(**BATCH, do_sample=False, **settings)
    static = reloaded.generate(**BATCH, do_sample=False, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, plain)
    beams = reloaded.generate(**BATCH, do_sample=False, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(**BATCH, do_sample=False, num_beams=3, **settings))


def test_compiles_as_one_graph(tmp_path):
    loop = dp.Loop(start=1, end=3, times=2, timestep=True)
    model = transformed("llama", [loop, dp.TurboConn(bridges=((5, 0),), group=4, rank=5)], torch.float32)
    dp.emit(model, tmp_path / "out")
    reloaded = loaded(tmp_path / "out", model)
    ids = BATCH["input_ids"][:1, :5]  # a whole chunk, and a short one that reads it
    compiled = torch.compile(reloaded, backend="eager", fullgraph=True)
    close(compiled(input_ids=ids, use_cache=False).logits, reloaded(input_ids=ids, use_cache=False).logits)


_ALONE = """
import sys
class Never:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("depthpass"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Never())
import torch
from transformers import pipeline, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([[5, 9, 23, 4, 7]])
print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False).tolist())
print(any(name.startswith("depthpass") for name in sys.modules))
"""


def test_needs_no_depthpass(tmp_path):
    model = transformed("llama", CASES["llama"], torch.float32)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer_config.json").write_text("{}")
    assert main(["emit", str(tmp_path / "saved"), "--out", str(tmp_path / "out"), "--name", "turbo_llama"]) == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_turbo_llama.py",
        "tokenizer_config.json"]
    assert "depthpass" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not re.search(r"import depthpass|from depthpass", (tmp_path / "out" / "modeling_turbo_llama.py").read_text())
    # The transformers of this process, wherever it comes from.
    here = {"PYTHONPATH": ":".join(sys.path), "HF_MODULES_CACHE": str(tmp_path / "m"), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", _ALONE, str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=here)
    assert ran.returncode == 0, ran.stderr
    ids = torch.tensor([[5, 9, 23, 4, 7]])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert ran.stdout.splitlines() == [str(want.tolist()), "False"]
    # Without its code the folder is nothing, and in no case the stock model.
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_another_name_of_the_cache_is_an_error_not_lost_keys(tmp_path):
    model = transformed("llama", CASES["llama"], torch.float32)
    dp.emit(model, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("modeling_*.py")
    file.write_text(file.read_text().replace(f'if "{zoo.CACHE}" not in', 'if "kv_store" not in'))
    with pytest.raises(ImportError, match="Emit it again with the installed transformers"):
        loaded(tmp_path / "out", model)


def test_the_model_in_force_and_the_bare_model(tmp_path):
    model = transformed("llama", dp.Loop(start=1, end=3, times=4), torch.float32)
    with dp.using(model, dp.Loop(start=1, end=3, times=2)):
        dp.emit(model, tmp_path / "out")
        want = model(**BATCH).logits
    assert torch.equal(loaded(tmp_path / "out", model)(**BATCH).logits, want)
    bare = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(bare.layers) == bare.config.num_hidden_layers == 6


def test_exits_by_logits_ask_the_head(tmp_path):
    model = transformed("llama", dp.Loop(start=1, end=3, times=3, exit=0.05, criterion="entropy"), torch.float32)
    dp.emit(model, tmp_path / "out")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded(tmp_path / "out", model).generate(**BATCH, **settings), model.generate(**BATCH, **settings))
    with pytest.raises(ValueError, match="which the head of the whole model makes"):
        AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)(**BATCH)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (dp.MixtureOfRecursions(recursions=2), "mixture_of_recursions.* with route.*mode='threshold'"),
        (dp.Bidirectional(), "sees later tokens"),
        (dp.Loop(start=1, end=3, times=2, kv="last"), "split into calls"),
        (dp.Loop(start=1, end=3, times=(1, 3)), "dp.set_loops"),
        (dp.Pad(tokens=2), "pad.* inserts tokens"),
    ],
    ids=["topk", "ahead", "past", "varies", "pad"],
)
def test_what_no_plain_forward_can_express(spec, words, tmp_path):
    model = transformed("llama", spec, torch.float32)
    with pytest.raises(dp.SpecError, match=words):
        dp.emit(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_routes_say_what_is_left_out(tmp_path):
    model = transformed("llama", dp.MixtureOfRecursions(recursions=2, mode="threshold", z=0.1), torch.float32)
    with pytest.warns(UserWarning, match=r"losses that train routers \(.*z"):
        dp.emit(model, tmp_path / "out")
    dp.set_ratios(model, {"mor.r2": 0.0})
    with pytest.raises(dp.SpecError, match="set_ratios"):
        dp.emit(model, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_bad_folders_names_and_models(tmp_path):
    model = transformed("llama", LOOP, torch.float32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, got in ((tmp_path / "full", "not empty"), (tmp_path / "full" / "notes.txt", "a file"),
                      (tmp_path / "full" / "notes.txt" / "below", "below .*no folder"), (tmp_path / "link", "a link to nothing")):
        with pytest.raises(dp.InputError, match=got):
            dp.emit(model, path)
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert main(["emit", str(tmp_path / "nowhere"), "--out", str(tmp_path / "full")]) != 0
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    with pytest.raises(dp.InputError, match="a Python name"):
        dp.emit(model, tmp_path / "out", name="a-b")
    for options, words in (({"name": "llama"}, "no model type of transformers"), ({"name": 3}, "name: expected a string"),
                           ({"source": tmp_path / "gone"}, "source: expected a folder"), ({"copies": 1}, "copies: expected")):
        with pytest.raises(dp.InputError, match=words):
            dp.emit(model, tmp_path / "out", **options)
    with pytest.raises(dp.SpecError, match="expected a transformed model"):
        dp.emit(dp.restore(model), tmp_path / "out")
    fixed = transformed("gpt2", dp.LayerProgram([0, 0, 1]), torch.float32, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(dp.UnsupportedModelError, match="depend on its place"):
        dp.emit(fixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_heads(tmp_path):
    stock = enliven(LlamaForSequenceClassification(zoo.config("llama", num_labels=3)), std=0.2).eval()
    model = dp.transform(stock, LOOP)
    dp.emit(model, tmp_path / "out")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert reloaded.config.num_labels == 3 and len(reloaded.model.layers) == 6
    torch.testing.assert_close(reloaded(**BATCH, position_ids=POSITIONS).logits, model(**BATCH, position_ids=POSITIONS).logits)


def test_copies_say_their_size(tmp_path):
    model = transformed("llama", LOOP, torch.float32)
    with pytest.warns(UserWarning, match=r"6 visits of 4 blocks have weights of their own"):
        dp.emit(model, tmp_path / "out", copies=True)
    reloaded = loaded(tmp_path / "out", model)
    assert torch.equal(reloaded(**BATCH).logits, model(**BATCH).logits)
    assert len({p.data_ptr() for p in reloaded.parameters()}) == len(list(reloaded.named_parameters(remove_duplicate=False)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dp.emit(dp.transform(dp.restore(model), dp.LayerProgram([1, 0, 2])), tmp_path / "less", copies=True)


def test_parts_stand_in_files_as_they_are_here(tmp_path):
    model = transformed("llama", CASES["mistral"], torch.float32)
    dp.emit(model, tmp_path / "out")
    text = next((tmp_path / "out").glob("modeling_*.py")).read_text()
    source = (Path(dp.__file__).parent / "emit" / "parts.py").read_text()
    part = source[source.index("def near_mask") :].rstrip()
    assert part in text and text.count("visit(") >= 8
