"""Packed products against plain ones, alone and inside a token loop."""

import operator
import weakref

import pytest
import torch
import zoo
from depthpass_kernels import packed_linear
from depthpass_kernels.packed_linear import contraction
from depthpass_lowering.executors import compiled
from depthpass_lowering.fx_passes.products import products as products_node
from depthpass_lowering.products import joint, traced
from depthpass_lowering.products import packed as products
from depthpass_lowering.products import sink as sink_module
from depthpass_lowering.products.packed import Products, Weights
from depthpass_lowering.products.sink import Sink, sunk_landing, sunk_products
from torch import fx

import depthpass as dp

CASES = {
    "one": dict(shapes=[(192, 256)], biased=[True]),
    "one stream": dict(shapes=[(192, 256), (64, 256), (32, 256)], biased=[True, False, True]),
    "joined": dict(shapes=[(192, 256), (192, 24)], biased=[False, True], joined=True),
    "transposed": dict(shapes=[(256, 192)], biased=[True], transposed=True),
}


def weights(dtype, shapes, biased, joined=False, transposed=False) -> Weights:
    torch.manual_seed(0)
    weights = tuple(torch.randn(s, dtype=dtype) for s in shapes)
    outs = [w.shape[1 if transposed else 0] for w in weights]
    return Weights(weights, tuple(torch.randn(o, dtype=dtype) if b else None for o, b in zip(outs, biased)), joined, transposed)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Weights of one product side by side in their own format, as on CUDA: a CPU without oneDNN's blocks."""
    for module in (packed_linear, products, traced):
        monkeypatch.setattr(module, "blocked", lambda x, weight: False)
    monkeypatch.setattr(products, "joins", lambda x, weight: x.dtype == weight.dtype)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float64, 1e-14)])
@pytest.mark.parametrize("rows", [(3,), (2, 5)])
@pytest.mark.parametrize("case", CASES)
def test_products_side_by_side_equal_float64(case, dtype, tolerance, rows, as_on_cuda):
    loop = check_products(case, dtype, tolerance, rows)
    assert bool(loop._packed) == (len(CASES[case]["shapes"]) > 1)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float64, 1e-14)])
@pytest.mark.parametrize("rows", [(3,), (2, 5)])
@pytest.mark.parametrize("case", CASES)
def test_products_equal_float64(case, dtype, tolerance, rows):
    # oneDNN packs half precision for processors that multiply it (AVX-512); a crash on the others is what this is about.
    packs = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.float64: False}
    assert bool(check_products(case, dtype, tolerance, rows)._packed) == packs[dtype]


def test_half_precision_is_not_packed_for_a_processor_without_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not check_products("one stream", torch.bfloat16, 3e-2, (2, 5))._packed
    assert check_products("one stream", torch.float32, 1e-5, (2, 5))._packed


def check_products(case, dtype, tolerance, rows) -> Products:
    w, loop = weights(dtype, **CASES[case]), Products(uses=8)
    inner = [t.shape[0 if w.transposed else 1] for t in w.weights]
    xs = [torch.randn(*rows, n, dtype=dtype) for n in (inner if w.joined else inner[:1])]
    exact = [t.double().requires_grad_() for t in xs]
    plain = [t.double().t() if not w.transposed else t.double() for t in w.weights]
    biases = [0 if b is None else b.double() for b in w.biases]
    if w.joined:
        want = [sum(x @ t + b for x, t, b in zip(exact, plain, biases))]
    else:
        want = [exact[0] @ t + b for t, b in zip(plain, biases)]
    got = loop.forward(w, xs)
    assert [g.shape for g in got] == [t.shape for t in want]
    grads = [torch.randn(t.shape, dtype=dtype) for t in want]
    back = torch.autograd.grad(want, exact, [g.double() for g in grads])
    for a, e in zip([*got, *loop.backward(w, grads)], [*want, *back], strict=True):
        assert a.dtype == dtype and ((a.double() - e).norm() / e.norm()) < tolerance
    return loop


