"""Naive oracles of whole programs: the stock model's own blocks, one token of one row at a time, without a program.

The blocks' attention is replaced by a softmax over a Python list of keys that belongs to one visit (the fuzzer's
:mod:`depthpass.fuzz.stock_rows`, which knows stock models only). Every system below is written down as in its paper, in the
fewest lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.fuzz import stock_rows
from depthpass.fuzz.models import blocks_of, norm_of  # noqa: F401 - tests take it from here
from depthpass.fuzz.stock_rows import list_attention

Limits = dict[str, Any]
"""What the stock layer says of its attention: ``scale``, ``window``, ``chunk``, ``softcap``, ``sinks``."""


class Keys(list):
    """Keys and values of one visit: ``(k [kv_heads, dim], v [kv_heads, dim], column)`` per token it ran for."""

    def read(self, q: Tensor, limits: Limits) -> Tensor:
        """Softmax attention of one query ``[heads, dim]`` at the newest column."""
        return stock_rows.read(q, self, self[-1][2], limits)


Visit = Callable[[Tensor, Tensor, Tensor, Limits, int], Tensor]
"""What a visit does with one token's (q, k, v, the layer's limits, column): the attention's result."""


def own(keys: Keys) -> Visit:
    """A visit with a slot of its own."""
    def visit(q, k, v, limits, column):
        keys.append((k, v, column))
        return keys.read(q, limits)

    return visit


def shared(keys: Keys) -> Visit:
    """A visit that reads the keys of another one, which has run for this token already."""
    def visit(q, k, v, limits, column):
        seen = Keys(e for e in keys if e[2] <= column)
        return seen.read(q, limits)

    return visit


def updated(keys: Keys, mine: Keys) -> Visit:
    """A visit that reads the keys of another one, and its own in the place of those of tokens that have some."""
    def visit(q, k, v, limits, column):
        mine.append((k, v, column))
        latest = {e[2]: e for e in (*keys, *mine) if e[2] <= column}
        return Keys(latest[c] for c in sorted(latest)).read(q, limits)

    return visit


def queried(keys: Keys, queries: list[Tensor]) -> Visit:
    """A visit with a slot of its own whose queries are those caught by :func:`caught` before."""
    def visit(q, k, v, limits, column):
        keys.append((k, v, column))
        return keys.read(queries[-1], limits)

    return visit


def caught(queries: list[Tensor]) -> Visit:
    """Keeps the queries of what a block is given; what it gives is not used."""
    def visit(q, k, v, limits, column):
        queries.append(q)
        return torch.zeros(q.shape[0], v.shape[1], dtype=v.dtype)

    return visit


def split(keys: Keys, kept: Keys, ends: Sequence[int]) -> Visit:
    """A visit that reads its own keys of the running call, and ``kept`` ones of the calls that ended before it."""
    def visit(q, k, v, limits, column):
        keys.append((k, v, column))
        start = max((e for e in ends if e <= column), default=0)
        seen = Keys([e for e in kept if e[2] < start] + [e for e in keys if e[2] >= start])
        return seen.read(q, limits)

    return visit


def gated(first: Keys, ring: Keys, size: int, gate: Callable[[Tensor], Tensor]) -> Visit:
    """PLT: g * Attn(q, first loop's keys) + (1 - g) * Attn(q, own last ``size`` keys)."""
    def visit(q, k, v, limits, column):
        ring.append((k, v, column))
        del ring[:-size]
        g = torch.sigmoid(gate(q))[:, None]
        return g * first.read(q, limits) + (1 - g) * ring.read(q, limits)

    return visit


oracle_attention = list_attention
"""The stock model with attention over lists for the time of a ``with``."""


class Row(stock_rows.Row):
    """One row without padding: its embeddings, its blocks one token at a time, its head.

    Args:
        ids, positions: ``[tokens]``.
    """

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def block(self, index: int, x: Tensor, i: int, visit: Visit) -> Tensor:
        """Stock block ``index`` on token i, ``[width]``; the visit answers its attention."""
        return super().block(index, x, i, lambda q, k, v, limits: visit(q, k, v, limits, i))

    def norm(self, x: Tensor) -> Tensor:
        return norm_of(self.model)(x)

    def logits(self, stream: Tensor) -> Tensor:
        """What the stock model makes of a stream ``[tokens, width]`` after its last block."""
        return self.head(self.norm(stream))


