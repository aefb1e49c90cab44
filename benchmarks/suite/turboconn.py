"""TurboConn training step and forward pass over the stock model, beside the naive grouped loop and the floor.

Numbers: outputs and every gradient against the naive loop (`benchmarks/naive.py`), with random non-zero bridges.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from declare import Benchmark, Measurement, Product, Setting, Variant
from floors import floor, forward_floor
from naive import NaiveGroups
from workloads import VOCABULARY, Forward, NaiveStep, TrainingStep, build, enliven, tokens

import depthpass as dp
from depthpass.analysis.roofline import ceilings

LEVELS = ("auto", "eager", "scheduled", "inductor", "cudagraph")


def pairs_of(bridges: tuple[str, ...]) -> list[tuple[int, int]]:
    """``6-0`` as ``(6, 0)``."""
    return [tuple(map(int, b.split("-"))) for b in bridges]


class Configuration:
    """Models of one size, each built when it is first asked for."""

    def __init__(self, s: Namespace):
        self.s, self.dtype, self.bridges = s, getattr(torch, s.dtype), pairs_of(s.bridges)
        self.ids = tokens(s.batch, s.tokens, s.device)
        self.measured = ceilings(s.device, self.dtype, **({"width": 128, "copies": 4, "repeat": 1} if s.tiny else {}))

    @functools.cached_property
    def stock(self):
        return build(self.s.width, self.s.blocks).train().to(device=self.s.device, dtype=self.dtype)

    @functools.cached_property
    def compiled(self):
        return torch.compile(self.stock)

    @functools.cached_property
    def identity(self):
        return dp.transform(self.stock, dp.Identity())

    @functools.cache  # noqa: B019 (lives as long as the measurements)
    def turbo(self, group: int, level: str):
        return enliven(dp.transform(self.stock, dp.TurboConn(bridges=self.bridges, group=group), lowering=level))

    @functools.cache  # noqa: B019
    def naive(self, group: int) -> NaiveStep:
        """The naive loop, with bridges of a transformed model that runs nothing itself."""
        model = self.turbo(group, "eager")
        parts = [
            (d, e, model.depth.get_submodule(f"turboconn.s{d}_d{e}.down"), model.depth.get_submodule(f"turboconn.s{d}_d{e}.up"))
            for d, e in self.bridges
        ]
        return NaiveStep(NaiveGroups(self.stock, parts, group), self.ids, model)

    def floor(self, kind: Callable, group: int) -> float:
        s = self.s
        sizes = [s.batch * min(group, s.tokens - a) for a in range(0, s.tokens, group)]
        serial = self.turbo(group, "eager").depth_schedule.serial_visits
        block = sum(p.numel() for p in self.stock.model.layers[0].parameters())
        return kind(self.measured.flops_per_s, self.measured.bytes_per_s, s.batch * s.tokens, sizes, s.blocks, serial, block,
                    VOCABULARY * s.width, self.dtype.itemsize)

    def notes(self) -> tuple[str, ...]:
        m = self.measured
        return (f"ceilings of this run: {m.flops_per_s / 1e9:.0f} GFLOP/s, {m.bytes_per_s / 1e9:.1f} GB/s",)


def training(c: Configuration, title: str = "TurboConn training step", axis: tuple[str, int] | None = None) -> Measurement:
    """Forward, loss, backward of every variant."""
    s, stock = c.s, c.stock
    right = TrainingStep(stock, c.ids).answer
    variants = {"stock": Variant(lambda: TrainingStep(stock, c.ids))}
    if s.compiled:
        variants["stock compiled"] = Variant(lambda: TrainingStep(c.compiled, c.ids), right)
    if s.identity:
        variants["identity"] = Variant(lambda: TrainingStep(c.identity, c.ids), right)
    for g in s.groups:
        by_hand = c.naive(g).answer
        for level in s.lowering:
            # In a sweep the size that varies is in the title, and a level is one line of the picture.
            variants[level if axis else f"g={g} {level}"] = Variant(
                lambda g=g, level=level: TrainingStep(c.turbo(g, level), c.ids), by_hand, floor=c.floor(floor, g),
            )
        if s.naive:
            variants[f"g={g} naive"] = Variant(lambda g=g: c.naive(g))
    return Measurement("training", title, "stock", variants, dtype=s.dtype, notes=c.notes(), axis=axis)


def forward(c: Configuration) -> Measurement:
    """The same models without gradients."""
    s, stock = c.s, c.stock
    right = Forward(stock, c.ids).answer
    variants = {"stock": Variant(lambda: Forward(stock, c.ids))}
    if s.compiled:
        variants["stock compiled"] = Variant(lambda: Forward(c.compiled, c.ids), right)
    if s.identity:
        variants["identity"] = Variant(lambda: Forward(c.identity, c.ids), right)
    for g in s.groups:
        def by_hand(g=g):
            with torch.no_grad():
                return {"logits": c.naive(g).naive.logits(c.ids)}

        for level in s.lowering:
            variants[f"g={g} {level}"] = Variant(
                lambda g=g, level=level: Forward(c.turbo(g, level), c.ids), by_hand, floor=c.floor(forward_floor, g),
            )
    return Measurement("forward", "TurboConn forward", "stock", variants, dtype=s.dtype, notes=c.notes())


def measurements(s: Namespace) -> Iterator[Measurement]:
    c = Configuration(s)
    yield training(c)
    yield forward(c)


def products(s: Namespace) -> list[Product]:
    """The widest product of a block: at the rows of a chunk, as often as there are chunks, and over all tokens at once."""
    inner = s.width * 8 // 3
    return [
        *(Product(s.batch * g, s.width, inner, -(-s.tokens // g)) for g in s.groups), Product(s.batch * s.tokens, s.width, inner),
    ]


SETTINGS = (
    Setting("groups", (4, 8, 16), (2,), "tokens of a chunk"),
    Setting("width", 512, 64),
    Setting("blocks", 8, 4),
    Setting("batch", 8, 2),
    Setting("tokens", 156, 9),
    Setting("bridges", ("6-0", "6-2"), ("2-0", "3-1"), "source-destination of each bridge"),
    Setting("lowering", ("auto",), None, "levels", LEVELS),
    Setting("dtype", "float32", None, choices=("float32", "bfloat16")),
    Setting("device", "cpu", None, choices=("cpu", "cuda")),
    Setting("naive", True, None, "time the naive loop as well"),
    Setting("identity", True, None, "time the identity program as well"),
    Setting("compiled", False, None, "time torch.compile of the stock model as well"),
)
BENCHMARK = Benchmark(SETTINGS, ("training", "forward"), measurements, products)
