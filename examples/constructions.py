"""Two constructions of the literature as depth programs on hand-made blocks, with their exact results.

* **Reachability with padding and loops** (arXiv 2505.18948): n^2 input tokens (i, j) carry the edges of a graph, n^3 pads
  (i, k, j) carry positions only. One iteration squares the relation: block 0 lets every pad read (i, k) and (k, j) with
  hard attention and take their AND, block 1 lets every (i, j) average its pads over k and threshold. ceil(log2(n - 1))
  iterations give reachability. Attention is unmasked and averages over the keys of the largest score.
* **Gradient descent in context** (arXiv 2502.21212): columns (x_i, y_i, 0, 0) and (0, 0, w, 1); one layer of linear attention
  f(Z) = Z + V Z (Z^T W Z) / n is one step of w <- w - eta/n X (X^T w - y). k loops over the last column, or k fed-back
  columns (chain of thought, here a delay edge), give the iterate k.

    python examples/constructions.py

The programs are built by the library's passes or written as text, printed, analysed and run by its eager lowering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from depthpass_lowering.executors.eager import run
from depthpass_lowering.executors.losses import Pool
from depthpass_lowering.state import State
from torch import Tensor, nn

import depthpass as dp
from depthpass.capture.captured import Site
from depthpass.ir import plain
from depthpass.passes import Context, apply_spec
from depthpass.schedule import schedule


class HandMade:
    """A host of hand-made blocks (see ``depthpass_lowering.host.Host``): each has projections, an attention and an update.

    A block is an object with ``project(x) -> (q, k, v)`` as ``[batch, heads, tokens, dim]``, ``attend(q, k, v, seen)`` to
    ``[batch, tokens, heads, dim]`` and ``update(x, read)``; its ``causal`` says whether tokens see later ones.
    """

    captured = None
    adapts = training = False
    style = "sdpa"

    def __init__(self, blocks: Sequence, modules: dict[str, nn.Module] | None = None):
        self.blocks, self.modules, self.ratios, self.pool = list(blocks), modules or {}, {}, Pool()

    def side_inputs_of(self, index: int) -> tuple[int, ...]:
        return ()

    def sites_of(self, index: int) -> tuple[Site, ...]:
        return (Site("attention", 1.0, None, 0.0, None, None, False, 1, 1, 1, 1),)

    def block(self, index: int, visit, hidden: Tensor, side_inputs) -> Tensor:
        block = self.blocks[index]
        return block.update(hidden, visit.attend(0, *block.project(hidden), None))

    def attention(self, index: int, site: Site, q, k, v, mask, causal: bool, sinks) -> Tensor:
        block = self.blocks[index]
        if not block.causal:
            return block.attend(q, k, v, None)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if causal else mask
        return block.attend(q, k, v, seen)

    def norm(self, hidden: Tensor) -> Tensor:
        return hidden

    def module(self, name: str) -> nn.Module:
        return self.modules[name]

    def refuses_schedule(self, index: int) -> str:
        return "hand-made blocks"


def execute(program, host: HandMade, embed: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Run a program on a row of embedded tokens ``[tokens, width]``; with a state, as the row's next tokens."""
    keep = state is not None
    ran = run(schedule(program), host, embed[None], (), (), state or State(), None, keep)
    out, after = ran.streams, ran.state
    return out["output"][0], after


# Reachability ------------------------------------------------------------------------------------------------------------


def hard_attention(q: Tensor, k: Tensor, v: Tensor, rows: int = 512) -> Tensor:
    """Every query averages the values of the keys with the largest score; a few queries at a time to save memory."""
    parts = []
    for part in q.split(rows, 2):
        scores = part @ k.mT
        best = (scores == scores.amax(-1, keepdim=True)).to(v.dtype)
        parts.append(best @ v / best.sum(-1, keepdim=True))
    return torch.cat(parts, 2).transpose(1, 2)


