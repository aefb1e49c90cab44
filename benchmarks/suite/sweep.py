"""TurboConn training step over the stock one, one size varied at a time: group, batch, tokens, width, blocks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from declare import Benchmark, Measurement, Product, Setting
from suite.turboconn import LEVELS, Configuration, products, training

AXES = {
    "group": (2, 4, 8, 16, 32), "batch": (1, 4, 8, 32), "tokens": (40, 156, 512), "width": (128, 256, 512, 1024),
    "blocks": (4, 8, 16),
}
TINY = {"group": (2,), "batch": (1,), "tokens": (5,), "width": (64,), "blocks": (4,)}


def configuration(s: Namespace, axis: str, value: int) -> Namespace:
    """The base configuration with one size changed; two overlapping bridges over three quarters of the blocks."""
    size = {name: getattr(s, name) for name in AXES} | {axis: value}
    source = size["blocks"] * 3 // 4
    bridges = (f"{source}-0", f"{source}-{size['blocks'] // 4}")
    return Namespace(**vars(s) | size, groups=(size["group"],), bridges=bridges, naive=False, identity=False, compiled=False)


def measurements(s: Namespace) -> Iterator[Measurement]:
    for axis in s.axes:
        for value in (TINY if s.tiny else AXES)[axis]:
            yield training(Configuration(configuration(s, axis, value)), f"{axis} {value}", (axis, value))


def every_product(s: Namespace) -> list[Product]:
    called = {p: None for axis in s.axes for v in (TINY if s.tiny else AXES)[axis] for p in products(configuration(s, axis, v))}
    return list(called)


BENCHMARK = Benchmark(
    (
        Setting("axes", tuple(AXES), ("batch",), "sizes to vary", tuple(AXES)),
        Setting("group", 4, 2),
        Setting("batch", 8, 2),
        Setting("tokens", 156, 9),
        Setting("width", 512, 64),
        Setting("blocks", 8, 4),
        Setting("lowering", ("auto",), None, "levels", LEVELS),
        Setting("dtype", "float32", None, choices=("float32", "bfloat16")),
        Setting("device", "cpu", None, choices=("cpu", "cuda")),
    ),
    ("training",), measurements, every_product,
)
