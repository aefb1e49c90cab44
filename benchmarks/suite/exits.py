"""Adaptive exits in decode: one token on a cache, leaving the loop after half of the iterations, against all of them.

The exit gate is a constant, so every token leaves after the same iteration. The floor is the share of block visits that are
left. "after all" is the price of asking. Numbers: the loop with exits by hand, token by token.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Benchmark, Measurement, Setting, Variant
from oracles import Oracle, by_hand, loop
from workloads import OurTokens, build, tokens

import depthpass as dp

CHECKED = 2
"""Rows that are checked."""


def constant_exit(model, after: int):
    """Let every token leave after so many iterations, at q = 0.5."""
    gate = model.depth.loop.exit
    with torch.no_grad():
        gate.weight.zero_()
        # 1 - (1 - p)^after passes 0.5, 1 - (1 - p)^(after - 1) does not.
        gate.bias.fill_(torch.logit(torch.tensor(1 - 0.5 ** (1 / (after - 0.5)))))
    return model


def measurements(s: Namespace) -> Iterator[Measurement]:
    stock = build(s.width, s.blocks).eval()
    ids = tokens(s.batch, s.tokens)
    rows = list(range(min(CHECKED, s.batch)))
    whole = torch.cat((ids, ids[:, -1:]), 1)[rows]
    start, end, half = s.outer, s.blocks - s.outer, s.times // 2
    core = {"start": start, "end": end, "times": s.times}
    visits = 2 * s.outer + s.times * (end - start)
    every = dp.transform(stock, dp.Loop(**core)).eval()
    variants = {"all iterations": Variant(
        lambda: OurTokens(every, ids, 1, rows), Oracle(stock, every, loop(start, end, s.times)).scores(whole, last=True),
    )}
    for kv in s.kv:
        for after in (half, s.times):
            model = constant_exit(dp.transform(stock, dp.Loop(**core, kv=kv, exit=0.5)).eval(), after)

            def leaving(row, p, kv=kv):
                def gate(x):
                    return torch.sigmoid(p["loop.exit.weight"] @ row.norm(x) + p["loop.exit.bias"])

                return by_hand.exits(row, start, end, s.times, 0.5, "cdf", gate, kv=kv)[0]

            variants[f"exit after {'half' if after == half else 'all'}, kv {kv}"] = Variant(
                lambda model=model: OurTokens(model, ids, 1, rows), Oracle(stock, model, leaving).scores(whole, last=True),
                floor=(visits - (s.times - after) * (end - start)) / visits,
            )
    yield Measurement("token", f"decode one token: exits of {s.times} iterations", "all iterations", variants)


BENCHMARK = Benchmark(
    (
        Setting("width", 512, 64),
        Setting("blocks", 4, 1),
        Setting("outer", 0, None, "blocks before, and as many after, the loop"),
        Setting("times", 8, 2),
        Setting("batch", 1),
        Setting("tokens", 64, 4, "tokens in the cache"),
        Setting("kv", ("own", "first"), ("first",), "keys of later iterations", ("own", "first")),
    ),
    ("token",), measurements,
)
