"""Chunks on a graph with its backward pass: every rule against autograd, and how many ops a step dispatches."""

import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import zoo
from depthpass_lowering.adjoint.fused import fold_gains_pass, fuse_pass, rms, rope
from depthpass_lowering.adjoint.reverse import Reverse, Unsupported
from depthpass_lowering.adjoint.rules import rule_of
from depthpass_lowering.adjoint.sites import sites_of
from depthpass_lowering.executors import taped
from depthpass_lowering.fx_passes.products import products
from depthpass_lowering.products.sink import Sink
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

import depthpass as dp

aten = torch.ops.aten
SHAPES = {"x": (2, 3, 4), "y": (2, 3, 4), "row": (4,), "column": (2, 3, 1)}
CASES = {
    "mul": lambda g, x, y, row, column: g(aten.mul.Tensor, x, y),
    "mul, broadcast both ways": lambda g, x, y, row, column: g(aten.mul.Tensor, row, column),
    "add and subtract": lambda g, x, y, row, column: g(aten.sub.Tensor, g(aten.add.Tensor, x, row), column),
    "used three times": lambda g, x, y, row, column: g(aten.add.Tensor, g(aten.mul.Tensor, x, x), x),
    "divided by a number": lambda g, x, y, row, column: g(aten.div.Tensor, x, 3.0),
    "divided by a tensor (no rule)": lambda g, x, y, row, column: g(aten.div.Tensor, x, g(aten.exp.default, y)),
    "neg": lambda g, x, y, row, column: g(aten.neg.default, x),
    "silu": lambda g, x, y, row, column: g(aten.silu.default, x),
    "gelu": lambda g, x, y, row, column: g(aten.gelu.default, x, approximate="tanh"),
    "relu": lambda g, x, y, row, column: g(aten.relu.default, x),
    "tanh of sigmoid": lambda g, x, y, row, column: g(aten.tanh.default, g(aten.sigmoid.default, x)),
    "layer norm": lambda g, x, y, row, column: g(aten.layer_norm.default, x, [4], row, row, 1e-5),
    "layer norm without a gain": lambda g, x, y, row, column: g(aten.layer_norm.default, x, [4]),
    "rms": lambda g, x, y, row, column: g(rms, x, row, 1e-3),
    "rms without a gain": lambda g, x, y, row, column: g(rms, x, None, 1e-3),
    "rope": lambda g, x, y, row, column: g(rope, x, g(torch.detach, row), g(torch.detach, y), 2),
    "views": lambda g, x, y, row, column: g(
        aten.reshape.default, g(aten.transpose.int, g(aten.unsqueeze.default, x, 1), 2, 3), [2, 12]),
    "slice": lambda g, x, y, row, column: g(aten.slice.Tensor, x, 2, 1, 3),
    "cat": lambda g, x, y, row, column: g(aten.cat.default, [x, column, y], -1),
    "split": lambda g, x, y, row, column: g(operator.getitem, g(aten.split.Tensor, x, 3, -1), 0),
    "detached in one place": lambda g, x, y, row, column: g(aten.mul.Tensor, g(torch.detach, x), x),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_equals_autograd(case):
    graph = fx.Graph()
    inputs = [graph.placeholder(n) for n in SHAPES]
    result = CASES[case](lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), *inputs)
    graph.output((result,))
    gm = fx.GraphModule({}, graph)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in SHAPES.values()]
    (right,) = gm(*values)
    weight = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(right, values, weight, allow_unused=True)

    reverse = Reverse(gm, set(inputs), [], set(), rule_of).build(0)
    with torch.no_grad():
        (y,), saved = reverse.forward(*(v.detach() for v in values))
        seen = dict(zip(reverse.wants, reverse.backward(Sink(), saved, weight)))
    torch.testing.assert_close(y, right.detach(), rtol=1e-13, atol=1e-13)
    assert {i for i, g in enumerate(wanted) if g is not None} == set(seen)
    for i, g in seen.items():
        torch.testing.assert_close(g, wanted[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [(), ("gain",), ("q",), ("gain", "q", "k")])
def test_gains_of_norms_are_taken_into_the_weights_behind_them(frozen):
    """Two products behind one norm in float64: outputs and every gradient against autograd, over two chunks."""
    names = ("x", "gain", "q", "k", "bias", "up")
    graph = fx.Graph()
    x, gain, q, k, bias, up = (graph.placeholder(n) for n in names)
    normed = graph.call_function(rms, (x, gain, 1e-3))
    sides = graph.call_function(products, (False, (q, k), (bias, None), normed))
    both = [graph.call_function(operator.getitem, (sides, i)) for i in range(2)]
    wide = graph.call_function(products, (False, (up,), (None,), normed))
    graph.output((*both, graph.call_function(operator.getitem, (wide, 0))))
    gm = fx.GraphModule({}, graph)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    chunks = [drawn(2, 3, 8), drawn(2, 2, 8)]
    params = dict(zip(names[1:], (drawn(8), drawn(5, 8), drawn(7, 8), drawn(5), drawn(6, 8))))
    for n, p in params.items():
        p.requires_grad_(n not in frozen)
    leaves = [c.requires_grad_() for c in chunks]
    right = [gm(c, *params.values()) for c in leaves]
    weights = [[drawn(*y.shape) for y in ys] for ys in right]
    trained = [p for p in params.values() if p.requires_grad]
    wanted = torch.autograd.grad([y for ys in right for y in ys], leaves + trained, [w for ws in weights for w in ws])

    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    active = {inputs[0]} | {n for n, p in zip(inputs[1:], params.values()) if p.requires_grad}
    folded = fold_gains_pass(graph, active, inputs[1:], torch.float64)
    assert folded == (frozen != ("q",))  # there a part of one product is frozen
    reverse, sink = Reverse(gm, active, inputs[1:], set(), rule_of).build(2), Sink(2)
    with torch.no_grad():
        sites = sites_of(reverse.sites, list(params.values()), sink, chunks[0])
        for c, ys, ws, dx in zip(chunks, right, weights, wanted):
            actual, saved = reverse.forward(c.detach(), *params.values(), *sites)
            torch.testing.assert_close(actual, tuple(y.detach() for y in ys), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(reverse.backward(sink, saved, *ws)[0], dx, rtol=1e-12, atol=1e-12)
    sunk = sink.finish()
    for p, g in zip(trained, wanted[2:]):
        torch.testing.assert_close(sunk[id(p)], g, rtol=1e-12, atol=1e-12)


def test_a_written_argument_has_no_rule():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.relu_.default, (graph.call_function(aten.neg.default, (x,)),)),))
    with pytest.raises(Unsupported, match="writes into its argument"):
        Reverse(fx.GraphModule({}, graph), {x}, [], set(), rule_of).build(0)


