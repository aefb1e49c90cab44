"""Decoders outside the zoo whose code does something unusual: through the inner decoder, on every level, with gradients."""

import pytest
import torch
import zoo
from capture.support_table import FURTHER
from oracle import random_bridges, turboconn_row
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
    transformed = dp.transform(stock, dp.Identity())
    out = transformed(input_ids=IDS, labels=IDS, use_cache=False)
    mine = torch.autograd.grad(out.loss, [p for p in transformed.parameters() if p.requires_grad], allow_unused=True)
    out = stock(input_ids=IDS, labels=IDS, use_cache=False)
    wanted = torch.autograd.grad(out.loss, [p for p in stock.parameters() if p.requires_grad], allow_unused=True)
    with torch.no_grad():
        torch.testing.assert_close(transformed(input_ids=IDS).logits, stock(input_ids=IDS).logits)
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


class Rounded(torch.autograd.Function):
    """Two results, plain arguments, a gradient that is clipped by the value, and one that sums over tokens."""

    @staticmethod
    def forward(ctx, x, scale, bits):
        ctx.save_for_backward(x, scale)
        return (x * 2**bits).round() / 2**bits * scale, x.abs().amax(-1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient, largest):
        x, scale = ctx.saved_tensors
        return gradient * scale * (x.abs() < 1) + 2 * largest, (gradient * x).flatten(0, -2).sum(0), None


class Shifted(torch.autograd.Function):
    """With a context of its own, as functorch wants it."""

    @staticmethod
    def forward(x, y):
        return x.round() + y

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient, gradient


class OfAll(torch.autograd.Function):
    """A backward that looks at all tokens at once."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient.norm()


class Quantized(LlamaMLP):
    def forward(self, x):
        x, largest = Rounded.apply(Shifted.apply(x, x), self.scale, 3)
        return self.down_proj(largest * torch.nn.functional.linear(x, through(self.up_proj.weight)))


class Mixed(LlamaMLP):
    def forward(self, x):
        return super().forward(OfAll.apply(x))


def with_mlp(cls):
    stock = enliven(zoo.model("llama", 3)).double()
    for i, layer in enumerate(stock.model.layers):
        layer.mlp.__class__ = cls
        layer.mlp.scale = torch.nn.Parameter(torch.linspace(0.5, 1 + i, layer.mlp.up_proj.in_features, dtype=torch.float64))
    return stock


@pytest.mark.parametrize("lowering", ["eager", "scheduled"])
def test_functions_with_a_backward_of_their_own(lowering):
    """Straight-through estimators and their like run as they are: gradients are those of the stock model's own code."""
    bridges, ids, positions = [(2, 0)], IDS[:1], torch.arange(IDS.shape[1])[None]
    stock, p = with_mlp(Quantized), random_bridges(32, [(2, 0)], 2)
    for transformed in (dp.transform(stock, dp.Identity()), dp.transform(stock, dp.TurboConn(bridges=bridges, group=2, rank=2),
                                                                  lowering=lowering)):
        new = [p[n] for n, q in transformed.depth.named_parameters() if q.data.copy_(p[n]) is not None]
        trained = [q for n, q in stock.named_parameters() if "gate_proj" not in n]
        if new:
            wanted = turboconn_row(stock, ids[0], positions[0], bridges, 2, 1.0, p)[None]
        else:
            wanted = stock(input_ids=ids, use_cache=False).logits
        logits = transformed(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits).sin()
        got = torch.autograd.grad((logits * weights).sum(), [*trained, *transformed.depth.parameters()])
        want = torch.autograd.grad((wanted * weights).sum(), [*trained, *new])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_a_backward_that_cannot_run_in_parts_is_refused():
    stock = with_mlp(Mixed)
    transformed = dp.transform(stock, dp.TurboConn(bridges=[(1, 0)], group=2, rank=2))
    out = transformed(input_ids=IDS, labels=IDS, use_cache=False)
    torch.testing.assert_close(out.logits, stock(input_ids=IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(dp.UnsupportedModelError, match=r"OfAll is a torch.autograd.Function whose backward .* mixes tokens"):
        out.loss.backward()


@pytest.mark.parametrize("scope", ["forward", "training", "to", "parameters"])
def test_a_scope_that_every_module_has_is_refused(scope):
    stock = zoo.model("llama", 3)
    for spec in (dp.TurboConn(bridges=[(2, 0)], scope=scope), dp.Loop(start=1, end=2, times=2, lora_rank=2, scope=scope)):
        with pytest.raises(SpecError, match=f"scope '{scope}'.*Choose another scope"):
            dp.transform(stock, spec)
    assert not hasattr(stock, "depth")
