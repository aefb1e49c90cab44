"""Saved models behind the Auto classes: the transformed model where depthpass is imported, an error where it is not."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedConfig,
    pipeline,
)
from turbos import enliven, spec, stock_of, turbo_of

import depthpass as dp
from depthpass.hf.checkpoints.marks import MARK

BATCH = zoo.batch([8, 5])
pytestmark = pytest.mark.usefixtures("one_capture")


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.fixture(scope="module")
def loop():
    """A program without new parameters: nothing in its weights would tell it from its base."""
    return dp.transform(stock_of("llama"), dp.Loop(start=1, end=3, times=3))


def fresh(code: str, *arguments) -> subprocess.CompletedProcess:
    """Python code in a process of its own."""
    root = Path(__file__).parents[2]
    places = [str(root), str(root / "lowering"), str(root / "kernels")]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize(("name", "size"), [("llama", "50GB"), ("llama", "9KB"), ("gpt2", "9KB"), ("mixtral", "50GB")])
def test_auto_classes_give_the_transformed_model(name, size, tmp_path):
    turbo = turbo_of(stock_of(name))
    turbo.save_pretrained(tmp_path, max_shard_size=size)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == turbo.config.model_type and config.depthpass == turbo.config.depthpass
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(turbo) and torch.equal(logits(loaded), logits(turbo))
    assert loaded.config.to_dict() == dp.from_pretrained(tmp_path).config.to_dict()
    assert loaded.config.architectures == [type(turbo).__name__]
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again", config=config)), logits(turbo))


def test_loops_and_their_pipelines(loop, tmp_path):
    loop.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), type(loop).from_pretrained(tmp_path),
                   AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")):
        torch.testing.assert_close(logits(loaded)[1, 3:], logits(loop)[1, 3:], rtol=0, atol=1e-5)
    assert (logits(dp.restore(loop)) - logits(loop)).abs().max() > 1e-2
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert pipe.model.depth_spec == loop.depth_spec
    actual = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    assert list(actual) == loop.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_other_auto_classes(tmp_path):
    turbo = turbo_of(stock_of("llama"))
    turbo.save_pretrained(tmp_path)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(head, dp.DepthModel) and head.depth_spec == turbo.depth_spec and head.score.weight.shape == (3, 32)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, dp.DepthModel) and isinstance(base, transformers.LlamaModel)
    with torch.no_grad():
        torch.testing.assert_close(turbo.lm_head(base(**BATCH).last_hidden_state), logits(turbo))
        assert head(**BATCH).logits.shape == (2, 3)
    head.save_pretrained(tmp_path / "head")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(logits(again), logits(head)) and type(dp.from_pretrained(tmp_path / "head")) is type(head)


def test_models_from_a_config(loop):
    torch.manual_seed(0)
    transformed = AutoModelForCausalLM.from_config(loop.config)
    assert isinstance(transformed, dp.DepthModel) and transformed.depth_spec == loop.depth_spec
    assert not isinstance(AutoModelForCausalLM.from_config(dp.restore(loop).config), dp.DepthModel)
    for copied in (copy.deepcopy(loop.config), pickle.loads(pickle.dumps(loop.config))):
        assert copied == loop.config and type(copied) is type(loop.config)
    assert isinstance(loop.config, transformers.LlamaConfig) and type(dp.restore(loop).config) is transformers.LlamaConfig


IN_EITHER_ORDER = """
import sys
path, first = sys.argv[1:]
for name in (first, {"depthpass": "transformers", "transformers": "depthpass"}[first]):
    __import__(name)
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(path)).__mro__[1].__name__)
"""


@pytest.mark.parametrize("first", ["depthpass", "transformers"])
def test_whichever_is_imported_first(loop, first, tmp_path):
    loop.save_pretrained(tmp_path)
    done = fresh(IN_EITHER_ORDER, tmp_path, first)
    assert done.stdout.strip().endswith("DepthModel"), done.stderr


WITHOUT = """
import sys
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
assert len(AutoTokenizer.from_pretrained(sys.argv[1])("w5 w6")["input_ids"]) == 2
for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained,
             lambda p: pipeline("text-generation", model=p)):
    try:
        load(sys.argv[1])
    except Exception as error:
        assert "dp.from_pretrained" in str(error) and "import depthpass" in str(error), error
        print("refused")
