"""What tools put around a model's forward, and own classes: the program runs inside, whatever stands around it."""

import types
import warnings

import pytest
import torch
import zoo
from accelerate.utils import convert_outputs_to_fp32
from transformers import LlamaConfig, LlamaForCausalLM
from turbos import enliven, spec, stock_of, turbo_of

import depthpass as dp

IDS = zoo.batch([9, 9])["input_ids"]
pytestmark = pytest.mark.usefixtures("one_capture")


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("path", ["", "model"])
def test_a_wrapper_around_forward_runs_the_program_inside(warm, path):
    turbo, seen = turbo_of(stock_of("llama")), []
    want = logits(turbo_of(stock_of("llama")))
    if warm:
        logits(turbo)
    module = turbo.get_submodule(path)
    inner = module.forward

    def forward(*args, **kwargs):
        seen.append(sorted(kwargs))
        return inner(*args, **kwargs)

    module.forward = forward
    assert torch.equal(logits(turbo), want) and len(seen) == 1
    assert torch.equal(dp.restore(turbo)(input_ids=IDS).logits, stock_of("llama")(input_ids=IDS).logits) and len(seen) == 1
    tokens = turbo.generate(IDS, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 11) and len(seen) == 3


def test_a_wrapper_may_change_what_goes_in_and_out():
    turbo = turbo_of(stock_of("llama"))
    plain, inner = logits(turbo), turbo.forward

    def forward(*args, **kwargs):
        out = inner(*args, **{**kwargs, "logits_to_keep": 2})
        out.logits = out.logits * 3
        return out

    turbo.forward = forward
    torch.testing.assert_close(logits(turbo), plain[:, -2:] * 3)


