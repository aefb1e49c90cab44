"""Parallel loops: one decoded token and prefill of stock, plain loop, PLT with and without stacked visits; bytes of keys.

bfloat16 on CPU by default, where a matrix product of a few rows costs what reading its weights costs. Numbers: parallel loops
by hand, token by token, in float32.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Answer, Benchmark, Measurement, Product, Setting, Variant
from oracles import Oracle, by_hand
from transformers import DynamicCache
from workloads import Forward, OurTokens, StockTokens, build, enliven, tokens

import depthpass as dp
from depthpass.hf.caches.cache import STOCK_NAME


class KeyBytes:
    """Bytes of keys and values that a cache holds after a row; the report's count is the oracle."""

    def __init__(self, model, ids: torch.Tensor, stock: bool):
        self.cache = DynamicCache(config=model.config) if stock else dp.DepthCache(model)
        with torch.no_grad():
            model(input_ids=ids, **{STOCK_NAME: self.cache}, use_cache=True, logits_to_keep=1)
        self.held = (
            sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers) if stock else self.cache.state.nbytes()[0]
        )

    def __call__(self) -> float:
        return self.held

    def answer(self) -> Answer:
        return {"bytes": torch.tensor(self.held)}


def program(loops: int, window: int, spec: dp.ParallelLoop):
    """PLT by hand, with gates on the query."""
    def want(row, p):
        def gate(name):
            return lambda q, x: (q * p[f"{name}.weight"]).sum(-1) + p[f"{name}.bias"]

        gates = [gate(f"parallel_loop.v{b}.gate") for b in range(len(row.blocks))]
        return by_hand.parallel_loop(row, loops, window, spec.mix, gates, shift=spec.shift, kv=spec.kv)

    return want


def measurements(s: Namespace) -> Iterator[Measurement]:
    positions = max(s.kv, s.prompt + s.steps + 8, s.prefill)
    stock = build(s.width, s.blocks, s.vocabulary, positions, s.width * 11 // 4).eval()
    stock.to(device=s.device, dtype=getattr(torch, s.dtype))
    ids = tokens(1, positions, s.device)
    prompt, row = ids[:, : s.prompt], ids[:, : s.prefill]
    checked = ids[:, : s.checked]
    whole = torch.cat((prompt, prompt[:, -1:]), 1)
    models, rights = {"identity program": dp.transform(stock, dp.Identity())}, {}
    rights["identity program"] = Oracle(
        stock, models["identity program"], lambda row, p: by_hand.layer_program(row, range(s.blocks)),
    )
    for r in s.loops:
        plain, spec = dp.ParallelLoop(loops=r, shift=0, mix=(0.0, 1.0), kv="own"), dp.ParallelLoop(loops=r, window=s.window)
        for label, model, used in (
            (f"plain loop R={r}", dp.transform(stock, plain), plain),
            (f"PLT R={r} unstacked", dp.transform(stock, spec, stack=False), spec),
            (f"PLT R={r} stacked", dp.transform(stock, spec), spec),
        ):
            models[label] = enliven(model)
            rights[label] = Oracle(stock, models[label], program(r, s.window, used))
    yield Measurement("token", f"PLT: one decoded token after {s.prompt}", "stock", {
        "stock": Variant(lambda: StockTokens(stock, prompt, steps=s.steps), rights["identity program"].scores(whole, last=True)),
        **{label: Variant(lambda m=m: OurTokens(m, prompt, s.steps), rights[label].scores(whole, last=True))
           for label, m in models.items()},
    }, per=s.steps, dtype=s.dtype)
    yield Measurement("prefill", f"PLT: prefill of {s.prefill} tokens", "stock", {
        "stock": Variant(lambda: Forward(stock, row, True)),
        **{label: Variant(lambda m=m: Forward(m, row, True, checked), rights[label].scores(checked, last=True))
           for label, m in models.items() if "unstacked" not in label},
    }, dtype=s.dtype)
    long = ids[:, : s.kv]
    yield Measurement("kv", f"bytes of keys and values after {s.kv} tokens", "stock", {
        "stock": Variant(lambda: KeyBytes(stock, long, True)),
        **{label: Variant(
            lambda m=m: KeyBytes(m, long, False),
            lambda m=m: {"bytes": torch.tensor(dp.report(m, seq_len=s.kv).kv_bytes)}, 0.0,
        ) for label, m in models.items() if label.endswith(" stacked")},
    }, quantity="value", unit="bytes", dtype=s.dtype)


BENCHMARK = Benchmark(
    (
        Setting("width", 1024, 64),
        Setting("blocks", 8, 2),
        Setting("vocabulary", 4096, 1024),
        Setting("loops", (2, 3), (2,), "loop counts"),
        Setting("window", 64, 3),
        Setting("prompt", 64, 5, "tokens in the cache before the first timed one"),
        Setting("steps", 8, 2, "decoded tokens of one call"),
        Setting("prefill", 512, 8, "tokens of the timed prefill"),
        Setting("checked", 48, 6, "tokens of the prefill whose numbers are checked"),
        Setting("kv", 4096, 9, "tokens at which bytes are counted"),
        Setting("dtype", "bfloat16", None, choices=("bfloat16", "float32")),
        Setting("device", "cpu", None, choices=("cpu", "cuda")),
    ),
    ("token", "prefill", "kv"), measurements,
    lambda s: [Product(r, s.width, s.width * 11 // 4) for r in (1, *s.loops)],
)