@pytest.mark.parametrize("vectors,name", [("AVX2", "AMD EPYC"), ("AVX512", "AMD EPYC"), ("AVX512", "Intel Xeon")])
@pytest.mark.parametrize("widths", [(96, 64), (64, 160)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float64, 1e-14)])
def test_weight_gradients_are_contractions(dtype, tolerance, widths, vectors, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    a, b = (torch.randn(300, n, dtype=dtype) for n in widths)
    want = a.double().t() @ b.double()
    assert ((contraction(a, b).double() - want).norm() / want.norm()) < tolerance


def test_weights_are_packed_only_where_it_pays_and_follow_the_loop():
    w, x = torch.randn(256, 256), torch.randn(4, 256)
    for uses, big in ((products.LEAST_USES, w), (products.LEAST_USES - 1, w), (products.LEAST_USES, w[:8, :8])):
        loop = Products(uses)
        loop.forward(Weights((big,), (None,)), [x[:, : big.shape[1]]])
        assert bool(loop._packed) == (uses >= products.LEAST_USES and big is w)
    loop = Products(uses=9)
    (before,) = loop.forward(Weights((w,), (None,)), [x])
    loop.forget()
    assert torch.allclose(loop.forward(Weights((w * 2,), (None,)), [x])[0], 2 * before)
    # Both directions of one weight are different products.
    assert not torch.allclose(before, loop.backward(Weights((w,), (None,)), [x])[0])


def test_frozen_weights_beside_trained_ones_take_no_product():
    """As in LoRA: q and its A read one stream, and q is frozen."""
    torch.manual_seed(0)
    frozen, trained = torch.randn(64, 32), torch.randn(8, 32, requires_grad=True)
    sink, x = Sink(), torch.randn(5, 32, requires_grad=True)
    out = sunk_products(sink, Weights((frozen, trained), (None, None)), x)
    a, b = torch.randn(5, 64), torch.randn(5, 8)
    (dx,) = torch.autograd.grad(out, [x], [a, b])
    assert torch.allclose(dx, a @ frozen + b @ trained, atol=1e-5)
    (held,) = sink._waiting.values()
    assert held.g[0].shape == (5, 8)
    actual = sink.finish()
    assert actual.keys() == {id(trained)} and torch.allclose(actual[id(trained)], b.t() @ x, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_landing_equals_its_parts(dtype, fused, monkeypatch):
    """Bridges that land on one stream, absent for the first tokens, with what CUDA runs (its reference, here) or without."""
    monkeypatch.setattr(sink_module, "_fuses", lambda x: fused)
    if fused:
        monkeypatch.setattr(products, "blocked", lambda x, weight: False)
    w = weights(dtype, [(192, 24), (192, 200)], [True, False], joined=True)
    w = Weights(tuple(t.requires_grad_() for t in w.weights), (w.biases[0].requires_grad_(), None), joined=True)
    x, *cs = (torch.randn(2, 5, n, dtype=dtype, requires_grad=True) for n in (192, 24, 200))
    present = (torch.arange(5)[None] >= torch.tensor([2, 0])[:, None])[..., None]
    grad = torch.randn(2, 5, 192, dtype=dtype)
    for mask in (None, present):
        sink = Sink(uses=8)
        got = sunk_landing(sink, w, mask, x, *cs)
        added = cs[0] @ w.weights[0].t() + w.biases[0] + cs[1] @ w.weights[1].t()
        want = x + (added if mask is None else torch.where(mask, added, 0))
        leaves = [x, *cs]
        exact = torch.autograd.grad(want, [*leaves, *w.weights, w.biases[0]], grad)
        seen = list(torch.autograd.grad(got, leaves, grad))
        sunk = sink.finish()
        seen += [sunk[id(t)] for t in (*w.weights, w.biases[0])]
        for a, e in zip([got, *seen], [want, *exact], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-10)


def reads_packed(gm) -> bool:
    """Whether a graph multiplies with packed weights, as those of the token loop do."""
    return any(n.target is torch.ops.depthpass_kernels.packed_linear.default for n in gm.graph.nodes)


@pytest.mark.parametrize(("arch", "level"), [
    ("llama", "scheduled"), ("gpt2", "scheduled"), pytest.param("llama", "inductor", marks=pytest.mark.compile),
    pytest.param("gpt2", "inductor", marks=[pytest.mark.compile, pytest.mark.codegen(of=reads_packed)]),
])
def test_a_token_loop_on_packed_weights_equals_float64(arch, level):
    """Large enough that weights are packed; every gradient against the eager level in float64."""
    check_token_loop(arch, level)


@pytest.mark.parametrize("level", ["scheduled", pytest.param("inductor", marks=pytest.mark.compile)])
def test_a_token_loop_on_weights_side_by_side_equals_float64(level, as_on_cuda, monkeypatch):
    """As on CUDA: joined weights in their own format, one weight-gradient product after the whole loop."""
    monkeypatch.setattr(compiled, "_SEGMENTS", weakref.WeakValueDictionary())
    monkeypatch.setitem(sink_module.FLUSH, "cpu", sink_module.FLUSH["cuda"])
    check_token_loop("llama", level)


def check_token_loop(arch, level):
    stock = zoo.model(arch, 3, **({"n_embd": 192, "n_inner": 256} if arch == "gpt2" else
                                  {"hidden_size": 192, "intermediate_size": 256}))
    spec = dp.TurboConn(bridges=[(2, 0), (1, 0)], group=2, rank=192)
    batch = zoo.batch([13, 9])
    seen = []
    for dtype, lowering in ((torch.float64, "eager"), (torch.float32, level)):
        turbo = dp.transform(stock.to(dtype), spec, lowering=lowering)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in turbo.depth.parameters():
                p.copy_(0.1 * torch.randn(p.shape))
        turbo.zero_grad()
        out = turbo(**batch, labels=batch["input_ids"], use_cache=False)
        out.loss.backward()
        seen.append((out.logits.detach(), {n: p.grad.clone() for n, p in turbo.named_parameters() if p.grad is not None}))
    (logits, grads), (logits32, grads32) = seen
    assert torch.allclose(logits32.double(), logits, atol=1e-4)
    assert grads32.keys() == grads.keys()
    for name, g in grads.items():
        assert (grads32[name].double() - g).norm() <= 1e-4 * g.norm() + 1e-7, name


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 12), (12,), (5, 12)])
@pytest.mark.parametrize("frozen", [False, True])
def test_factors_of_a_stream_have_the_gradients_of_autograd(shape, frozen, monkeypatch):
    """Through the weights where they are a norm's gain and all weights are trained; by themselves otherwise."""
    monkeypatch.setattr(joint, "_inductor", lambda gm: lambda args: gm(*args))
    graph = fx.Graph()
    x, factor, *weights = (graph.placeholder(n) for n in ("x", "factor", "gate", "up"))
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (factor, x))
    both = graph.call_function(products_node, (False, tuple(weights), (None, None), scaled))
    graph.output(tuple(graph.call_function(operator.getitem, (both, i)) for i in range(2)))
    torch.manual_seed(0)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 5, 12), shape, (7, 12), (4, 12))]
    inputs[2].requires_grad_(not frozen)
    x.meta["val"], scaled.meta["val"] = inputs[0].detach(), (inputs[1] * inputs[0]).detach()
    grads = [torch.randn(3, 5, n, dtype=torch.float64) for n in (7, 4)]
    wanted = [t for t in inputs if t.requires_grad]
    right = torch.autograd.grad([inputs[1] * inputs[0] @ w.t() for w in inputs[2:]], wanted, grads)
    sink = Sink(8)
    sink.leaves = {id(t) for t in inputs[1:]}
    segment = joint.Segment(fx.GraphModule({}, graph))
    outs = segment(sink, *inputs)
    actual = torch.autograd.grad(outs, wanted, grads, allow_unused=True)
    sunk = sink.finish()
    for t, g, want in zip(wanted, actual, right, strict=True):
        torch.testing.assert_close(sunk[id(t)] if g is None else g, want)
    (traced_once,) = segment.joints.values()
    assert [p.gain for p in traced_once.products] == [1 if shape == (12,) and not frozen else None]