def layer_program(row: Row, layers: Sequence[int]) -> Tensor:
    """Any list of visits; every visit has its own keys."""
    slots = [Keys() for _ in layers]
    out = []
    for i in range(row.tokens):
        x = row.embed[i]
        for index, keys in zip(layers, slots, strict=True):
            x = row.block(index, x, i, own(keys))
        out.append(x)
    return torch.stack(out)


def loop(
    row: Row, start: int, end: int, times: int, *, damped=False, inject=None, state="input", kv="own", adapter=None,
    noise=None, norms=(), bptt=None, around=lambda t, b: nullcontext(), calls: Sequence[int] = (),
) -> list[Tensor]:
    """Prelude, core ``times`` times, coda; the stream after the coda for every iteration's state, last one last.

    ``bptt``: the state that enters the last so many iterations is detached. ``around(t, b)`` is a context in which block b
    runs in iteration t. ``calls`` are the sizes of the calls that the tokens come in (none = one call): with ``kv="last"``
    or ``"mod:k"`` earlier calls' keys are those of another iteration.
    """
    n, slots = len(row.blocks), {}
    streams = [[] for _ in range(times)]

    ends = list(accumulate(calls))

    def visit(key, first):
        keys = slots.setdefault(key, Keys())
        if kv.startswith(("last", "mod", "anchor")) and isinstance(key, tuple) and key[-1] != "coda" and key[0] is not None:
            t, b = key
            k = 1 if kv == "last" else int(kv.partition(":")[2])
            kept = (t if t < k else times - 1) if kv.startswith("anchor") else times - 1 - (times - 1 - t) % k
            return split(keys, slots.setdefault((kept, b), Keys()), ends)
        return own(keys) if first is None else shared(slots[first])

    for i in range(row.tokens):
        e = row.embed[i]
        for b in range(start):
            e = row.block(b, e, i, visit((None, b), None))
        s = {"input": e, "zeros": torch.zeros_like(e), "noise": None if noise is None else noise[i]}[state]
        for t in range(times):
            if t and "loop" in norms:
                s = row.norm(s)
            s = s.detach() if bptt is not None and t == times - bptt else s
            x = s + e if inject == "add" and s is not e else s
            if inject == "concat":
                weight, bias = adapter
                x = weight @ torch.cat((s, e)) + bias
            if inject == "bounded":
                keep, give = adapter
                x = s / (1 + torch.exp(-keep / 2)) + give * e
            x = e if inject == "attention" else x
            for b in range(start, end):
                if t and inject == "attention":
                    row.block(b, s, i, caught(queries := []))
                    x = row.block(b, x, i, queried(slots.setdefault((t, b), Keys()), queries))
                    continue
                with around(t, b):
                    x = row.block(b, x, i, visit((t, b), (0, b) if t and kv == "first" else None))
            s = s + (x - s) / times if damped and times > 1 else x
            y = row.norm(s) if "out" in norms else s
            for b in range(end, n):
                y = row.block(b, y, i, visit((t, b, "coda"), None))
            streams[t].append(y)
    return [torch.stack(x) for x in streams]


