"""Axes: where tokens are after reshapes, and random programs on which the claim is checked entry by entry."""

from __future__ import annotations

import functools
import random

import pytest
import sympy
import torch
from torch import nn

from depthpass.capture.axes import AxisError, broadcast, join, regroup, single
from depthpass.capture.functional import functionalise
from depthpass.capture.legality import check_token_local
from depthpass.capture.rules.call import BATCH as B
from depthpass.capture.rules.call import TOKENS as T
from depthpass.errors import UnsupportedModelError


def sizes(*values):
    return [sympy.sympify(v) for v in values]


@pytest.mark.parametrize(("axes", "to", "want"), [
    (((B,), (T,), (32,)), (B, T, 4, 8), ((B,), (T,), (4,), (8,))),
    (((B,), (T,), (32,)), (B * T, 32), ((B, T), (32,))),
    (((B,), (T,), (32,)), (B * T * 4, 8), ((B, T, 4), (8,))),
    (((B, T), (32,)), (B, T, 1, 32), ((B,), (T,), (), (32,))),
    (((B,), (4,), (T,), (8,)), (4 * B, T, 8), ((B, 4), (T,), (8,))),
    (((4,), (T,)), (2, 2 * T), ((2,), (2, T))),
    (((T,), (4,), (3,)), (T, 6, 2), ((T,), (6,), (2,))),
    (((T,), (6,)), (T, 1, 3, 2), ((T,), (), (3,), (2,))),
])
def test_reshapes_that_keep_tokens_whole(axes, to, want):
    assert regroup(axes, sizes(*to)) == want


@pytest.mark.parametrize(("axes", "to"), [
    (((B,), (T,), (32,)), (B, 32, T)),
    (((B,), (T,), (32,)), (T, B, 32)),
    (((4,), (T,)), (T, 4)),
    (((4,), (T,)), (2 * T, 2)),
    (((T,), (6,)), (4, 6 * T / 4)),
])
def test_reshapes_that_tear_tokens_apart(axes, to):
    with pytest.raises(AxisError, match="tears tokens apart"):
        regroup(axes, sizes(*to))


def test_broadcasting_lines_tokens_up():
    assert broadcast(((B,), (T,), (8,)), ((T,), ())) == ((B,), (T,), (8,))
    with pytest.raises(AxisError, match="pairs batch with tokens"):
        broadcast(((B,), (T,)), ((T,), ()))
    with pytest.raises(AxisError, match=r"pairs batch\*tokens with tokens\*batch"):
        broadcast(((B, T),), ((T, B),))
    with pytest.raises(AxisError, match="runs over pairs of tokens"):
        broadcast(((T,), ()), ((), (T,)))
    assert join((2,), (3,), (T,), (), (4,)) == (6, T, 4)
    assert single(((B,), (T,))) == ((B,), (T,))


# Random programs --------------------------------------------------------------------------------------------------

W = 4