@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_segment_does_not_copy_the_weights_that_it_reads_packed(trained, monkeypatch):
    """What tells the shape of a packed weight once joined the weights in the traced graph, and the compiler kept that."""
    given = []
    monkeypatch.setattr(joint, "_inductor", lambda gm: given.append(gm) or gm)
    graph = fx.Graph()
    x, *halves = (graph.placeholder(n) for n in ("x", "gate", "up"))
    both = graph.call_function(products_node, (False, tuple(halves), (None, None), x))
    graph.output(tuple(graph.call_function(operator.getitem, (both, i)) for i in range(2)))
    inputs = [torch.randn(2, 4, 128), torch.randn(200, 128), torch.randn(200, 128)]
    joint.trace(fx.GraphModule({}, graph), inputs, [trained] * 3, [trained] * 3, Sink(8), None)
    read = [n.target for gm in given for n in gm.graph.nodes if n.op == "call_function"]
    assert torch.ops.depthpass_kernels.packed_linear.default in read
    # Gradients of the two halves stand side by side, weights do not.
    cats = [n for gm in given for n in gm.graph.nodes if n.target is torch.ops.aten.cat.default]
    assert all(tuple(n.meta["val"].shape) == (2, 4, 400) for n in cats)
    assert trained or not cats
    assert all(n.users or n.op in ("placeholder", "output") for gm in given for n in gm.graph.nodes)