def exits(
    row: Row, start: int, end: int, times: int, limit: float, criterion: str, gate: Callable[[Tensor], Tensor], *,
    kv="own", inject=None, adapter=None, noise=None, out_norm=False,
) -> tuple[Tensor, list[int]]:
    """A loop that tokens leave early; returns the stream after the coda and how many iterations each token ran.

    ``gate(s)`` is the exit probability after a state. A token that left writes no keys in later iterations, neither in the
    core nor in the coda that a prediction runs through; with ``kv="latest"`` those of the core that it wrote last stand there.
    """
    slots, out, ran = {}, [], []

    def stay(i, count):
        """Copies what token i wrote last into the iterations that it does not take."""
        for b in range(start, end):
            entry = next(e for e in slots[count - 1, b] if e[2] == i)
            for t in range(count, times):
                slots.setdefault((t, b), Keys()).append(entry)

    def visit(key, first):
        keys = slots.setdefault(key, Keys())
        return own(keys) if first is None else shared(slots[first])

    def coda(s, i, key):
        x = row.norm(s) if out_norm else s
        for b in range(end, len(row.blocks)):
            x = row.block(b, x, i, visit((key, b, "coda"), None))
        return x

    def predict(s, i, t):
        return torch.softmax(row.logits(coda(s, i, t)[None])[0], -1)

    def distance(p, q):
        if criterion == "state":
            return (p - q).norm() / p.norm()
        if criterion == "cosine":
            return 1 - (p * q).sum() / (p.norm() * q.norm())
        if criterion == "kl":
            return (q * (q / p).log()).sum()
        return (-(p * p.log()).sum() + (q * q.log()).sum()).abs()

    for i in range(row.tokens):
        e = row.embed[i]
        for b in range(start):
            e = row.block(b, e, i, visit(b, None))
        s, survival = e if noise is None else noise[i], 1.0
        vocabulary = row.model.config.vocab_size
        before = {"state": s, "cosine": s, "kl": torch.full((vocabulary,), 1 / vocabulary, dtype=e.dtype)}.get(criterion)
        tops = []
        for t in range(times):
            x = s + e if inject == "add" and s is not e else s
            if inject == "concat":
                x = adapter[0] @ torch.cat((s, e)) + adapter[1]
            for b in range(start, end):
                x = row.block(b, x, i, visit((t, b), (0, b) if t and kv == "first" else None))
            s, count = x, t + 1
            survival = survival * (1 - gate(s).item())
            if criterion == "cdf" and 1 - survival >= limit:
                break
            if criterion == "argmax" and count < times:
                tops.append(int(predict(s, i, t).argmax()))
                if len(tops) > limit and len(set(tops[-int(limit) - 1 :])) == 1:
                    break
            elif criterion != "cdf" and count < times:
                now = s if criterion in ("state", "cosine") else predict(s, i, t)
                if before is not None and distance(now, before).item() < limit:
                    break
                before = now
        ran.append(count)
        if kv == "latest":
            stay(i, count)
        out.append(coda(s, i, "end"))
    return torch.stack(out), ran


def parallel_loop(
    row: Row, loops: int, window: int, mix, gates: Sequence[Callable[[Tensor, Tensor], Tensor]], *, per_loop=False,
    shift=1, kv="gated",
) -> Tensor:
    """PLT, token by token; ``gates[p](q, x)`` gives one score per head from the query or from the block's input."""
    n, (a, b) = len(row.blocks), mix
    keys = {(r, p): Keys() for r in range(loops) for p in range(n)}
    last, out = [], []
    for i in range(row.tokens):
        here = []
        for r in range(loops):
            x = row.embed[i]
            if r:
                source = here if shift == 0 else last[i - shift] if i >= shift else None
                x = a * row.embed[i] + (0 if source is None else b * source[r - 1])
            for p in range(n):
                if r == 0 or kv == "own":
                    visit = own(keys[r, p])
                elif kv == "first":
                    visit = shared(keys[0, p])
                else:
                    visit = gated(keys[0, p], keys[r, p], window, lambda q, p=p, x=x: gates[p](q, x))
                x = row.block(p, x, i, visit)
            here.append(row.norm(x) if per_loop else x)
            final = x
        last.append(here)
        out.append(final)
    return torch.stack(out)


def best(scores: Sequence[float], among: Sequence[int], k: int) -> list[int]:
    """The k best tokens, ties to the earlier one, in order."""
    return sorted(sorted(among, key=lambda j: (-scores[j], j))[:k])


