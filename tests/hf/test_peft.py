"""LoRA around and inside a transformed model."""

import copy
import warnings

import pytest
import torch
import zoo
from safetensors.torch import load_file
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version
from turbos import enliven, pair, spec, stock_of, turbo_of

import depthpass as dp
from depthpass.errors import InputError, SpecError

peft = pytest.importorskip("peft")

BATCH = zoo.batch([8, 5])
LABELS = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)
pytestmark = pytest.mark.usefixtures("one_capture")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "mixtral": ["q_proj", "o_proj"]}


def lora(name="llama", **more):
    return peft.LoraConfig(**{
        "r": 4, "lora_alpha": 8, "target_modules": TARGETS[name], "task_type": "CAUSAL_LM", "fan_in_fan_out": name == "gpt2",
        **more,
    })


def randomize(model):
    """Adapters that do something: LoRA's B is zero at first."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def close(got, want):
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


def before(name="llama"):
    """LoRA first, then the transform."""
    return turbo_of(randomize(peft.get_peft_model(stock_of(name), lora(name)))).eval()


def after(name="llama", **more):
    """The transform first, then LoRA."""
    return randomize(peft.get_peft_model(turbo_of(stock_of(name)), lora(name, modules_to_save=["depth"], **more))).eval()


def merged(name="llama"):
    """The same numbers without PEFT at run time: LoRA merged into the stock weights first."""
    stock = randomize(peft.get_peft_model(stock_of(name), lora(name))).merge_and_unload()
    return turbo_of(stock).eval()


@pytest.mark.parametrize(("adapted", "name"), [(before, "llama"), (after, "llama"), (before, "gpt2"), (after, "mixtral")])
def test_trains_together_with_the_bridges(adapted, name):
    model = adapted(name)
    assert isinstance(model, peft.PeftModel) and isinstance(model.get_base_model(), dp.DepthModel)
    want = logits(merged(name))
    close(logits(model), want)
    assert (logits(model) - logits(pair(name)[1])).abs().max() > 1e-2
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "depth" in n for n in trainable)
    assert {"down", "up"} <= {n.split(".")[-2] for n in trainable} and any("lora_A" in n for n in trainable)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**BATCH, labels=LABELS).loss
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in trainable and "shared" not in n)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_peft_model_is_untouched_by_the_transform():
    model = randomize(peft.get_peft_model(stock_of("llama"), lora())).eval()
    want, keys = logits(model), list(model.state_dict())
    turbo = turbo_of(model)
    assert type(turbo) is type(model) and torch.equal(logits(model), want) and list(model.state_dict()) == keys
    assert not isinstance(model.get_base_model(), dp.DepthModel)
    ours = dict(turbo.named_parameters())
    assert all(ours[n] is p for n, p in model.named_parameters())
    back = dp.restore(turbo)
    assert isinstance(back, peft.PeftModel) and not isinstance(back.get_base_model(), dp.DepthModel)
    assert torch.equal(logits(back), want) and list(back.state_dict()) == keys
    with pytest.raises(SpecError, match="already transformed"):
        dp.transform(turbo, spec())


def test_a_frozen_transform_is_warned_of():
    model = peft.get_peft_model(turbo_of(stock_of("llama")), lora()).train()
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".depth." in n)
    with pytest.warns(UserWarning, match=r"frozen .*modules_to_save=\['depth'\]"):
        model(**BATCH, labels=LABELS)
    for p in dp.new_parameters(model):
        p.requires_grad_(True)
    model(**BATCH, labels=LABELS).loss.backward()
    assert all(p.grad is not None for p in dp.new_parameters(model))


@pytest.mark.parametrize("adapted", [before, after])
def test_adapters_are_switched_off_and_on(adapted):
    model = adapted()
    on = logits(model)
    with torch.no_grad():
        for n, p in model.named_parameters():  # what modules_to_save has trained is switched off with the adapter
            if "modules_to_save" in n:
                p.mul_(2)
    moved = logits(model)
    assert torch.equal(on, moved) == (adapted is before)
    with model.disable_adapter():
        close(logits(model), logits(pair("llama")[1]))
    assert torch.equal(logits(model), moved)


@pytest.mark.parametrize("adapted", [before, after])
def test_merges_into_a_plain_transformed_model(adapted, tmp_path):
    model = adapted()
    want = logits(model)
    model.merge_adapter()  # fills a list that was empty when the model was captured
    close(logits(model), want)
    model.unmerge_adapter()
    close(logits(model), want)
    plain = model.merge_and_unload()
    assert isinstance(plain, dp.DepthModel) and not isinstance(plain, peft.PeftModel)
    close(logits(plain), want)
    assert set(plain.state_dict()) == set(pair("llama")[1].state_dict())
    plain.save_pretrained(tmp_path)
    close(logits(dp.from_pretrained(tmp_path)), want)


def test_generates_in_its_wrapper():
    for model in (before(), after()):
        options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
        want = merged().generate(**BATCH, **options)
        assert torch.equal(model.generate(**BATCH, **options), want)
        assert torch.equal(model.generate(**BATCH, **options, use_cache=False), want)
        assert torch.equal(
            model.generate(**BATCH, **options, num_beams=2), model.generate(**BATCH, **options, num_beams=2, use_cache=False)
        )
        cache = dp.DepthCache(model)
        with torch.no_grad():
            model(input_ids=BATCH["input_ids"][:1, :5], past_key_values=cache)
            got = model(input_ids=BATCH["input_ids"][:1, 5:], past_key_values=cache).logits
            whole = model(input_ids=BATCH["input_ids"][:1]).logits
        torch.testing.assert_close(got, whole[:, 5:], rtol=1e-4, atol=1e-4)


def test_an_adapter_is_saved_with_its_bridges(tmp_path):
    model = after()
    turbo = pair("llama")[1]
    with torch.no_grad():
        for p in dp.new_parameters(model):
            p.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    turbo.save_pretrained(tmp_path / "model")
    again = peft.PeftModel.from_pretrained(dp.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SpecError, match="PEFT adapter"):
        dp.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_that_was_there_before_is_saved_with_its_bridges(tmp_path, name):
    """PEFT writes what it has added itself: bridges of a later transform stood in no file."""
    model = turbo_of(randomize(peft.get_peft_model(stock_of("llama"), lora(), adapter_name=name))).eval()
    with torch.no_grad():
        for p in dp.new_parameters(model):
            p.add_(0.1)
    want = logits(model)
    copy.deepcopy(model).save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    fresh = dp.transform(stock_of("llama"), spec())  # its own bridges are zero
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, folder, adapter_name=name)), want)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # as in a process that has not transformed anything
        peft.PeftModel.from_pretrained(stock_of("llama"), folder, adapter_name=name)
    assert any("['depthpass']" in str(w.message) for w in said)
    back = dp.transform(peft.get_peft_model(stock_of("llama"), lora(), adapter_name=name), spec())
    back.load_adapter(folder, name)  # as a Trainer goes on from a checkpoint
    assert torch.equal(logits(back), want)
    with pytest.raises(InputError, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    dp.restore(model).save_pretrained(tmp_path / "stock")
    written = load_file(tmp_path / "stock" / ("" if name == "default" else name) / "adapter_model.safetensors")
    assert written and not any("depth" in key for key in written)


def test_an_adapter_of_transformers_own_is_saved_with_its_bridges(tmp_path):
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))
    stock = stock_of("llama")
    stock.add_adapter(lora(), adapter_name="mine")
    model = turbo_of(randomize(stock)).eval()
    want = logits(model)
    model.save_pretrained(tmp_path)
    fresh = dp.transform(stock_of("llama"), spec())
    fresh.load_adapter(tmp_path, adapter_name="mine")
    assert torch.equal(logits(fresh), want)
    for p in dp.new_parameters(model):  # of a base that has its bridges in files of its own
        p.requires_grad_(False)
    model.save_pretrained(tmp_path / "frozen")
    assert not any("depth" in key for key in load_file(tmp_path / "frozen" / "adapter_model.safetensors"))


def test_two_adapters_have_their_own_bridges():
    model = after()
    first = logits(model)
    model.add_adapter("other", lora(modules_to_save=["depth"]))
    model.set_adapter("other")
    close(logits(model), logits(pair("llama")[1]))  # a fresh LoRA does nothing, and copies the bridges
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "modules_to_save.other" in n:
                p.zero_()
    zero = logits(model)
    close(zero, logits(pair("llama")[0]))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_lora_on_the_bridges_themselves():
    model = peft.get_peft_model(turbo_of(stock_of("llama")), lora(target_modules="all-linear"))
    assert sum("depth" in n and "lora_B" in n for n, _ in model.named_parameters()) == 4
    plain = logits(model)
    close(plain, logits(pair("llama")[1]))
    randomize(model)
    assert (logits(model) - plain).abs().max() > 1e-2
    model.train()(**BATCH, labels=LABELS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "depth" in n and "lora_B" in n)


def test_lora_with_checkpoints_and_dropout():
    model = peft.get_peft_model(turbo_of(stock_of("llama")), lora(lora_dropout=0.3, modules_to_save=["depth"])).train()
    randomize(model)

    def step():
        model.zero_grad()
        torch.manual_seed(0)
        model(**BATCH, labels=LABELS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = step()
    model.get_base_model().gradient_checkpointing_enable()
    for n, g in step().items():
        torch.testing.assert_close(g, want[n], rtol=1e-4, atol=1e-6)


def test_mixed_adapter_batches_are_refused():
    model = after().eval()
    model.add_adapter("other", lora(modules_to_save=["depth"]))
    with pytest.raises((dp.UnsupportedModelError, ValueError), match=r"hook|adapter_names"):
        model(**BATCH, adapter_names=["default", "other"])


def test_a_restored_peft_model_after(tmp_path):
    model = after()
    back = dp.restore(model)
    assert not isinstance(back.get_base_model(), dp.DepthModel)
    stock = randomize(peft.get_peft_model(enliven(stock_of("llama")), lora()))
    close(logits(back), logits(stock))
