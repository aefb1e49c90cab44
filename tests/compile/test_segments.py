"""Graphs cut at the calls on their visit compute what they computed whole."""

import operator

import torch
from depthpass_lowering.products.segments import Segmented
from torch import fx

aten = torch.ops.aten


def double(visit, x):
    visit.append(x)
    return x * 2


def example() -> fx.GraphModule:
    """``y = double(x + w); z = double(y * x); (z + x).view(rows * tokens, -1)``, and a value that only sizes use."""
    root = torch.nn.Module()
    root.shift = torch.nn.Buffer(torch.tensor(3.0))
    g = fx.Graph()
    visit, x, w = (g.placeholder(n) for n in ("visit", "x", "w"))
    rows, tokens = (g.call_function(aten.sym_size.int, (x, d)) for d in (0, 1))
    shift = g.get_attr("shift")
    a = g.call_function(aten.add.Tensor, (x, w))
    y = g.call_function(double, (visit, a))
    z = g.call_function(double, (visit, g.call_function(aten.mul.Tensor, (y, x))))
    flat = g.call_function(operator.mul, (rows, tokens))
    out = g.call_function(aten.add.Tensor, (g.call_function(aten.add.Tensor, (z, x)), shift))
    g.output((g.call_function(aten.reshape.default, (out, [flat, -1])), a))
    return fx.GraphModule(root, g)


def test_segments_between_calls():
    gm, pieces = example(), []

    def compiler(piece):
        pieces.append(piece)
        return piece

    cut = Segmented(gm, compiler)
    assert len(pieces) == 3
    assert all(n.target is not double for piece in pieces for n in piece.graph.nodes)
    for tokens in (4, 7):
        x, w = torch.randn(2, tokens, 3), torch.randn(3)
        seen, want = [], []
        got = cut(seen, x, w)
        assert len(seen) == 2
        for g, expected in zip(got, gm(want, x, w), strict=True):
            assert torch.equal(g, expected)


def test_sizes_are_read_again_in_every_segment():
    pieces = []
    Segmented(example(), lambda piece: pieces.append(piece) or piece)
    # No number is handed from one segment to the next: it would be fixed by the inner compiler.
    assert all("size" not in n.name for p in pieces for n in p.graph.nodes if n.op == "placeholder")
    assert any(n.target is aten.sym_size.int for n in pieces[-1].graph.nodes)