class _Pads:
    """Channels of a token: one-hot i, k, j; whether it is a pad; its bit (M of a pair, the AND of a pad)."""

    causal = False

    def __init__(self, n: int):
        self.n = n

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n = self.n
        return x[..., :n], x[..., n : 2 * n], x[..., 2 * n : 3 * n], x[..., -2:-1], x[..., -1:]

    def attend(self, q, k, v, seen) -> Tensor:
        return hard_attention(q, k, v)


class ReadAndAnd(_Pads):
    """Every pad (i, k, j) reads M[i, k] with one head and M[k, j] with the other; its bit becomes their AND."""

    def project(self, x):
        i, k, j, pad, bit = self.split(x)
        heads = torch.stack((torch.cat((i, k), -1), torch.cat((k, j), -1)), 1)
        keys = torch.cat((i, j), -1) * (1 - pad)  # only pairs answer
        return heads, keys[:, None].expand_as(heads), (bit * (1 - pad))[:, None].expand(-1, 2, -1, -1)

    def update(self, x, read):
        *_, pad, bit = self.split(x)
        both = torch.relu(read.sum(2) - 1)
        return torch.cat((x[..., :-1], pad * both + (1 - pad) * bit), -1)


class AverageAndThreshold(_Pads):
    """Every pair (i, j) averages its pads (i, k, j) over k; its bit becomes whether that is above 1 / 2n."""

    def project(self, x):
        i, _, j, pad, bit = self.split(x)
        both = torch.cat((i, j), -1)
        return both[:, None], (both * pad)[:, None], (bit * pad)[:, None]

    def update(self, x, read):
        *_, pad, bit = self.split(x)
        reached = (read[:, :, 0] > 1 / (2 * self.n)).to(x.dtype)
        return torch.cat((x[..., :-1], (1 - pad) * reached + pad * bit), -1)


def reach_program(n: int, loops: int):
    """The two blocks, looped; a row has n^2 pairs and n^3 pads."""
    stock = plain("Reachability", blocks=2, width=3 * n + 2)
    return apply_spec(stock, dp.Loop(start=0, end=2, times=loops), Context.of(stock))


