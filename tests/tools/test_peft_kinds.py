"""PEFT's other adapters: DoRA runs the program with its weights, prompts in front of the row run it over them, too."""

import gc

import pytest
import torch
import zoo
from turbos import enliven, stock_of

import depthpass as dp
from tests.tools.conftest import SPEC

peft = pytest.importorskip("peft")
BATCH = zoo.batch([8, 8])


def turbo_of(stock):
    model = dp.transform(stock, SPEC).eval()
    enliven(model.depth, seed=1, least=1)
    return model


def randomized(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n or "prompt_" in n:
                scale = 0.2
                p.copy_(p + torch.rand(p.shape, generator=generator) * scale if "magnitude" in n
                        else torch.randn(p.shape, generator=generator) * scale)
    return model.eval()


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or BATCH)).logits


@pytest.mark.parametrize("order", ["before", "after"])
def test_dora_equals_its_merged_weights(order):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM")
    want = logits(turbo_of(randomized(peft.get_peft_model(stock_of("llama"), config)).merge_and_unload()))
    if order == "before":
        # The adapters are random before the transform, the bridges after it.
        wrapped = randomized(peft.get_peft_model(stock_of("llama"), config))
        model = dp.transform(wrapped, SPEC).eval()
        enliven(model.get_base_model().depth, seed=1, least=1)
    else:
        model = randomized(peft.get_peft_model(turbo_of(stock_of("llama")), config))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert (want - logits(turbo_of(stock_of("llama")))).abs().max() > 1e-2


def test_prompt_tuning_puts_its_tokens_in_front_of_the_program():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    turbo = turbo_of(stock_of("llama"))
    model = randomized(peft.get_peft_model(turbo, config))
    prompt = model.get_prompt(batch_size=2).detach()
    embeds = torch.cat((prompt, turbo.get_input_embeddings()(BATCH["input_ids"])), 1).detach()
    got, want = logits(model), logits(turbo, inputs_embeds=embeds)
    torch.testing.assert_close(got, want[:, -got.shape[1]:], rtol=1e-4, atol=1e-4)
    assert (got[:, -1] - logits(turbo)[:, -1]).abs().max() > 1e-3
    model.train()
    out = model(**BATCH, labels=BATCH["input_ids"])
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "prompt_" in n)


def test_prompts_as_keys_are_refused_by_name():
    """Prefix tuning hands every block keys that no token has."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(turbo_of(stock_of("llama")), config)
    for given in ({}, {"labels": BATCH["input_ids"]}):
        with pytest.raises(dp.DepthpassError, match=r"past_key_values|cache"):
            logits(model, **BATCH, **given)
    with pytest.raises(dp.DepthpassError, match=r"past_key_values|cache"):
        model.generate(**BATCH, max_new_tokens=2)


@pytest.mark.skipif(not hasattr(peft, "FrodConfig"), reason="not in this release")
def test_sparse_tensors_in_a_block_are_refused_by_name():
    """FRoD asks how many entries its sparse factor has; a trace would take it for empty."""
    model = peft.get_peft_model(stock_of("llama"), peft.FrodConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    transformed = dp.transform(model, dp.Identity())
    with pytest.raises(dp.UnsupportedModelError, match=r"q_proj.*sparse"):
        logits(transformed)
    with transformed.disable_adapter():
        torch.testing.assert_close(logits(transformed), logits(stock_of("llama")))


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_the_parameters_of_experts(order):
    """``target_parameters`` computes the experts' weights anew in each call: the experts run whole, their adapters included."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    stock = randomized(peft.get_peft_model(stock_of("mixtral", 2), config))
    transformed = randomized(peft.get_peft_model(dp.transform(stock_of("mixtral", 2), dp.Identity()), config)) \
        if order == "after" else dp.transform(stock, dp.Identity())
    assert (logits(stock) - logits(stock_of("mixtral", 2))).abs().max() > 1e-2
    grads = []
    for model in (transformed, stock):
        out = model(**BATCH, labels=BATCH["input_ids"], use_cache=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        grads.append((out.logits, *torch.autograd.grad(out.loss, trained)))
    assert len(grads[0]) == 13 and all(g.abs().sum() > 0 for g in grads[1])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)
    plain = logits(transformed)
    transformed.merge_adapter()
    torch.testing.assert_close(logits(transformed), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [
    peft.RandLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    peft.VBLoRAConfig(vector_length=8, num_vectors=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    peft.HRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),  # reads the weight as .data
    peft.OSFConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),  # hooks on parameters, taken off by __del__
    peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
], ids=lambda c: type(c).__name__)
def test_adapters_that_share_tensors_between_blocks(config):
    """Every block has its own adapter on bases of all: none may be taken for a repetition of the first."""
    stock = peft.get_peft_model(stock_of("llama", 3), config).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for p in stock.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    transformed = dp.transform(stock, dp.Identity())
    assert (logits(stock) - logits(stock_of("llama", 3))).abs().max() > 1e-3
    results = []
    for model in (transformed, stock):
        model(**BATCH, labels=BATCH["input_ids"], use_cache=False)
        gc.collect()
        out = model(**BATCH, labels=BATCH["input_ids"], use_cache=False)
        results.append((out.logits, *torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
