"""What ``transform`` and ``restore`` leave alone, share and copy."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
import zoo
from torch import nn
from transformers import LlamaForCausalLM
from turbos import enliven, pair, spec, stock_of, turbo_of

import depthpass as dp
from depthpass.errors import SpecError

NAMES = ["llama", "gpt2", "gpt_oss"]
BATCH = zoo.batch([7, 4])
pytestmark = pytest.mark.usefixtures("one_capture")


def logits(model, batch=BATCH):
    with torch.no_grad():
        return model(**batch).logits


def photograph(model):
    """Everything a transform might disturb in a model."""
    return {
        "class": type(model),
        "ids": {n: (id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()},
        "buffers": {n: id(t) for n, t in model.named_buffers()},
        "modules": {n: (id(m), type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")},
        "generation": model.generation_config.to_dict(),
        "forward": model.forward.__func__,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_original_is_untouched(name):
    stock = stock_of(name)
    before, values, outputs = photograph(stock), copy.deepcopy(stock.state_dict()), logits(stock)
    turbo = turbo_of(stock)
    turbo.train()
    turbo(**BATCH, labels=BATCH["input_ids"])
    turbo.eval()
    turbo.generate(**BATCH, max_new_tokens=3)
    turbo.config.use_cache = False
    turbo.generation_config.max_length = 3
    assert photograph(stock) == before
    assert all(torch.equal(v, stock.state_dict()[n]) for n, v in values.items())
    assert torch.equal(logits(stock), outputs)
    assert stock.config.use_cache and not hasattr(stock.config, "depthpass") and not hasattr(stock, "depth")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_shared_and_new_ones_are_apart(name):
    stock = stock_of(name)
    turbo = turbo_of(stock)
    mine, theirs = dict(turbo.named_parameters(remove_duplicate=False)), dict(
        stock.named_parameters(remove_duplicate=False)
    )
    new = {n for n in mine if n.startswith("depth.")}
    assert mine.keys() - new == theirs.keys() and all(mine[n] is p for n, p in theirs.items())
    assert new == {
        f"depth.turboconn.s2_d{d}.{part}.{kind}" for d in (0, 1) for part in ("down", "up") for kind in ("weight", "bias")
    }
    assert set(turbo.state_dict()) == set(stock.state_dict()) | new
    assert {id(p) for p in dp.new_parameters(turbo)} == {id(mine[n]) for n in new}
    for p in dp.new_parameters(turbo):
        assert p.requires_grad and p.dtype == torch.float32
    # One weight, two models.
    with torch.no_grad():
        enliven(stock, seed=9)
    assert torch.equal(logits(dp.restore(turbo)), logits(stock))


def test_the_class_is_the_stock_class():
    stock, turbo = pair("llama")
    assert isinstance(turbo, LlamaForCausalLM) and isinstance(turbo, dp.DepthModel)
    assert type(turbo) is not LlamaForCausalLM and not isinstance(stock, dp.DepthModel)
    assert type(turbo).__name__ == "LlamaForCausalLM" and type(turbo).__module__ == LlamaForCausalLM.__module__
    assert inspect.signature(turbo.forward) == inspect.signature(stock.forward)
    assert type(turbo) is type(turbo_of(stock))
    assert "turboconn" in repr(turbo) and str(turbo.depth) == str(turbo.depth_program)
    assert turbo.get_input_embeddings().weight is stock.get_input_embeddings().weight


@pytest.mark.parametrize("name", NAMES)
def test_restore_gives_the_stock_model_back(name):
    stock = stock_of(name)
    turbo = turbo_of(stock)
    back = dp.restore(turbo)
    assert type(back) is type(stock) and back.config.to_dict() == stock.config.to_dict()
    assert torch.equal(logits(back), logits(stock)) and not torch.equal(logits(turbo), logits(stock))
    assert list(back.state_dict()) == list(stock.state_dict())
    assert all(p is q for p, q in zip(back.parameters(), stock.parameters(), strict=True))
    assert not any("forward" in m.__dict__ for m in back.modules())
    # The transformed model goes on as before, and the stock one can be transformed anew.
    assert isinstance(turbo, dp.DepthModel) and torch.isfinite(logits(turbo)).all()
    again = dp.transform(back, turbo.depth_spec)
    again.depth.load_state_dict(turbo.depth.state_dict())
    assert torch.equal(logits(again), logits(turbo))


def test_what_is_trained_stays_trained():
    stock = stock_of("llama")
    turbo = turbo_of(stock)
    before = logits(stock)
    optimizer = torch.optim.SGD(turbo.parameters(), lr=0.1)
    turbo(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(stock), before)
    assert torch.equal(logits(dp.restore(turbo)), logits(stock))


def test_a_transformed_model_needs_restore_first():
    stock, turbo = pair("llama")
    with pytest.raises(SpecError, match=r"already transformed.*dp.restore\(model\) first.*one list"):
        dp.transform(turbo, spec())
    with pytest.raises(SpecError, match="expected a transformed model, got a stock LlamaForCausalLM"):
        dp.restore(stock)
    with pytest.raises(SpecError, match="config with a depthpass spec"):
        type(turbo)(stock.config)


def test_tied_weights_stay_tied():
    stock = stock_of("llama", tie_word_embeddings=True)
    turbo = turbo_of(stock)
    assert turbo.lm_head.weight is turbo.model.embed_tokens.weight is stock.lm_head.weight
    for copied in (copy.deepcopy(turbo), dp.restore(turbo)):
        assert copied.lm_head.weight is copied.model.embed_tokens.weight


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copied, pickled, saved])
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_copies_are_independent(way, called):
    turbo = turbo_of(stock_of("llama"))
    if called:
        logits(turbo)
    twin = way(turbo)
    assert type(twin) is type(turbo) and twin.depth_program == turbo.depth_program
    assert torch.equal(logits(twin), logits(turbo))
    want = logits(turbo)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(logits(turbo), want) and logits(twin).abs().max() == 0
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in turbo.parameters()}
    assert not {id(m) for m in twin.modules()} & {id(m) for m in turbo.modules()}


def test_state_dicts_go_in_and_out():
    turbo = turbo_of(stock_of("llama"))
    other = turbo_of(enliven(stock_of("llama"), seed=7))
    assert not torch.equal(logits(other), logits(turbo))
    missing = other.load_state_dict(turbo.state_dict(), strict=True)
    assert not missing.missing_keys and torch.equal(logits(other), logits(turbo))


def test_follows_a_change_of_attention_implementation():
    turbo = turbo_of(stock_of("llama"))
    want = logits(turbo)
    turbo.set_attn_implementation("eager")
    seen = []
    attention = inspect.getmodule(LlamaForCausalLM)
    real = attention.eager_attention_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "eager_attention_forward", lambda *a, **k: (seen.append(1), real(*a, **k))[1])
        real_tokens = BATCH["attention_mask"].bool()
        torch.testing.assert_close(logits(turbo)[real_tokens], want[real_tokens], rtol=1e-4, atol=1e-4)
    assert seen
    turbo.config._attn_implementation = "flex_attention"
    with pytest.raises(dp.UnsupportedModelError, match=r"'flex_attention'.*expected one of sdpa, eager"):
        turbo(**BATCH)


def test_resized_embeddings_are_followed():
    turbo = turbo_of(stock_of("llama"))
    want = logits(turbo)
    turbo.resize_token_embeddings(zoo.VOCABULARY + 3)
    got = turbo(**BATCH, labels=BATCH["input_ids"])
    assert got.logits.shape[-1] == zoo.VOCABULARY + 3
    torch.testing.assert_close(got.logits[..., : zoo.VOCABULARY].detach(), want)


def test_a_changed_module_is_captured_again():
    turbo = turbo_of(stock_of("llama"))
    before = logits(turbo)
    layer = turbo.model.layers[1].mlp
    layer.act_fn = nn.GELU()
    stock = dp.restore(turbo)
    again = dp.transform(stock, turbo.depth_spec)
    again.depth.load_state_dict(turbo.depth.state_dict())
    assert torch.equal(logits(turbo), logits(again)) and not torch.equal(logits(turbo), before)


def test_hooks_on_blocks_and_model_run_once():
    stock = stock_of("llama")
    stock.model.layers[1].register_forward_hook(lambda module, args, out: out + 1)
    stock.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "logits_to_keep": 2}), with_kwargs=True)
    same = dp.transform(stock, dp.Identity())
    assert torch.equal(logits(same)[:, 1:], logits(stock)[:, 1:]) and logits(same).shape[1] == 2
    turbo, seen = turbo_of(stock_of("llama")), []
    plain = logits(turbo)
    for block in turbo.model.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    # Hooks need module calls, which the eager level makes; it multiplies in another order.
    with pytest.warns(UserWarning, match=r"block 1 were called 3 times .* chunks of 3\). What a hook sees is one visit of one"):
        torch.testing.assert_close(logits(turbo), plain)
    assert seen == [(2, 7, 32)] + 2 * [(2, 3, 32)] + 2 * [(2, 3, 32)] + 2 * [(2, 1, 32)]
    turbo.model.layers[0].register_forward_hook(lambda module, args, out: out * 0)
    assert not torch.equal(logits(turbo), plain)


def test_a_patched_forward_is_refused():
    for path in ("", "model.layers.1"):
        stock = stock_of("llama")
        module = stock.get_submodule(path)
        module.forward = functools.partial(type(module).forward, module)
        with pytest.raises(dp.UnsupportedModelError, match=f"this {type(module).__name__} has a forward of its own"):
            dp.transform(stock, spec())