def _steps(rng: random.Random):
    d, e = rng.randrange(-3, 3), rng.randrange(-3, 3)
    square = torch.randn(W, W)
    return [
        ("transpose", lambda y, x: y.transpose(d, e)),
        ("flatten", lambda y, x: y.flatten(min(d % y.dim(), e % y.dim()), max(d % y.dim(), e % y.dim()))),
        ("back", lambda y, x: y.reshape(x.shape)),
        ("rows", lambda y, x: y.reshape(-1, W)),
        ("halves", lambda y, x: y.reshape(*y.shape[:-1], 2, -1)),
        ("unsqueeze", lambda y, x: y.unsqueeze(d)),
        ("squeeze", lambda y, x: y.squeeze(d)),
        ("expand", lambda y, x: y.unsqueeze(0).expand(3, *y.shape)),
        ("repeat", lambda y, x: y.repeat(2, *(1 for _ in y.shape[1:]))),
        ("interleave", lambda y, x: y.repeat_interleave(2, d)),
        ("cat", lambda y, x: torch.cat((y, 2 * y), d)),
        ("stack", lambda y, x: torch.stack((y, y.exp()), d)),
        ("sum", lambda y, x: y.sum(d)),
        ("mean", lambda y, x: y - y.mean(d, keepdim=True)),
        ("softmax", lambda y, x: y.softmax(d)),
        ("cumsum", lambda y, x: y.cumsum(d)),
        ("flip", lambda y, x: y.flip(d)),
        ("roll", lambda y, x: y.roll(1, d)),
        ("sort", lambda y, x: y.sort(d).values),
        ("half", lambda y, x: y.chunk(2, d)[1]),
        ("slice", lambda y, x: y.narrow(d, 0, y.shape[d])),
        ("select", lambda y, x: y.select(d, 0)),
        ("product", lambda y, x: y @ square),
        ("linear", lambda y, x: nn.functional.linear(y, square)),
        ("twice", lambda y, x: y @ y.transpose(-1, -2)),
        ("with itself", lambda y, x: y + x),
        ("outer", lambda y, x: y.unsqueeze(-1) * y.unsqueeze(-2)),
        ("gather", lambda y, x: y.gather(d, y.argsort(-1))),
        ("norm", lambda y, x: nn.functional.layer_norm(y, y.shape[-1:])),
        ("write", lambda y, x: y.clone().mul_(2).add_(1)),
        ("pad", lambda y, x: nn.functional.pad(y, (1, 1))),
    ]


class Program(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, x):
        return functools.reduce(lambda y, step: step[1](y, x), self.steps, x)


def belongs(axes, batch: int, tokens: int, b: int, t: int) -> torch.Tensor:
    """Which entries of a tensor belong to token t of row b, from its axes."""
    size = {B: batch, T: tokens}
    shape = [[size.get(f, f) for f in dim] for dim in axes]
    flat = [(f, n) for dim, ns in zip(axes, shape) for f, n in zip(dim, ns)]
    mask = torch.ones([n for _, n in flat] or [1], dtype=torch.bool)
    for i, (factor, n) in enumerate(flat):
        if factor in size:
            wanted = torch.arange(n) == (b if factor == B else t)
            mask = mask & wanted.view([-1 if j == i else 1 for j in range(len(flat))])
    return mask.reshape([torch.Size(ns).numel() for ns in shape])


def test_random_programs_that_are_accepted_are_token_local():
    """Changing one token changes only its own entries, and the token alone gives the same numbers."""
    rng, accepted, refused = random.Random(0), 0, 0
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1)
    for _ in range(40):
        torch.manual_seed(rng.randrange(10**6))
        steps = [rng.choice(_steps(rng)) for _ in range(rng.randrange(1, 5))]
        program, x = Program(steps), torch.randn(5, 7, W)
        try:
            program(x)
            ep = torch.export.export(program, (x,), dynamic_shapes=(({0: batch, 1: tokens}),), strict=False)
        except Exception:  # no such dimension, sizes that do not fit, sizes that torch itself pins down
            continue
        functionalise(ep.graph_module)
        output = next(n for n in reversed(ep.graph.nodes) if n.op == "output").args[0][0]
        given = next(n for n in ep.graph.nodes if n.name == ep.graph_signature.user_inputs[0])
        b, t = (s.node.expr for s in given.meta["val"].shape[:2])
        try:
            known = check_token_local([n for n in ep.graph.nodes if n.op != "placeholder"], b, t, "program")
        except UnsupportedModelError:
            refused += 1
            continue
        accepted += 1
        own = belongs(known[output], 5, 7, 3, 2)
        before, changed = program(x), x.clone()
        changed[3, 2] += torch.randn(W)
        names = [n for n, _ in steps]
        assert before.shape == own.shape, names
        assert torch.allclose(program(changed)[~own], before[~own], atol=1e-5), names
        alone = program(x[3:4, 2:3])
        torch.testing.assert_close(before[own], alone.flatten(), rtol=1e-4, atol=1e-4, msg=str(names))
    assert accepted >= 10 and refused >= 10, (accepted, refused)
