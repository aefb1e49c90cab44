"""One decoded token at batch 1: stock eager and compiled, TurboConn and the identity program by level.

Stock compiled is torch.compile of the stock forward over transformers' static cache. Numbers: the stock model on the whole row,
and the naive grouped loop for TurboConn.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Benchmark, Measurement, Product, Setting, Variant
from naive import NaiveGroups
from suite.turboconn import LEVELS, pairs_of
from workloads import TOKENS, OurTokens, StockTokens, build, enliven, tokens

import depthpass as dp
from depthpass.analysis.roofline import ceilings


def measurements(s: Namespace) -> Iterator[Measurement]:
    dtype = getattr(torch, s.dtype)
    stock = build(s.width, s.blocks).eval().to(device=s.device, dtype=dtype)
    ids = tokens(1, s.context, s.device)
    whole = torch.cat((ids, ids[:, -1:]), 1)
    bridges = pairs_of(s.bridges)
    steps = 2 if s.tiny else TOKENS

    def turbo(level: str):
        return enliven(dp.transform(stock, dp.TurboConn(bridges=bridges, group=s.group), lowering=level))

    @torch.no_grad()
    def plain():
        return {"logits": stock(input_ids=whole, use_cache=False).logits[:, -1:]}

    @torch.no_grad()
    def naive():
        depth = turbo("eager").depth.turboconn
        parts = [(d, e, depth.get_submodule(f"s{d}_d{e}.down"), depth.get_submodule(f"s{d}_d{e}.up")) for d, e in bridges]
        return {"logits": NaiveGroups(stock, parts, s.group).logits(whole)[:, -1:]}

    variants = {"stock eager": Variant(lambda: StockTokens(stock, ids, steps=steps), plain)}
    if s.compiled:
        variants["stock compiled"] = Variant(lambda: StockTokens(stock, ids, True, steps), plain)
    for level in s.lowering:
        variants[f"turboconn {level}"] = Variant(lambda level=level: OurTokens(turbo(level), ids, steps), naive)
        variants[f"identity {level}"] = Variant(
            lambda level=level: OurTokens(dp.transform(stock, dp.Identity(), lowering=level), ids, steps), plain,
        )
    weights = sum(p.nbytes for n, p in stock.named_parameters() if "embed" not in n)
    rate = ceilings(s.device, dtype, **({"width": 128, "copies": 4, "repeat": 1} if s.tiny else {})).bytes_per_s
    yield Measurement(
        "token", "one decoded token", "stock compiled" if s.compiled else "stock eager", variants, per=steps, dtype=s.dtype,
        notes=(f"reading the weights once takes {weights / rate * 1e3:.2f} ms",),
    )


BENCHMARK = Benchmark(
    (
        Setting("width", 512, 64),
        Setting("blocks", 8, 4),
        Setting("context", 128, 6, "tokens in the cache"),
        Setting("group", 4, 2),
        Setting("bridges", ("6-0", "6-2"), ("2-0",), "source-destination of each bridge"),
        Setting("lowering", ("eager", "inductor"), ("auto",), "levels", LEVELS),
        Setting("compiled", True, False, "time torch.compile of the stock model, and compare with it"),
        Setting("dtype", "float32", None, choices=("float32", "bfloat16")),
        Setting("device", "cpu", None, choices=("cpu", "cuda")),
    ),
    ("token",), measurements, lambda s: [Product(1, s.width, s.width * 8 // 3)],
)
