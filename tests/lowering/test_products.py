"""Packed products against plain ones, alone and inside a token loop."""

import pytest
import torch
import zoo
from depthpass_lowering import products
from depthpass_lowering.products import Products, contraction

import depthpass as dp


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(3, 256), (2, 5, 256)])
def test_products_equal_float64(dtype, tolerance, shape):
    torch.manual_seed(0)
    w, b = torch.randn(192, 256, dtype=dtype), torch.randn(192, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    loop = Products(uses=8)
    for got, want in (
        (loop.linear(x, w, b), x.double() @ w.double().t() + b.double()),
        (loop.linear(x, w), x.double() @ w.double().t()),
        (loop.transposed(x, w.t().contiguous(), b), x.double() @ w.double().t() + b.double()),
        (contraction(x.reshape(-1, 256), x.reshape(-1, 256)), x.double().flatten(0, -2).t() @ x.double().flatten(0, -2)),
    ):
        assert got.dtype == dtype and got.is_contiguous()
        assert ((got.double() - want).norm() / want.norm()) < tolerance


def test_weights_are_packed_only_where_it_pays_and_follow_the_loop():
    w, x = torch.randn(256, 256), torch.randn(4, 256)
    for uses, big in ((products.LEAST_USES, w), (products.LEAST_USES - 1, w), (products.LEAST_USES, w[:8, :8])):
        loop = Products(uses)
        loop.linear(x[:, : big.shape[1]], big)
        assert bool(loop._packed) == (uses >= products.LEAST_USES and big is w)
    loop = Products(uses=9)
    before = loop.linear(x, w)
    loop.forget()
    assert torch.allclose(loop.linear(x, w * 2), 2 * before)
    # Both directions of one weight are different products.
    assert not torch.allclose(loop.linear(x, w), loop.transposed(x, w))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_token_loop_on_packed_weights_equals_float64(arch):
    """Large enough that weights are packed; every gradient against the eager rung in float64."""
    stock = zoo.model(arch, 3, **({"n_embd": 192, "n_inner": 256} if arch == "gpt2" else
                                  {"hidden_size": 192, "intermediate_size": 256}))
    spec = dp.TurboConn(bridges=[(2, 0)], group=2, rank=24)
    batch = zoo.batch([13, 9])
    found = []
    for dtype, lowering in ((torch.float64, "eager"), (torch.float32, "scheduled")):
        turbo = dp.transform(stock.to(dtype), spec, lowering=lowering)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in turbo.depth.parameters():
                p.copy_(0.1 * torch.randn(p.shape))
        turbo.zero_grad()
        out = turbo(**batch, labels=batch["input_ids"], use_cache=False)
        out.loss.backward()
        found.append((out.logits.detach(), {n: p.grad.clone() for n, p in turbo.named_parameters() if p.grad is not None}))
    (logits, grads), (logits32, grads32) = found
    assert torch.allclose(logits32.double(), logits, atol=1e-4)
    assert grads32.keys() == grads.keys()
    for name, g in grads.items():
        assert (grads32[name].double() - g).norm() <= 1e-4 * g.norm() + 1e-7, name
