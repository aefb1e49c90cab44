"""Products and attention of a decoded token on a CPU against torch's own in float32."""

import pytest
import torch
import torch.nn.functional as F
from depthpass_kernels.few_rows import build
from depthpass_kernels.few_rows.api import few_queries_attention, few_rows_product
from depthpass_kernels.few_rows.pages import HUGE, on_huge_pages
from depthpass_lowering.fx_passes.few_rows import few_rows_pass
from depthpass_lowering.products import rows as row_products
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from turbos import transformed

import depthpass as dp
from depthpass.hf.calls.head import apply_head
from depthpass.hf.calls.head_input import HeadInput, bare, taken


@pytest.mark.parametrize(("rows", "dtype", "bias", "count"), [
    (1, torch.bfloat16, False, 2), (2, torch.bfloat16, True, 2), (4, torch.float16, False, 2),
    (5, torch.bfloat16, False, 0), (1, torch.float32, True, 0),
])
def test_products_of_a_few_rows_are_replaced(rows, dtype, bias, count):
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
        actual = graph(x)

        def right(x, i):
            return F.linear(x, weights[i].float(), None if biases[i] is None else biases[i].float())

        h = torch.tanh(right(x.float(), 0).to(dtype))
        wanted = right(h.float(), 1), right(x.float(), 2)
    for got, want in zip(actual, wanted):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner"), [(1, 1), (1, 200), (2, 256), (3, 131), (4, 97)])
def test_products(rows, inner, dtype):
    """Widths that fill no vector, or not the last one."""
    torch.manual_seed(rows)
    x, w, b = (torch.randn(*s).to(dtype) for s in ((rows, 1, inner), (37, inner), (37,)))
    with torch.no_grad():
        for bias in (None, b):
            got, wanted = few_rows_product(x, w, bias), F.linear(x.double(), w.double(), None if bias is None else bias.double())
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "dim", "width"), [(1, 64, 64), (3, 40, 24), (2, 8, 33)])
def test_attention_of_a_few_queries(batch, dim, width, dtype):
    torch.manual_seed(batch)
    q, k, v = (torch.randn(batch, 2, n, d).to(dtype) for n, d in ((4, dim), (11, dim), (11, width)))
    for masks in {1, batch}:
        seen = torch.rand(masks, 1, 1, 11) < 0.6
        seen[..., 5] = True
        wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen, scale=0.3)
        unseen = ~seen.any(0).flatten()[None, None, :, None]  # columns that are not read
        with torch.no_grad():
            got = few_queries_attention(q, k.masked_fill(unseen, float("nan")), v.masked_fill(unseen, float("nan")), seen, 0.3)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-2)


def test_operands_that_are_refused():
    x, w = torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    k, seen = torch.randn(1, 2, 3, 8).bfloat16(), torch.ones(1, 1, 1, 3, dtype=torch.bool)
    for call, what in (
        (lambda: few_rows_product(x.float(), w.float()), "half-precision"),
        (lambda: few_rows_product(x, w.half()), "half-precision"),
        (lambda: few_rows_product(x, w[:, :7]), "out, in"),
        (lambda: few_rows_product(x.repeat(3, 1), w), "1 to 4 rows"),
        (lambda: few_rows_product(x, w, w[0]), "a bias of 4"),
        (lambda: few_rows_product(x, w.t().contiguous().t()), "contiguous"),
        (lambda: few_rows_product(x, w.requires_grad_()), "no gradient"),
        (lambda: few_queries_attention(k, k, k, seen[0], 1.0), "seen"),
        (lambda: few_queries_attention(k, k, k, seen.float(), 1.0), "boolean"),
    ):
        with pytest.raises(ValueError, match=what):
            call()


def test_without_a_compiler_the_library_multiplies(monkeypatch):
    monkeypatch.setattr(build, "load", lambda name, dtype: OSError("no compiler"))
    assert build.obstacle(torch.bfloat16) == "OSError: no compiler"
    x, w = torch.randn(1, 128).bfloat16(), torch.randn(192, 128).bfloat16()
    with torch.no_grad():
        graph = make_fx(lambda x: F.linear(x, w), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        assert few_rows_pass(graph) == 0
        assert torch.equal(graph(x), F.linear(x, w))


def test_huge_pages_change_no_value():
    """However many the system grants: none on some."""
    w = torch.arange(3 * HUGE, dtype=torch.int32)
    at, before = w.data_ptr(), w.clone()
    assert 0 <= on_huge_pages([w, torch.ones(3), TwoTensor(torch.ones(2), torch.ones(2)), torch.eye(2).to_sparse()]) <= w.nbytes
    assert w.data_ptr() == at and torch.equal(w, before)


def test_which_products_outside_of_a_graph():
    x, w, b = (torch.randn(*s, dtype=torch.bfloat16) for s in ((2, 1, 1024), (1031, 1024), (1031,)))
    with torch.no_grad():
        assert row_products.fits(x, w, b)
        for a, c in ((x.float(), w.float()), (x.expand(2, 3, -1), w), (x, w[:512]), (x, torch.randn(1024, 1031).bfloat16().t())):
            assert not row_products.fits(a, c, None)
        assert not row_products.fits(x, w, b[:1].expand(1031)), "a bias with other strides"
    assert not row_products.fits(x, w, b), "gradients are wanted"


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_stock_heads_of_a_compiled_token(name, monkeypatch):
    """Soft-capped, and with a bias: stock code multiplies what a compiled token hands it, and sees plain tensors otherwise."""
    calls = []
    monkeypatch.setattr(row_products, "LEAST", 1)
    monkeypatch.setattr(row_products, "few_rows_product", lambda *given: calls.append(given) or F.linear(*given))
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
    assert len(calls) == 2 and all(type(x) in (torch.Tensor, torch.nn.Parameter) for c in calls for x in c if x is not None)
    assert taken(model, model.model)
    for seeing in (model.lm_head, model.model):  # plain tensors for whoever looks at them
        hook = seeing.register_forward_hook(lambda module, args, out: None)
        assert not taken(model, model.model)
        hook.remove()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert not taken(model, model.model)
