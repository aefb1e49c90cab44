"""Products of weights in panels against float64, and where they are taken."""

import pytest
import torch
import torch.nn.functional as F
from depthpass_kernels import cpp, packed_linear, panels
from depthpass_kernels.packed_linear import pack, packed_product
from torch._subclasses import FakeTensorMode
from turbos import transformed

import depthpass as dp

NARROW = "#define HALF_AS_WIDE\n" + panels.SOURCE
"""The tiles of processors with AVX2 alone, which those with AVX-512 run as well."""

needs_a_build = pytest.mark.skipif(
    isinstance(cpp.build(panels.ARGUMENTS, panels.SOURCE), Exception), reason="no compiler, or no AVX2"
)


@needs_a_build
@pytest.mark.parametrize("source", [panels.SOURCE, NARROW], ids=["widest", "narrow"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (16, 256), (17, 257), (70, 300), (5, 700), (200, 64)])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 13, 17, 20, 23, 27, 32])
def test_products(rows, out, inner, threads, source, monkeypatch):
    """Tiles of every size, blocks and panels that are not full, weights read by rows and by columns, rows with gaps."""
    monkeypatch.setattr(panels, "SOURCE", source)
    torch.manual_seed(rows)
    x, w, b = torch.randn(1, rows, 2 * inner)[..., ::2], torch.randn(out, inner), torch.randn(out)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for bias in (None, b):
            for weight in (w, w.t().contiguous().t()):
                got = panels.panel_product(x, panels.in_panels(weight), bias)
                wanted = F.linear(x.double(), w.double(), None if bias is None else bias.double())
                assert got.shape == wanted.shape and got.dtype == torch.float32
                torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * inner**0.5)
    finally:
        torch.set_num_threads(before)


def become(monkeypatch, vectors: str, name: str = "AMD EPYC") -> None:
    """Another processor, as far as torch says."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    panels.obstacle.cache_clear()


@pytest.fixture
def avx2(monkeypatch):
    become(monkeypatch, "AVX2")
    yield monkeypatch
    panels.obstacle.cache_clear()


@needs_a_build
def test_they_are_taken_where_onednn_does_not_lead(avx2):
    x, w = torch.randn(8, 96), torch.randn(64, 96)
    for vectors, name in [("AVX2", "AMD EPYC"), ("AVX2", "Intel Xeon"), ("AVX512", "Intel Xeon")]:
        become(avx2, vectors, name)
        assert not pack(w, x).is_mkldnn, (vectors, name)
    become(avx2, "AVX512")
    assert pack(w, x).is_mkldnn and "AVX-512" in panels.obstacle()
    become(avx2, "DEFAULT")
    assert pack(w, x).is_mkldnn and "DEFAULT" in panels.obstacle()


def test_without_a_compiler_onednn_packs(avx2):
    avx2.setattr(panels, "build", lambda *_: RuntimeError("no compiler"))
    x, w = torch.randn(8, 96), torch.randn(64, 96)
    packed = pack(w, x)
    assert packed.is_mkldnn and "no compiler" in panels.obstacle()
    torch.testing.assert_close(packed_product(x, packed, None), x @ w.t())
    with pytest.raises(RuntimeError, match="not to be had"):
        panels.panel_product(x, w, None)


@needs_a_build
def test_fake_tensors_meet_an_op(avx2):
    """A wide model's token loop under FakeTensorMode: shapes, and no memory of a fake is read."""
    spec = dp.TurboConn(bridges=[(3, 0)], group=2)
    model = transformed("llama", spec, torch.float32, hidden_size=256, intermediate_size=384)
    ids = torch.randint(0, 97, (2, 16))
    want = model(ids, labels=ids)
    want.loss.backward()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = model(mode.from_tensor(ids), labels=mode.from_tensor(ids))
        assert fake.logits.shape == want.logits.shape
        fake.loss.backward()
    again = model(ids, labels=ids)
    assert torch.equal(again.logits, want.logits) and packed_linear.blocked(again.logits, again.logits)