def mixture(
    row: Row, start: int, end: int, recursions: int, routers: Sequence[Tensor], *, mode="topk", kv="recursion",
    combine="paper", alpha=0.1, strength: Sequence[Tensor] = (), capacity: Sequence[float] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Mixture-of-Recursions, expert choice; returns the stream and the active tokens of every recursion."""
    n, everyone = len(row.blocks), list(range(row.tokens))
    streams = list(row.embed)
    slots = {b: Keys() for b in range(n)}
    for b in range(start):
        streams = [row.block(b, x, i, own(slots[b])) for i, x in enumerate(streams)]
    active, taken = everyone, []
    first = {b: Keys() for b in range(start, end)}
    for r in range(1, recursions + 1):
        keys = first if r == 1 else {b: Keys() for b in range(start, end)}
        weights = None
        if r > 1 or combine == "paper":
            chance = [torch.sigmoid(x @ routers[r - 1].flatten()) for x in streams]
            share = capacity[r - 1] if capacity else (recursions - r + 1) / recursions
            if mode == "topk":
                active = best([c.item() for c in chance], active, max(1, int(share * row.tokens)))
            elif not (r == 1 and kv == "shared"):
                active = [i for i in active if chance[i] >= 0.5]
            weights = [(alpha if combine == "paper" else strength[r - 1]) * c for c in chance]
        taken.append(active)
        new = list(streams)
        for i in active:
            y = streams[i]
            for b in range(start, end):
                y = row.block(b, y, i, shared(first[b]) if kv == "shared" and r > 1 else own(keys[b]))
            if weights is None:
                new[i] = y
            else:
                new[i] = streams[i] + weights[i] * (y - streams[i] if combine == "delta" else y)
        streams = new
    for b in range(end, n):
        streams = [row.block(b, x, i, own(slots[b])) for i, x in enumerate(streams)]
    return torch.stack(streams), taken


def inner_thinking(
    row: Row, layers: Sequence[int], steps: int, routers: dict, phi: dict, *, mode="topk", ratio=0.7, alpha=1.0,
    bypass="none",
) -> Tensor:
    """ITT: one full pass of a block, then steps - 1 routed ones whose queries see the keys of all current states."""
    streams = list(row.embed)
    for b in range(len(row.blocks)):
        keys = Keys()
        streams = [row.block(b, x, i, own(keys)) for i, x in enumerate(streams)]
        if b not in layers:
            continue
        acc, cur = [phi[b, 0] * y for y in streams], streams
        for t in range(1, steps):
            w = [torch.sigmoid(x @ routers[b, t].flatten()) for x in cur]
            scores = [v.item() for v in w]
            chosen = [i for i, v in enumerate(scores) if v >= 0.5]
            if mode == "topk":
                chosen = best(scores, range(row.tokens), math.ceil(ratio * row.tokens))
            keys = Keys()
            z = [row.block(b, x, i, own(keys)) for i, x in enumerate(cur)]
            acc = [
                a + phi[b, t] * alpha * w[i] * z[i] if i in chosen
                else a + phi[b, t] * cur[i] if bypass == "literal" else a
                for i, a in enumerate(acc)
            ]
            cur = acc
        streams = cur
    return torch.stack(streams)


def compare(
    stock: nn.Module, transformed: nn.Module, batch: dict[str, Tensor], want: Callable, limit: float = 1e-8, counted: bool = False
) -> None:
    """Outputs and every gradient of a transformed model against an oracle, row by row.

    Args:
        want: ``(row, parameters by name) -> stream`` after the last block; called under :func:`oracle_attention`.
        counted: rows are numbered by their own tokens, not by columns.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    columns = torch.arange(ids.shape[1])
    stock.zero_grad(), transformed.zero_grad()
    got = transformed(**batch).logits
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=got.dtype)
    (got * weight)[mask].sum().backward()
    mine = {n: p.grad.clone() for n, p in transformed.named_parameters() if p.grad is not None}
    stock.zero_grad(), transformed.zero_grad()
    values = {n: p.detach().clone().requires_grad_() for n, p in transformed.depth.named_parameters()}
    loss = 0.0
    with oracle_attention(stock):
        for r in range(len(ids)):
            real = mask[r]
            row = Row(stock, ids[r, real], columns[: int(real.sum())] if counted else columns[real])
            logits = row.logits(want(row, values))
            torch.testing.assert_close(got[r, real], logits, rtol=1e-9, atol=1e-9)
            loss = loss + (logits * weight[r, real]).sum()
        loss.backward()
    theirs = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    theirs |= {f"depth.{n}": v.grad for n, v in values.items() if v.grad is not None}
    assert mine.keys() == theirs.keys(), sorted(mine.keys() ^ theirs.keys())
    for n, g in theirs.items():
        # Gemma, Cohere and Helium multiply by their norm weights in float32 whatever the model's dtype.
        tolerance = 1e-6 if re.search("gemma|cohere|helium", type(stock).__name__, re.I) and "norm" in n else limit
        assert (mine[n] - g).abs().max() <= tolerance * g.abs().max().clamp_min(1e-12), n
