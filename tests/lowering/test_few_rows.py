"""Products and attention of a decoded token, written out for the compiler, against torch's own in float32."""

import pytest
import torch
import torch.nn.functional as F
from depthpass_lowering.executors.token import _attention
from depthpass_lowering.fx_passes.few_rows import few_rows_pass
from depthpass_lowering.products import rows as row_products
from torch.fx.experimental.proxy_tensor import make_fx
from turbos import transformed

import depthpass as dp
from depthpass.hf.calls.head import apply_head
from depthpass.hf.calls.head_input import HeadInput, bare, taken


@pytest.mark.parametrize(("rows", "dtype", "bias", "count"), [
    (1, torch.bfloat16, False, 2), (2, torch.bfloat16, True, 2), (4, torch.float16, False, 2),
    (5, torch.bfloat16, False, 0), (1, torch.float32, True, 0),
])
def test_products_of_a_few_rows_are_written_out(rows, dtype, bias, count):
    torch.manual_seed(0)
    x = torch.randn(rows, 1, 128, dtype=dtype)
    weights = [torch.randn(192, 128, dtype=dtype), torch.randn(128, 192, dtype=dtype), torch.randn(8, 128, dtype=dtype)]
    biases = [torch.randn(w.shape[0], dtype=dtype) if bias else None for w in weights]

    def net(x):
        h = F.linear(x, weights[0], biases[0])
        return F.linear(torch.tanh(h), weights[1], biases[1]), F.linear(x, weights[2], biases[2])  # the last one is too small

    with torch.no_grad():
        graph = make_fx(net, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        assert few_rows_pass(graph) == count
        found = graph(x)

        def right(x, i):
            return F.linear(x, weights[i].float(), None if biases[i] is None else biases[i].float())

        h = torch.tanh(right(x.float(), 0).to(dtype))
        wanted = right(h.float(), 1), right(x.float(), 2)
    for got, want in zip(found, wanted):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_of_a_few_queries_equals_sdpa(batch):
    torch.manual_seed(0)
    q, k, v = torch.randn(batch, 2, 4, 8), torch.randn(batch, 2, 11, 8), torch.randn(batch, 2, 11, 6)
    seen = torch.rand(batch, 1, 1, 11) < 0.6
    seen[..., 5] = True
    torch.testing.assert_close(
        _attention(q, k, v, seen, 0.3), F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3), rtol=1e-5, atol=1e-6
    )


def test_a_large_product_outside_of_a_graph():
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, dtype=torch.bfloat16) for s in ((2, 1, 1024), (1031, 1024), (1031,)))
    with torch.no_grad():
        assert row_products.fits(x, w, b)
        for a, c in ((x.float(), w.float()), (x.expand(2, 3, -1), w), (x, w[:512]), (x, torch.randn(1024, 1031).bfloat16().t())):
            assert not row_products.fits(a, c, None)
        assert not row_products.fits(x, w, b[:1].expand(1031)), "a bias that the compiled code would read with other strides"
        got = row_products.few_rows_product(x, w, b)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), F.linear(x.float(), w.float(), b.float()), rtol=1e-2, atol=0.3)
    assert not row_products.fits(x, w, b), "gradients are wanted"


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_stock_heads_of_a_compiled_token(name, monkeypatch):
    """Soft-capped, and with a bias: stock code multiplies what a compiled token hands it, and sees plain tensors otherwise."""
    made = []
    monkeypatch.setattr(row_products, "LEAST", 1)
    monkeypatch.setattr(row_products, "few_rows_product", lambda *given: made.append(given) or F.linear(*given))
    model = transformed(name, dp.Identity(), torch.bfloat16)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]))
        (captured,) = model._depth.captures.values()
        normed = torch.randn(2, 1, model.config.hidden_size, dtype=torch.bfloat16)
        for more in ({}, {"logits_to_keep": 1}):
            arguments = {"input_ids": torch.zeros(2, 1, dtype=torch.long), **more}
            got = bare(apply_head(model, captured, normed.as_subclass(HeadInput), arguments))
            assert type(got.logits) is torch.Tensor
            assert torch.equal(got.logits, apply_head(model, captured, normed, arguments).logits)
    assert len(made) == 2 and all(type(x) in (torch.Tensor, torch.nn.Parameter) for given in made for x in given if x is not None)
    assert taken(model, model.model)
    for seeing in (model.lm_head, model.model):  # plain tensors for whoever looks at them
        hook = seeing.register_forward_hook(lambda module, args, out: None)
        assert not taken(model, model.model)
        hook.remove()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert not taken(model, model.model)
