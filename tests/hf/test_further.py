"""Decoders outside the zoo whose code does something unusual: through the inner decoder, on every level, with gradients."""

import pytest
import torch
import zoo
from capture.support_table import FURTHER
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from turbos import enliven

import depthpass as dp
from depthpass.errors import SpecError

IDS = zoo.batch([9, 9], seed=5)["input_ids"]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DOTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}


def stock_of(name):
    torch.manual_seed(0)
    if name in FURTHER:
        return enliven(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FURTHER[name])).eval(), std=0.1)
    return enliven(zoo.model(name, 3, **{"phimoe": MOE, "dots1": DOTS, "qwen2_moe": QWEN}[name]), std=0.1)


# ctrl assigns its table of positions to itself, deepseek_v3 writes keys in two halves, phimoe and dots1 hold constants, qwen2_moe
# makes a mask of an empty window that no layer reads.
@pytest.mark.parametrize("name", ["ctrl", "deepseek_v3", "phimoe", "dots1", "qwen2_moe"])
def test_numbers_and_gradients(name):
    stock = stock_of(name)
    made = dp.transform(stock, dp.Identity())
    out = made(input_ids=IDS, labels=IDS, use_cache=False)
    mine = torch.autograd.grad(out.loss, [p for p in made.parameters() if p.requires_grad], allow_unused=True)
    out = stock(input_ids=IDS, labels=IDS, use_cache=False)
    wanted = torch.autograd.grad(out.loss, [p for p in stock.parameters() if p.requires_grad], allow_unused=True)
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    for (path, _), a, b in zip(stock.named_parameters(), mine, wanted, strict=True):
        if a is not b:
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", ["phimoe", "dots1"])
def test_the_scheduled_loop_without_gradients(name):
    stock = stock_of(name)
    spec = dp.TurboConn(bridges=[(2, 0)], group=2, rank=4)
    eager, scheduled = (dp.transform(stock, spec, lowering=level) for level in ("eager", "scheduled"))
    enliven(eager.depth, seed=1, least=1)
    scheduled.depth.load_state_dict(eager.depth.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(scheduled(input_ids=IDS).logits, eager(input_ids=IDS).logits)


class Through(torch.autograd.Function):
    """The sign forwards, the identity backwards."""

    @staticmethod
    def forward(ctx, weight):
        return weight.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


through = Through.apply  # as torch's own examples name it


class Signs(LlamaMLP):
    def forward(self, x):
        return self.down_proj(torch.nn.functional.linear(x, through(self.up_proj.weight)))


class Detached(LlamaMLP):
    def forward(self, x):
        weight = self.up_proj.weight
        return self.down_proj(torch.nn.functional.linear(x, weight + (weight.sign() - weight).detach()))


def with_mlp(cls):
    stock = enliven(zoo.model("llama", 2))
    for layer in stock.model.layers:
        layer.mlp.__class__ = cls
    return stock


def test_a_backward_of_its_own_is_refused_where_it_would_be_lost():
    """Captured is what its forward computes: right without gradients, and wrong gradients otherwise, in silence."""
    stock = with_mlp(Signs)
    made = dp.transform(stock, dp.TurboConn(bridges=[(1, 0)], group=2, rank=2))
    out = made(input_ids=IDS, labels=IDS, use_cache=False)
    torch.testing.assert_close(out.logits, stock(input_ids=IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(dp.UnsupportedModelError, match=r"Through is a torch.autograd.Function with a backward of its own"):
        out.loss.backward()
    models = with_mlp(Detached), dp.transform(with_mlp(Detached), dp.Identity())
    want, got = (torch.autograd.grad(m(input_ids=IDS, labels=IDS, use_cache=False).loss, m.model.layers[0].mlp.up_proj.weight)
                 for m in models)
    torch.testing.assert_close(got, want)
    oracle = torch.autograd.grad(stock(input_ids=IDS, labels=IDS, use_cache=False).loss, stock.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(got, oracle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["forward", "training", "to", "parameters"])
def test_a_scope_that_every_module_has_is_refused(scope):
    stock = zoo.model("llama", 3)
    for spec in (dp.TurboConn(bridges=[(2, 0)], scope=scope), dp.Loop(start=1, end=2, times=2, lora_rank=2, scope=scope)):
        with pytest.raises(SpecError, match=f"scope '{scope}'.*Choose another scope"):
            dp.transform(stock, spec)
    assert not hasattr(stock, "depth")
