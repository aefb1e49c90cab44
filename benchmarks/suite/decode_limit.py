"""One decoded token at batch 1 against the time in which the memory it has to read can be copied.

The baseline copies half of the bytes that the stock model reads for a token (weights once, keys and values of the context), so
that as many bytes move; a row's floor is what it reads over that. Beside it stands what reading them alone takes. bfloat16 on a
CPU by default. Numbers: the stock model on the whole row, the naive grouped loop for TurboConn, loops by hand, token by token.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Benchmark, Measurement, Product, Setting, Variant
from naive import NaiveGroups
from oracles import Oracle, loop
from suite.plt import program
from suite.turboconn import LEVELS, pairs_of
from workloads import TOKENS, OurTokens, StockTokens, build, enliven, tokens

import depthpass as dp


class Read:
    """Reads so many bytes so many times and writes nothing, each time others: sums of float32.

    Ones, not zeros: pages of zeros that were never written are one page of memory, which stays in the cache.
    """

    def __init__(self, size: int, steps: int):
        whole = max(size, 1 << 26)
        self.parts, self.steps = torch.ones(whole // size * size // 4).split(size // 4), steps

    def __call__(self) -> None:
        for step in range(self.steps):
            self.parts[step % len(self.parts)].sum()


class Copy:
    """Copies so many bytes so many times, each time others: more than a cache holds. Ones, as for :class:`Read`."""

    def __init__(self, size: int, steps: int):
        whole = max(size, 1 << 26)
        self.pairs = [
            (a, b) for a, b in zip(*(torch.ones(whole // size * size, dtype=torch.uint8).split(size) for _ in range(2)))
        ]
        self.steps = steps

    def __call__(self) -> None:
        for step in range(self.steps):
            a, b = self.pairs[step % len(self.pairs)]
            b.copy_(a)


def weights(model: torch.nn.Module, visits: int) -> int:
    """Bytes of weights that one token reads, those of a block so many times."""
    layers = model.model.layers
    block = sum(p.nbytes for p in layers[0].parameters())
    rest = sum(p.nbytes for part in (model.model.norm, model.lm_head) for p in part.parameters())
    new = sum(p.nbytes for p in model.depth.parameters()) if hasattr(model, "depth") else 0
    return visits * block + rest + new


def keys(model: torch.nn.Module, tokens_held: int, slots: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    config = model.config
    return 2 * slots * tokens_held * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def measurements(s: Namespace) -> Iterator[Measurement]:
    dtype = getattr(torch, s.dtype)
    stock = build(s.width, s.blocks, vocabulary=s.vocabulary).eval().to(dtype)
    ids = tokens(1, s.context)
    whole = torch.cat((ids, ids[:, -1:]), 1)
    steps = 2 if s.tiny else TOKENS
    bridges, half = pairs_of(s.bridges), s.blocks // 2
    looped, plt = dp.Loop(start=half, end=s.blocks, times=s.times), dp.ParallelLoop(loops=2, window=s.window)

    def ours(spec):
        return enliven(dp.transform(stock, spec, lowering=s.lowering))

    models = {
        "stock (identity program)": dp.transform(stock, dp.Identity(), lowering=s.lowering),
        "TurboConn": ours(dp.TurboConn(bridges=bridges, group=s.group)), f"loop {s.times}": ours(looped), "PLT-2": ours(plt),
    }

    @torch.no_grad()
    def plain():
        return {"logits": stock(input_ids=whole, use_cache=False).logits[:, -1:]}

    @torch.no_grad()
    def naive():
        depth = models["TurboConn"].depth.turboconn
        parts = [(d, e, depth.get_submodule(f"s{d}_d{e}.down"), depth.get_submodule(f"s{d}_d{e}.up")) for d, e in bridges]
        return {"logits": NaiveGroups(stock, parts, s.group).logits(whole)[:, -1:]}

    rights = {
        "stock (identity program)": plain, "TurboConn": naive,
        f"loop {s.times}": Oracle(stock, models[f"loop {s.times}"], loop(half, s.blocks, s.times)).scores(whole, last=True),
        "PLT-2": Oracle(stock, models["PLT-2"], program(2, s.window, plt)).scores(whole, last=True),
    }
    visits = s.blocks + (s.times - 1) * (s.blocks - half)
    held = s.context + steps // 2
    # Stacked visits read a block's weights once; PLT's second loop reads the keys of the first and a window of its own.
    counts = {
        "stock (identity program)": (s.blocks, keys(stock, held, s.blocks)), "TurboConn": (s.blocks, keys(stock, held, s.blocks)),
        f"loop {s.times}": (visits, keys(stock, held, visits)),
        "PLT-2": (s.blocks, keys(stock, held, s.blocks) + keys(stock, min(held, s.window), s.blocks)),
    }
    base = weights(stock, s.blocks) + keys(stock, held, s.blocks)
    variants = {"copy": Variant(lambda: Copy(base // 2, steps)), "read alone": Variant(lambda: Read(base, steps))}
    if s.compiled:
        variants["stock, torch.compile"] = Variant(lambda: StockTokens(stock, ids, True, steps), plain, floor=1.0)
    for label, model in models.items():
        times, kv = counts[label]
        variants[label] = Variant(
            lambda m=model: OurTokens(m, ids, steps), rights[label], floor=(weights(model, times) + kv) / base,
        )
    yield Measurement(
        "token", f"one decoded token against a copy ({torch.get_num_threads()} threads)", "copy", variants, per=steps,
        dtype=s.dtype, notes=(f"a stock token reads {base / 1e6:.1f} MB, the copy reads and writes half as many each; the share "
                              "of the floor that a row reaches is 1 / (over floor)",),
    )


BENCHMARK = Benchmark(
    (
        Setting("width", 1024, 64),
        Setting("blocks", 8, 4),
        Setting("vocabulary", 1024, None, "rows of the head"),
        Setting("context", 128, 6, "tokens in the cache"),
        Setting("group", 4, 2),
        Setting("bridges", ("6-0", "6-2"), ("2-0",), "source-destination of each bridge"),
        Setting("times", 4, 2, "iterations of the loop over the second half of the blocks"),
        Setting("window", 64, 4, "of PLT's second loop"),
        Setting("lowering", "inductor", "auto", "level", LEVELS),
        Setting("compiled", True, False, "time torch.compile of the stock model as well"),
        Setting("dtype", "bfloat16", "float32", choices=("float32", "bfloat16")),
    ),
    ("token",), measurements, lambda s: [Product(1, s.width, s.width * 8 // 3)],
)