def test_mixed_precision_as_accelerate_wraps_it():
    turbo = turbo_of(stock_of("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = logits(turbo)
    turbo._original_forward = turbo.forward
    wrapped = torch.autocast("cpu", dtype=torch.bfloat16)(turbo.forward.__func__)
    turbo.forward = types.MethodType(convert_outputs_to_fp32(wrapped), turbo)
    actual = logits(turbo)
    assert actual.dtype == torch.float32 and torch.equal(actual, want.float())
    assert torch.equal(dp.restore(turbo)(input_ids=IDS).logits, stock_of("llama")(input_ids=IDS).logits)


def test_another_method_as_forward_for_one_call():
    """As Lightning and TRL redirect a method through a wrapper's forward: it calls the decoder itself."""
    turbo = turbo_of(stock_of("llama"))
    original = turbo.forward

    def method(input_ids):
        turbo.forward = original
        return turbo.lm_head(turbo.model(input_ids=input_ids, use_cache=False).last_hidden_state)

    turbo.forward = method
    with torch.no_grad():
        actual = turbo(IDS)
    assert torch.equal(actual, logits(turbo, use_cache=False))


class Named(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
                use_cache=None, **loss_kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                               inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, **loss_kwargs)


class Positional(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Half(LlamaForCausalLM):
    def forward(self, input_ids=None, **rest):
        out = super().forward(input_ids=input_ids, **rest)
        out.logits = out.logits / 2
        return out


class Deaf(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        hidden = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=hidden, **kwargs) if self.training else {"logits": self.lm_head(hidden)}


def own(cls):
    torch.manual_seed(0)
    config = zoo.config("llama", 3).to_dict()
    return enliven(cls(LlamaConfig(**config)).eval())


@pytest.mark.parametrize("cls", [Named, Positional, Half])
def test_a_subclass_with_a_forward_of_its_own(cls):
    stock = own(cls)
    same, turbo = dp.transform(stock, dp.Identity()), turbo_of(stock)
    batch = zoo.batch([7, 5])
    with torch.no_grad():
        for more in ({}, {"labels": batch["input_ids"]}, {"logits_to_keep": 2}):
            a, b = (m(**batch, **more).logits for m in (same, stock))
            real = batch["attention_mask"].bool()[:, -2:] if "logits_to_keep" in more else batch["attention_mask"].bool()
            assert torch.equal(a[real], b[real])
        assert torch.equal(same(IDS).logits, stock(IDS).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(same.generate(**batch, **options), stock.generate(**batch, **options))
    cached, anew = (turbo.generate(**batch, **options, use_cache=u) for u in (True, False))
    assert torch.equal(cached, anew)
    with pytest.raises(dp.InputError, match=r"attention_masks: .*Did you mean 'attention_mask'"):
        turbo(IDS, attention_masks=torch.ones_like(IDS))


def test_a_forward_that_goes_around_the_decoder_is_said():
    turbo = turbo_of(own(Deaf))
    with pytest.raises(dp.UnsupportedModelError, match=r"the forward of Deaf does not call model \(LlamaModel\)"):
        turbo(IDS)


@pytest.mark.compile
@pytest.mark.parametrize("warm", [False, True])
def test_compile_says_that_it_does_nothing_and_export_is_refused(warm):
    turbo = turbo_of(stock_of("llama"))
    if warm:
        logits(turbo)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"torch.export: a transformed LlamaForCausalLM decides in Python"):
            torch.export.export(turbo, (), {"input_ids": IDS}, strict=strict)
    with pytest.raises(dp.UnsupportedModelError, match=r"torch.jit.trace: a transformed LlamaForCausalLM decides"):
        torch.jit.trace(turbo, (IDS,), strict=False)
    with pytest.raises(dp.UnsupportedModelError, match=r"torch.jit.script: a transformed LlamaForCausalLM decides"):
        torch.jit.script(torch.nn.Sequential(turbo))
    with pytest.raises(dp.UnsupportedModelError, match=r"torch.fx: a transformed LlamaForCausalLM decides"):
        torch.fx.symbolic_trace(turbo)
    with pytest.raises(Exception, match=r"pass lowering='inductor'"):
        torch.compile(turbo, fullgraph=True)(input_ids=IDS)
    with pytest.raises(dp.UnsupportedModelError, match=r"torch.fx: a transformed LlamaModel decides"):
        turbo.model(input_ids=torch.fx.Proxy(torch.fx.Graph().placeholder("x")))
    compiled = torch.compile(turbo)
    with pytest.warns(UserWarning, match=r"does nothing to a transformed LlamaForCausalLM: .* lowering='inductor'"):
        actual = compiled(input_ids=IDS).logits
    assert torch.equal(actual, turbo(input_ids=IDS).logits)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does nothing")
        compiled(input_ids=IDS)  # once is enough
        torch.compile(dp.transform(stock_of("llama"), spec(), lowering="inductor").model)(input_ids=IDS[:, :1], use_cache=False)


def test_one_block_object_twice_is_a_layer_program():
    stock = stock_of("llama")
    blocks = stock.model.layers
    stock.model.layers = torch.nn.ModuleList([blocks[0], blocks[1], blocks[1], blocks[2]])
    stock.config.num_hidden_layers = 4
    with pytest.raises(dp.SpecError, match=r"4 entries but 3 different blocks.*dp.LayerProgram\(\[0, 1, 1, 2\]\)"):
        dp.transform(stock, dp.Identity())
    want = stock(input_ids=IDS, use_cache=False).logits
    stock.model.layers, stock.config.num_hidden_layers = blocks, 3
    torch.testing.assert_close(logits(dp.transform(stock, dp.LayerProgram([0, 1, 1, 2]))), want)


@pytest.mark.parametrize("options", [{}, {"schedule": "fixed_point"}], ids=str)
def test_second_derivatives_are_refused_before_they_are_wrong(options):
    stock = stock_of("gpt2", dtype=torch.float64, attn_implementation="eager")  # torch's sdpa has no second derivative
    turbo = dp.transform(stock, spec(), **options)
    enliven(turbo.depth, seed=1, least=1)
    new = dp.new_parameters(turbo)
    with pytest.raises(dp.LoweringError, match=r"create_graph=True: .* lowering='eager'"):
        torch.autograd.grad(turbo(input_ids=IDS, use_cache=False).logits.square().sum(), new, create_graph=True)
    eager = dp.transform(stock, spec(), lowering="eager")
    eager.depth.load_state_dict(turbo.depth.state_dict())
    new, vectors = dp.new_parameters(eager), [torch.randn_like(p) for p in dp.new_parameters(eager)]

    def gradients():
        return torch.autograd.grad(eager(input_ids=IDS, use_cache=False).logits.sin().sum(), new, create_graph=True)

    product = torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradients(), vectors)), new)
    step = 1e-5
    with torch.no_grad():
        [p.add_(v, alpha=step) for p, v in zip(new, vectors)]
    up = gradients()
    with torch.no_grad():
        [p.sub_(v, alpha=2 * step) for p, v in zip(new, vectors)]
    for got, a, b in zip(product, up, gradients()):
        torch.testing.assert_close(got, (a - b) / (2 * step), rtol=1e-3, atol=1e-4)


def test_several_documents_in_a_merge_file():
    for text in ("name: a\nslices: []\n---\nname: b\n", "slices: ["):
        with pytest.raises(dp.SpecError, match=r"mergekit config: expected one (YAML )?document"):
            dp.LayerProgram.from_mergekit(text)
