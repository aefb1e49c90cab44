"""Rows with loop counts of their own in one batch: every other row takes one iteration, against all rows taking every one.

Whole calls of `generate` with a short prompt are timed. The floor is what the products of the blocks alone take on as many rows
as take each iteration: weights are read for few rows as for many. Numbers: each row's own loop written out by hand, of the first
two rows.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from declare import Benchmark, Measurement, Setting, Variant
from oracles import Greedy, Oracle, likeliest, loop
from torch import Tensor, nn
from workloads import build, tokens

import depthpass as dp
from depthpass.hf.decoding.row_depth import ladder_of


def of_products(weights: Sequence[Tensor], taking: Sequence[int]) -> float:
    """Time of the products of as many rows as take each iteration, over that of all rows in every one."""
    def seconds(rows: int) -> float:
        streams, best = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}, float("inf")
        for _ in range(9):
            start = time.perf_counter()
            for w in weights:
                nn.functional.linear(streams[w.shape[1]], w)
            best = min(best, time.perf_counter() - start)
        return best

    took = {rows: seconds(rows) for rows in set(taking)}
    return sum(took[rows] for rows in taking) / (took[taking[0]] * len(taking))


def measurements(s: Namespace) -> Iterator[Measurement]:
    stock = build(s.width, s.blocks).eval()
    model = dp.transform(stock, dp.Loop(times=s.times))
    weights = [m.weight.detach() for m in stock.model.layers.modules() if isinstance(m, nn.Linear)]
    by = {times: Oracle(stock, model, loop(0, s.blocks, times)) for times in (1, s.times)}
    for rows in s.rows:
        ids, most, mixed = tokens(rows, s.prompt), [s.times] * rows, [s.times, 1] * (rows // 2)
        ladder = ladder_of(model, sorted(set(mixed)))

        def row(counts, ids=ids, **options):
            return lambda: Greedy(model, ids, s.tokens, s.checked, [by[n] for n in counts[:2]], **options)

        right, share = likeliest(2, s.checked), ladder.visits(mixed) / ladder.visits(most)
        taking = [sum(t < n for n in mixed) for t in range(s.times)]
        yield Measurement("decode", f"{rows} rows, every other one once instead of {s.times} times", "all iterations", {
            "all iterations": Variant(row(most), right),
            "mixed": Variant(row(mixed, loops=mixed), right, floor=lambda taking=taking: of_products(weights, taking)),
            "all iterations through loops=": Variant(row(most, loops=most), right),
        }, per=s.tokens, notes=(f"floor: products alone; share of the visits {share:.2f}",))


BENCHMARK = Benchmark(
    (
        Setting("width", 512, 64),
        Setting("blocks", 4, 1),
        Setting("rows", (256, 16), (2,), "rows of the batch"),
        Setting("times", 3, 2),
        Setting("prompt", 8, 3, "tokens before the first decoded one"),
        Setting("tokens", 12, 3, "decoded tokens of one call"),
        Setting("checked", 6, 2, "decoded tokens that are checked"),
    ),
    ("decode",), measurements,
)
