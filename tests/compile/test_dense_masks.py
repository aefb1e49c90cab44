"""Dense masks are told by what they compute; whatever is not causal, a window or chunks is refused."""

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from depthpass.capture.dense_masks import recognise
from depthpass.errors import UnsupportedModelError


def traced(make, dtype=torch.long):
    """The graph of ``make(values)`` with a symbolic ``[rows, tokens]`` argument, its result node and sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    fake = mode.from_tensor(torch.ones(3, 7, dtype=dtype), symbolic_context=context)
    with mode:
        graph = make_fx(make, tracing_mode="real", pre_dispatch=True)(fake).graph
    argument, output = next(iter(graph.nodes)), list(graph.nodes)[-1]
    rows, tokens = (s.node.expr for s in fake.shape)
    return argument, output.args[0], rows, tokens


def grid(values):
    """Rows, queries and keys as index tensors that broadcast to ``[rows, 1, queries, keys]``."""
    index = torch.arange(values.shape[1])
    return index[None, None, :, None], index[None, None, None, :]


def causal(values):
    q, k = grid(values)
    return (k <= q) & values.bool()[:, None, None, :]


def window(size):
    def make(values):
        q, k = grid(values)
        return causal(values) & (k > q - size)
    return make


def chunks(size):
    def make(values):
        q, k = grid(values)
        first = (values.cumsum(-1) == 0).sum(-1)[:, None, None, None]
        return causal(values) & ((q - first) // size == (k - first) // size)
    return make


def no_padding(values):
    q, k = grid(values)
    return (k <= q).expand(values.shape[0], 1, -1, -1)


def packed(values):
    q, k = grid(values)
    starts = torch.diff(values, prepend=values[:, :1] - 1, dim=-1) != 1
    document = starts.cumsum(-1)
    return (k <= q) & (document[:, None, :, None] == document[:, None, None, :])


@pytest.mark.parametrize(("make", "want"), [
    (causal, (None, None)), (window(4), (4, None)), (window(2), (2, None)), (window(4096), (4096, None)),
    (chunks(3), (None, 3)), (chunks(8192), (None, 8192)),
    (lambda v: window(100)(v) & window(5)(v), (5, None)),
])
def test_masks_with_padding(make, want):
    argument, mask, rows, tokens = traced(make)
    recognised = recognise(mask, rows, tokens, "block 0")
    assert (recognised.window, recognised.chunk) == want
    assert recognised.valid is argument and recognised.positions is None


def test_additive_mask_of_large_negative_numbers():
    _, mask, rows, tokens = traced(lambda v: torch.where(window(3)(v), 0.0, torch.finfo(torch.float32).min))
    recognised = recognise(mask, rows, tokens, "block 0")
    assert (recognised.window, recognised.chunk) == (3, None) and recognised.valid is not None


def test_mask_that_reads_only_the_shape_has_no_padding():
    _, mask, rows, tokens = traced(no_padding)
    recognised = recognise(mask, rows, tokens, "block 0")
    assert (recognised.window, recognised.chunk, recognised.valid, recognised.positions) == (None, None, None, None)


def test_packed_positions_are_told_from_padding():
    argument, mask, rows, tokens = traced(packed)
    recognised = recognise(mask, rows, tokens, "block 0")
    assert recognised.positions is argument and recognised.valid is None


@pytest.mark.parametrize("make", [
    lambda v: v.bool()[:, None, None, :].expand(-1, 1, v.shape[1], -1),  # bidirectional
    lambda v: causal(v) | (grid(v)[1] < 2),  # prefix
    lambda v: causal(v) & (grid(v)[0] - grid(v)[1] != 2),  # a hole
    lambda v: causal(v) & ((grid(v)[1] > grid(v)[0] - 4) | (grid(v)[1] == 0)),  # window with an attention sink
    lambda v: torch.where(causal(v), (grid(v)[1] - grid(v)[0]) * 0.5, torch.finfo(torch.float32).min),  # a bias
    lambda v: ~causal(v),
])
def test_other_masks_are_refused(make):
    _, mask, rows, tokens = traced(make)
    with pytest.raises(UnsupportedModelError, match=r"block 3: .*no known kind.*Expected a causal mask"):
        recognise(mask, rows, tokens, "block 3")


def test_a_mask_of_another_size_is_refused():
    _, mask, rows, _ = traced(causal)
    with pytest.raises(UnsupportedModelError, match="KV cache"):
        recognise(mask, rows, sympy.Symbol("other"), "block 0")
