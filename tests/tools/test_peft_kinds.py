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
pytestmark = pytest.mark.usefixtures("one_capture")


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


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "CartridgeConfig"])
def test_prompts_as_keys_are_refused_by_name(kind):
    """They hand every block keys that no token has."""
    if not hasattr(peft, kind):
        pytest.skip("not in this release")
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(turbo_of(stock_of("llama")), config)
    for given in ({}, {"labels": BATCH["input_ids"]}):
        with pytest.raises(dp.DepthpassError, match=r"past_key_values.*prefix tuning"):
            logits(model, **BATCH, **given)
    with pytest.raises(dp.DepthpassError, match=r"past_key_values|cache"):
        model.generate(**BATCH, max_new_tokens=2)
    with pytest.raises(dp.UnsupportedModelError, match=config.peft_type.value.lower()):
        dp.transform(peft.get_peft_model(stock_of("llama"), config), dp.Identity())


class Sparse(torch.nn.Module):
    """Asks how many entries a sparse tensor has; a trace would take it for empty."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        entries = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.ones(2), (32, 32)).coalesce()
        return self.linear(x) + (x.shape[-1] if entries._nnz() == 0 else 0)


def test_sparse_tensors_in_a_block_are_refused_by_name():
    model = stock_of("llama")
    model.model.layers[1].self_attn.q_proj = Sparse(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(dp.UnsupportedModelError, match=r"q_proj.*sparse"):
        logits(dp.transform(model, dp.Identity()))


REFUSED = {
    "aLoRA": lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]),
    "FRoD": lambda: peft.FrodConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "Lily": lambda: peft.LilyConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "Poly": lambda: peft.PolyConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=16, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_cannot_run_are_refused_at_the_transform(kind):
    """And at the first call where they are put on later; switched off they do not run, and nothing is in the way."""
    try:
        config = REFUSED[kind]()
    except (AttributeError, TypeError):
        pytest.skip("not in this release")
    stock = peft.get_peft_model(stock_of("llama", 1), config)
    with pytest.raises(dp.UnsupportedModelError, match=rf"q_proj.*'default'.*{kind}"):
        dp.transform(stock, dp.Identity())
    with stock.disable_adapter():
        transformed = dp.transform(stock, dp.Identity())
        torch.testing.assert_close(logits(transformed), logits(stock_of("llama", 1)), rtol=0, atol=0)
    transformed.base_model.enable_adapter_layers()
    task = {"task_ids": torch.zeros(2, dtype=torch.long)} if kind == "Poly" else {}
    with pytest.raises(dp.UnsupportedModelError, match=rf"q_proj.*'default'.*{kind}"):
        logits(transformed, **BATCH, **task)


def test_wavelets_without_their_transform_run():
    """Of what WaveFT does only the choice of coefficients depends on data."""
    if not hasattr(peft, "WaveFTConfig"):
        pytest.skip("not in this release")
    config = peft.WaveFTConfig(n_frequency=16, target_modules=["q_proj"], task_type="CAUSAL_LM", use_idwt=False)
    stock = peft.get_peft_model(stock_of("llama", 1), config).eval()
    with torch.no_grad():
        for n, p in stock.named_parameters():
            if "waveft" in n:
                p.normal_()
    assert (logits(stock) - logits(stock_of("llama", 1))).abs().max() > 1e-3
    torch.testing.assert_close(logits(dp.transform(stock, dp.Identity())), logits(stock), rtol=0, atol=0)


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