def reach(adjacency: Tensor, loops: int) -> Tensor:
    """Reachability ``[n, n]`` after so many iterations, run by depthpass."""
    n = len(adjacency)
    eye, bits = torch.eye(n), (adjacency | torch.eye(n, dtype=torch.bool)).float()
    i, j = (t.flatten() for t in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    pairs = torch.cat((eye[i], torch.zeros(n * n, n), eye[j], torch.zeros(n * n, 1), bits[i, j][:, None]), 1)
    i, k, j = (t.flatten() for t in torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"))
    pads = torch.cat((eye[i], eye[k], eye[j], torch.ones(n**3, 1), torch.zeros(n**3, 1)), 1)
    host = HandMade([ReadAndAnd(n), AverageAndThreshold(n)])
    out, _ = execute(reach_program(n, loops), host, torch.cat((pairs, pads)))
    return out[: n * n, -1].reshape(n, n) > 0.5


def loops_for(n: int) -> int:
    """Iterations that suffice for every graph of n nodes: a path has at most n - 1 edges, and every iteration doubles."""
    return math.ceil(math.log2(max(2, n - 1)))


# Gradient descent --------------------------------------------------------------------------------------------------------


class LinearAttention:
    """f(Z) = Z + V Z (Z^T W Z) / n with causal attention: the new columns come last, and add nothing as keys."""

    causal = True

    def __init__(self, dim: int, n: int, eta: float):
        width = 2 * dim + 3
        x, w = slice(0, dim), slice(dim + 1, 2 * dim + 1)
        self.n = n
        self.value, self.form = torch.zeros(2, width, width, dtype=torch.float64)
        self.value[w, x] = -eta * torch.eye(dim, dtype=torch.float64)
        self.form[x, w] = torch.eye(dim, dtype=torch.float64)
        self.form[dim, 2 * dim + 1] = -1

    def project(self, x):
        return (x @ self.form.T)[:, None], x[:, None], (x @ self.value.T)[:, None]

    def attend(self, q, k, v, seen):
        scores = q @ k.mT
        scores = scores if seen is None else scores * seen
        return (scores @ v / self.n).transpose(1, 2)

    def update(self, x, read):
        return x + read[:, :, 0]


def descent_columns(xs: Tensor, ys: Tensor, w0: Tensor, thoughts: int = 0) -> Tensor:
    """Columns (x, y, w, 1, fed): the data, the first iterate, and empty columns that take the output before them."""
    n, dim = xs.shape
    z = torch.zeros(n + 1 + thoughts, 2 * dim + 3, dtype=torch.float64)
    z[:n, :dim], z[:n, dim] = xs, ys
    z[n, dim + 1 : 2 * dim + 1] = w0
    z[n:, 2 * dim + 1] = 1
    z[n + 1 :, 2 * dim + 2] = 1
    return z


def looped_descent(xs: Tensor, ys: Tensor, w0: Tensor, eta: float, steps: int) -> Tensor:
    """Iterate ``steps`` by looping one block; returns w ``[dim]``."""
    n, dim = xs.shape
    stock = plain("LinearAttention", blocks=1, width=2 * dim + 3)
    program = apply_spec(stock, dp.Loop(start=0, end=1, times=steps), Context.of(stock))
    out, _ = execute(program, HandMade([LinearAttention(dim, n, eta)]), descent_columns(xs, ys, w0))
    return out[-1, dim + 1 : 2 * dim + 1]


def thinking_program(dim: int):
    """Chain of thought without a bottleneck: the iterate of a column enters the next one through a delay."""
    return dp.parse_program(f"""
program LinearAttention blocks=1 width={2 * dim + 3}
  %0 = embed
  %1 = delay 1 (%5)
  %2 = linear iterate (%1) out {2 * dim + 3} bias false
  %3 = linear fed (%0) out 1 bias false
  %4 = mul (%2, %3)
  %6 = add (%0, %4)
  %5 = block 0 (%6) slot 0
  %7 = norm (%5)
  output %7
""")


def thinking_maps(dim: int) -> dict[str, nn.Module]:
    """The fixed maps of :func:`thinking_program`: keep w of the column before; read the flag that asks for it."""
    width = 2 * dim + 3
    maps = {"iterate": nn.Linear(width, width, bias=False), "fed": nn.Linear(width, 1, bias=False)}
    for m in maps.values():
        m.double().requires_grad_(False).weight.zero_()
    w = torch.arange(dim + 1, 2 * dim + 1)
    maps["iterate"].weight[w, w] = 1
    maps["fed"].weight[0, width - 1] = 1
    return maps


def thought_descent(xs: Tensor, ys: Tensor, w0: Tensor, eta: float, steps: int) -> Tensor:
    """All iterates 1..``steps`` as fed-back columns; returns w ``[steps, dim]``."""
    n, dim = xs.shape
    host = HandMade([LinearAttention(dim, n, eta)], thinking_maps(dim))
    out, _ = execute(thinking_program(dim), host, descent_columns(xs, ys, w0, steps - 1))
    return out[n:, dim + 1 : 2 * dim + 1]


def main() -> None:
    n = 17
    path = torch.diag(torch.ones(n - 1, dtype=torch.bool), 1)
    want = torch.ones(n, n, dtype=torch.bool).triu()
    for loops in range(1, loops_for(n) + 1):
        reached = reach(path, loops)
        print(f"path of {n} nodes, {loops} loops: {int((reached != want).sum())} of {n * n} pairs wrong")
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    ys = xs @ torch.randn(5, generator=generator, dtype=torch.float64)
    w, start = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    thoughts = thought_descent(xs, ys, start, 0.5, 16)
    for k in range(1, 17):
        w = w - 0.5 / len(xs) * xs.T @ (xs @ w - ys)
        if k in (1, 4, 16):
            looped = looped_descent(xs, ys, start, 0.5, k)
            print(f"gradient descent, {k} steps: loops off by {float((looped - w).abs().max()):.1e}, "
                  f"thoughts off by {float((thoughts[k - 1] - w).abs().max()):.1e}")
    print(dp.report(None, program=thinking_program(5), seq_len=36))


if __name__ == "__main__":
    main()
