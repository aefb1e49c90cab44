"""In-place ops become functional ops with the same values; writes that cannot be followed are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthpass.capture.functional import functionalise
from depthpass.errors import UnsupportedModelError


class Written(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("count", torch.zeros(6))

    def forward(self, x):
        return self.fn(self, x)


def functional(fn, writable=("x",)):
    """The functional graph of ``fn(module, x)``, its module, and how many ops were replaced."""
    module = Written(fn)
    dims = {"x": {0: torch.export.Dim("rows", min=2)}}
    ep = torch.export.export(module, (torch.randn(3, 6),), dynamic_shapes=dims, strict=False)
    count = functionalise(ep.graph_module, frozenset(writable))
    mutable = [n for n in ep.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    assert not mutable, mutable
    return ep, module, count


def add(m, x):
    y = x * 2
    y += x
    y.mul_(m.weight)
    return y - 1


def views_before(m, x):
    """An alias made before the write is only read before it."""
    y = x.clone()
    z = y.view(-1).sum()
    y.relu_()
    return y + z


def slices(m, x):
    out = x.new_empty(x.shape[0], 2, 6)
    out[:, 0].copy_(x)
    out[:, 1, :3] = 7
    out[:, 1, 3:] = x[:, :3]
    return out.flatten(1)


def filled(m, x):
    """With the constant's own detach, four in all."""
    return torch.zeros_like(x).index_put_((torch.tensor([0, 1]),), x[:2]).masked_fill_(x > 0, 3.0).clamp_(min=-1)


def of_the_input(m, x):
    x.add_(1)
    return x * 2


def without_gradient(m, x):
    with torch.no_grad():
        y = torch.ones(6)
        y *= m.count + 3
    return x * y


@pytest.mark.parametrize(("fn", "count"), [
    (add, 2), (views_before, 1), (slices, 3), (filled, 4), (of_the_input, 1), (without_gradient, 1),
])
def test_values_are_unchanged(fn, count):
    ep, module, replaced = functional(fn)
    assert replaced == count
    x = torch.randn(5, 6)
    want = fn(module, x.clone())
    kept = x.clone()
    values = dict(module.named_parameters()) | dict(module.named_buffers()) | ep.constants | {None: x}
    flat = [values[s.target] for s in ep.graph_signature.input_specs]
    torch.testing.assert_close(list(torch.fx.Interpreter(ep.graph_module).run(*flat))[-1], want)
    assert torch.equal(x, kept), "the input is not written any more"


def of_a_parameter(m, x):
    with torch.no_grad():
        m.weight.view(-1).add_(1)
    return x * m.weight


def of_a_buffer(m, x):
    m.count.add_(1)
    return x * m.count


def seen_through_another_view(m, x):
    y = x.clone()
    z = y.view(-1)
    y.add_(1)
    return z * 2


def through_a_permutation(m, x):
    y = x.clone()
    y.t()[0].fill_(1)
    return y * 2


@pytest.mark.parametrize(("fn", "reason"), [
    (of_a_parameter, "parameter, a buffer or an outside value"),
    (of_a_buffer, "'b_count' in place, which is a parameter, a buffer"),
    (seen_through_another_view, "read again later through another view"),
    (through_a_permutation, "read again later through another view"),
])
def test_writes_that_cannot_be_followed_are_refused(fn, reason):
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        functional(fn)
    assert "test_functional.py" in str(error.value)
