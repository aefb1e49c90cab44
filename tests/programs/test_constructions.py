"""examples/constructions.py gives the exact results of the papers, on programs run by depthpass."""

import math

import pytest
import torch
from depthpass_lowering.state import State

import depthpass as dp
from depthpass.ir import plain
from depthpass.ir.interpret import Interpretation
from depthpass.passes import Context, apply_spec
from examples.constructions import (
    HandMade,
    LinearAttention,
    descent_columns,
    execute,
    looped_descent,
    loops_for,
    reach,
    reach_program,
    thinking_maps,
    thinking_program,
    thought_descent,
)


def closure(adjacency):
    """Breadth-first search from every node."""
    n = len(adjacency)
    actual = torch.zeros(n, n, dtype=torch.bool)
    for start in range(n):
        todo = [start]
        while todo:
            v = todo.pop()
            if not actual[start, v]:
                actual[start, v] = True
                todo += adjacency[v].nonzero().flatten().tolist()
    return actual


def test_reachability_of_random_graphs():
    generator = torch.Generator().manual_seed(0)
    hard = 0
    for trial in range(60):
        n = 2 + trial % 5
        adjacency = torch.rand(n, n, generator=generator) < 0.15 + 0.3 * torch.rand((), generator=generator)
        want = closure(adjacency)
        assert torch.equal(reach(adjacency, loops_for(n)), want)
        hard += loops_for(n) > 1 and not torch.equal(reach(adjacency, loops_for(n) - 1), want)
    assert hard > 3


def test_a_path_of_17_nodes_needs_4_loops():
    path = torch.diag(torch.ones(16, dtype=torch.bool), 1)
    want = torch.ones(17, 17, dtype=torch.bool).triu()
    assert loops_for(17) == 4 == math.ceil(math.log2(16))
    after3 = reach(path, 3)
    far = torch.arange(17)[None] - torch.arange(17)[:, None]
    assert torch.equal(after3, (far >= 0) & (far <= 8))
    assert torch.equal(reach(path, 4), want)
    assert dp.report(None, program=reach_program(17, 4), seq_len=17**2 + 17**3).depth_at(17**2 + 17**3) == 8


def problem(seed, n=20, dim=5):
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    ys = torch.randn(n, generator=generator, dtype=torch.float64)
    return xs, ys, torch.randn(dim, generator=generator, dtype=torch.float64)


def descent(xs, ys, w, eta, steps):
    seen = []
    for _ in range(steps):
        w = w - eta / len(xs) * xs.T @ (xs @ w - ys)
        seen.append(w)
    return torch.stack(seen)


@pytest.mark.parametrize("seed", range(4))
def test_loops_and_thoughts_are_steps_of_gradient_descent(seed):
    xs, ys, start = problem(seed, n=8 + seed * 5, dim=2 + seed)
    want = descent(xs, ys, start, 0.4, 12)
    torch.testing.assert_close(thought_descent(xs, ys, start, 0.4, 12), want, rtol=1e-12, atol=1e-12)
    for k in (1, 2, 5, 12):
        torch.testing.assert_close(looped_descent(xs, ys, start, 0.4, k), want[k - 1], rtol=1e-12, atol=1e-12)
    assert (want[0] - want[11]).abs().max() > 1e-2


class Interpreted(LinearAttention):
    """The same block for the reference interpreter: one token against a list of keys."""

    def keys(self, x, position):
        return x, self.value @ x

    def __call__(self, x, position, keys, own=(), gate=""):
        query = self.form @ x
        return x + sum((k @ query) * v for k, v in keys) / self.n


def test_the_interpreter_agrees():
    xs, ys, start = problem(0, n=6, dim=3)
    block = Interpreted(3, 6, 0.4)
    stock = plain("LinearAttention", blocks=1, width=9)
    looped = apply_spec(stock, dp.Loop(start=0, end=1, times=4), Context.of(stock))
    got = Interpretation(looped, descent_columns(xs, ys, start), [block], lambda x: x).output()[-1, 4:7]
    want = descent(xs, ys, start, 0.4, 4)
    torch.testing.assert_close(got, want[-1], rtol=1e-12, atol=1e-12)
    maps = {f"{k}.weight": m.weight for k, m in thinking_maps(3).items()}
    thought = Interpretation(thinking_program(3), descent_columns(xs, ys, start, 3), [block], lambda x: x, maps).output()
    torch.testing.assert_close(thought[6:, 4:7], want, rtol=1e-12, atol=1e-12)


def test_thoughts_decode_one_at_a_time():
    xs, ys, start = problem(1, n=7, dim=3)
    host = HandMade([LinearAttention(3, 7, 0.4)], thinking_maps(3))
    columns, state, seen = descent_columns(xs, ys, start, 4), State(), []
    for a, b in ((0, 8), (8, 9), (9, 11), (11, 12)):
        out, state = execute(thinking_program(3), host, columns[a:b], state)
        seen.append(out)
    torch.testing.assert_close(torch.cat(seen)[7:, 4:7], descent(xs, ys, start, 0.4, 5), rtol=1e-12, atol=1e-12)
    report = dp.report(None, program=thinking_program(3), seq_len=12)
    assert report.depth_at(12) == 12 and report.chunk == 1