assert "depthpass" not in sys.modules
"""


def test_without_depthpass_the_auto_classes_say_what_to_do(loop, tmp_path):
    loop.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    done = fresh(WITHOUT, tmp_path)
    assert done.stdout.split() == ["refused"] * 4, done.stdout + done.stderr


LOUD = """
import sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__mro__[1].__name__)
"""


def test_files_for_stock_code_say_so(loop, tmp_path):
    loop.save_pretrained(tmp_path, stock=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == "llama" and settings["architectures"] == ["LlamaForCausalLM"]
    done = fresh(LOUD, tmp_path)
    assert done.stdout.strip().endswith("LlamaPreTrainedModel"), done.stderr
    assert "load_it_with_dp_from_pretrained" in done.stderr
    for loaded in (dp.from_pretrained(tmp_path), type(loop).from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded), logits(loop)) and loaded.depth_spec == loop.depth_spec
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(base), logits(dp.restore(loop)))
    loop.save_pretrained(tmp_path, stock=True, state_dict=loop.state_dict())
    assert torch.equal(logits(dp.from_pretrained(tmp_path)), logits(loop))


def test_folders_of_earlier_versions_load(tmp_path):
    turbo = turbo_of(stock_of("llama"))
    turbo.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    settings |= settings["depthpass"].pop("stock") | {"architectures": ["LlamaForCausalLM"]}
    file.write_text(json.dumps(settings))
    assert torch.equal(logits(dp.from_pretrained(tmp_path)), logits(turbo))
    assert torch.equal(logits(type(turbo).from_pretrained(tmp_path)), logits(turbo))


class Half(LlamaForCausalLM):
    """A forward of its own."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, use_cache=None,
                **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                              inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        out.logits = out.logits / 2
        return out


def test_a_class_of_ones_own_comes_back_as_itself(tmp_path, monkeypatch):
    turbo = dp.transform(enliven(Half(zoo.config("llama", 3)).eval()), spec())
    enliven(turbo.depth, least=1)
    turbo.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, Half.__module__, sys.modules.get(__name__) or sys.modules[Half.__module__])
    for load in (dp.from_pretrained, AutoModelForCausalLM.from_pretrained, type(turbo).from_pretrained):
        loaded = load(tmp_path)
        assert isinstance(loaded, Half) and torch.equal(logits(loaded), logits(turbo))
    transformed = AutoModelForCausalLM.from_config(turbo.config)
    assert isinstance(transformed, Half)
    monkeypatch.delitem(sys.modules, Half.__module__)
    for load in (dp.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(dp.SpecError, match=r"a class of its own, 'Half' of module .*model_class=YourClass"):
            load(tmp_path)
    assert torch.equal(logits(dp.from_pretrained(tmp_path, model_class=Half)), logits(turbo))
    with pytest.raises(dp.InputError, match="model_class: expected a class"):
        dp.from_pretrained(tmp_path, model_class="Half")


def test_stock_classes_are_refused_by_name(loop, tmp_path):
    loop.save_pretrained(tmp_path)
    for load in (LlamaForCausalLM.from_pretrained, transformers.LlamaConfig.from_pretrained):
        with pytest.raises(Exception, match=r"load it with dp\.from_pretrained, or save it with .*stock=True"):
            load(tmp_path)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapters_trained_on_a_saved_model(task, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

    turbo = turbo_of(stock_of("llama"))
    turbo.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type=task),
    ).eval()
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora" in name:
                p.normal_(0, 0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    want = logits(tuned)
    assert (want - logits(turbo)).abs().max() > 1e-3
    again = PeftModel.from_pretrained(dp.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    if task is None:  # PEFT then loads the base by the name of its stock class
        with pytest.raises(Exception, match=r"dp\.from_pretrained"):
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), want)


def test_what_is_uploaded_is_what_is_saved(loop, tmp_path, monkeypatch):
    seen = {}

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        seen[repo_id] = json.loads((Path(working_dir) / "config.json").read_text())["model_type"]

    monkeypatch.setattr(transformers.utils.PushToHubMixin, "_upload_modified_files", upload, raising=False)
    try:
        from transformers import modeling_utils

        target = next(n for n in ("create_repo", "hf_api") if hasattr(modeling_utils, n))
    except StopIteration:
        pytest.skip("this transformers makes repositories elsewhere")

    class Repo:
        repo_id = "me/mine"

    class Api:
        create_repo = staticmethod(lambda *a, **k: Repo)

    monkeypatch.setattr(modeling_utils, target, (lambda *a, **k: Repo) if target == "create_repo" else (lambda *a, **k: Api))
    card = type("Card", (), {"save": lambda *args: None})
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *args, **kwargs: card())
    loop.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert seen == {"me/mine": MARK}


def test_reports_read_saved_configs(loop, tmp_path):
    loop.save_pretrained(tmp_path)
    assert dp.report(tmp_path, dp.Identity(), seq_len=8).depth_at(8) == 3
    assert PreTrainedConfig.get_config_dict(tmp_path)[0]["model_type"] == MARK


def test_a_config_that_names_no_code_has_an_empty_map_of_it(tmp_path):
    """Libraries read ``config.auto_map`` of every architecture that transformers itself does not have."""
    turbo_of(stock_of("llama")).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == {} and "auto_map" not in config.to_dict() and config == copy.deepcopy(config)
    config.auto_map["AutoModel"] = "code.Model"
    assert config.to_dict()["auto_map"] == config.auto_map == {"AutoModel": "code.Model"}
    assert AutoConfig.from_pretrained(tmp_path).auto_map == {}
