"""Attention of a chunk on a CPU, compiled and in torch's ops, against softmax attention written out, in float64."""

import pytest
import torch
from depthpass_kernels import cpp
from depthpass_kernels.slot_attention import chunk, chunk_cpp
from torch import Tensor

compiled = pytest.param(
    "compiled", marks=pytest.mark.skipif(
        isinstance(cpp.build(chunk_cpp.ARGUMENTS, chunk_cpp.SOURCE), Exception), reason="no compiler, or no AVX2"
    ),
)


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, C, Hq, D], k and v [B, Hkv, N, ...], query c at column N - C + c."""
    group, (count, keys) = q.shape[2] // k.shape[1], (q.shape[1], k.shape[2])
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    logits = torch.einsum("bchd,bhnd->bhcn", q, k) * scale
    later = torch.arange(keys)[None, :] > torch.arange(keys - count, keys)[:, None]
    return torch.einsum("bhcn,bhnd->bchd", logits.masked_fill(later, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", [compiled, "torch"])
@pytest.mark.parametrize(("batch", "count", "key_heads", "group", "width", "wide", "keys"), [
    (2, 3, 2, 2, 16, 32, 9), (1, 4, 1, 4, 64, 64, 37), (3, 1, 2, 1, 48, 16, 5), (2, 7, 1, 3, 32, 32, 200),
    (1, 5, 2, 1, 16, 16, 5),
])
def test_chunks(batch, count, key_heads, group, width, wide, keys, how, threads, monkeypatch):
    """One token and several, shared heads, other widths of values, a first chunk, rows too long to keep probabilities."""
    torch.manual_seed(keys)
    if how == "torch":
        monkeypatch.setattr(chunk_cpp, "_kernel", lambda: None)
    # As a region has them: queries transposed, keys and values the first columns of longer buffers.
    q = torch.randn(batch, key_heads * group, count, width).transpose(1, 2)
    held = torch.randn(batch * key_heads, keys + 6, width), torch.randn(batch * key_heads, keys + 6, wide)
    k, v = (t[:, :keys] for t in held)
    grad, scale = torch.randn(batch, count, key_heads * group, wide), 0.4
    exact = [t.double().requires_grad_() for t in (q, k.unflatten(0, (batch, -1)), v.unflatten(0, (batch, -1)))]
    want = written_out(*exact, scale)
    gradients = torch.autograd.grad(want, exact, grad.double())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert chunk_cpp.fits(q, k, v) == (how == "compiled")
        out, p = chunk.forward(q, k, v, scale)
        assert (p is None) == (keys > chunk.KEPT * width)
        # Gradients are added to what is there, and to these columns only.
        start = [torch.randn_like(t) for t in held]
        sums = [t.clone() for t in start]
        dq = chunk.backward(grad, q, k, v, p, scale, *(t[:, :keys] for t in sums))
    finally:
        torch.set_num_threads(before)
    assert out.shape == want.shape and dq.shape == q.shape
    added = [now - then for now, then in zip(sums, start)]
    wanted_all = [want, gradients[0], *(g.flatten(0, 1) for g in gradients[1:])]
    for got, wanted in zip([out, dq, *(t[:, :keys] for t in added)], wanted_all, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=2e-5)
    assert all(not t[:, keys:].any() for t in added)


@pytest.mark.parametrize("how", [compiled, "torch"])
def test_numbers_that_are_none_stay_so(how, monkeypatch):
    """A diverged model shows it: not-a-number and infinities reach the result, and no other head."""
    if how == "torch":
        monkeypatch.setattr(chunk_cpp, "_kernel", lambda: None)
    q, k, v = torch.rand(1, 2, 2, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    for bad in (float("nan"), float("inf")):
        broken = k.clone()
        broken[0, 3, 0] = bad
        out, _ = chunk.forward(q, broken, v, 1.0)
        assert out[:, :, 0].isnan().all() and out[:, :, 1].isfinite().all()
    large = chunk.forward(q * 1e4, k, v, 1.0)[0]
    assert large.isfinite().all()


def test_what_the_compiled_code_does_not_take():
    q, k = torch.randn(1, 2, 2, 24), torch.randn(2, 20, 24)
    assert not chunk_cpp.fits(q, k, k)  # widths that fill no tile
    q, k = torch.randn(1, 2, 2, 16), torch.randn(2, 20, 16)
    assert not chunk_cpp.fits(q.double(), k.double(), k.double())
    assert not chunk_cpp.fits(q, torch.randn(2, 20, 32)[..., ::2], k)
    assert not chunk_cpp.fits(torch.randn(1, 2, 2, 32)[..., ::2], k, k)


def test_other_processors_ask_no_compiler(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(chunk_cpp, "build", lambda *_: pytest.fail("a compiler was asked"))
    chunk_cpp._kernel.cache_clear()
    try:
        q, k = torch.randn(1, 2, 2, 16), torch.randn(2, 20, 16)
        assert not chunk_cpp.fits(q, k, k)
    finally:
        chunk_cpp._kernel.cache_clear()