def test_only_a_rotation_is_taken_for_one():
    """Halves in the other order, or of another tensor, are no rotary embedding."""
    def fused(first: bool, other: bool):
        graph = fx.Graph()
        x, y, c, s = (graph.placeholder(f"stream_{n}") for n in "xycs")
        for n in (x, y, c, s):
            n.meta["val"] = torch.empty(1, 1, 3, 8)
        call = graph.call_function
        halves = call(aten.slice.Tensor, (y if other else x, 3, 0, 4)), call(aten.slice.Tensor, (x, 3, 4, 8))
        minus = call(aten.neg.default, (halves[not first],))
        turned = call(aten.cat.default, ([minus, halves[first]], -1))
        straight, turned = call(aten.mul.Tensor, (x, c)), call(aten.mul.Tensor, (turned, s))
        graph.output((call(aten.add.Tensor, (straight, turned)),))
        gm = fx.GraphModule({}, graph)
        for n in graph.nodes:
            if n.op == "call_function":
                n.meta["val"] = torch.empty(1, 1, 3, 4 if n in halves or n is minus else 8)
        given = [torch.randn(1, 2, 3, 8) for _ in range(4)]
        before = gm(*given)[0]
        fuse_pass(gm, torch.float32)
        gm.recompile()
        torch.testing.assert_close(gm(*given)[0], before)
        return any(n.target is rope for n in gm.graph.nodes)

    assert fused(False, False)
    assert not fused(True, False)
    assert not fused(False, True)


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        self.count[fn] += 1
        return fn(*args, **(kwargs or {}))


def dispatched(model, tokens: int) -> int:
    ids = torch.randint(3, 90, (2, tokens), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with _Ops() as ops:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return sum(ops.count.values())


def test_a_visit_of_a_chunk_dispatches_less_than_half_the_ops_of_a_block_of_the_stock_model():
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    stock = zoo.model("llama", layers=3, **sizes)
    small = zoo.model("llama", layers=1, **sizes)
    block = (dispatched(stock, 8) - dispatched(small, 8)) / 2
    turbo = dp.transform(stock, dp.TurboConn(bridges=[(2, 1)], group=4, rank=8))
    # Blocks 1 and 2 run chunk by chunk; what a chunk costs besides its visits is counted with them.
    visit = (dispatched(turbo, 40) - dispatched(turbo, 24)) / 4 / 2
    assert any(graph is not None for kept in taped._TAPED.values() for graph in kept.values())
    assert visit < 0.4 * block, (visit, block)


def test_weights_of_several_visits_follow_autograd():
    stock = zoo.model("gpt2", layers=3, dtype=torch.float64)
    seen = []
    for level in ("eager", "scheduled"):
        turbo = dp.transform(stock, [dp.Loop(start=1, end=3, times=2), dp.TurboConn(bridges=[(2, 1)], group=4, rank=8)],
                             lowering=level)
        with torch.no_grad():
            for i, p in enumerate(turbo.depth.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) * 0.3)
        ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(0))
        turbo.zero_grad()
        logits = turbo(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        seen.append((logits.detach(), {n: p.grad.clone() for n, p in turbo.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-11, atol=1e-11)
    assert seen[0][1].keys() == seen[1][1].keys()
    for name, g in seen[0][1].items():
        torch.testing.assert_close(seen[1][1][name], g, rtol=1e-8, atol=1e-11, msg=name)


def test_what_leaves_a_chunk_is_an_ordinary_tensor(monkeypatch):
    """Chunks run in inference mode, whose tensors may never be recorded or written afterwards; none of them may get out."""
    modes = []
    mode = taped.TapedChunks.mode
    monkeypatch.setattr(taped.TapedChunks, "mode", lambda self: modes.append(mode(self)) or modes[-1])
    turbo = dp.transform(zoo.model("llama", layers=3), dp.TurboConn(bridges=[(2, 0)], group=2), lowering="scheduled").train()
    with torch.no_grad():
        for i, p in enumerate(turbo.depth.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    embeds = turbo.get_input_embeddings()(ids).detach().requires_grad_()
    out = turbo(inputs_embeds=embeds, labels=ids, output_hidden_states=True, use_cache=True)
    out.loss.backward()
    assert any(isinstance(m, torch.inference_mode) for m in modes)
    grads = [p.grad for p in turbo.parameters() if p.grad is not None]
    cached = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    leaving = [out.logits, *out.hidden_states, embeds.grad, *grads, *cached]
    assert len(grads) > 20 and len(cached) == 6 and not any(t.is_inference() for t in leaving)
    with torch.no_grad():
        for tensor in leaving:
            tensor.mul_(0.5)
