"""First training step and first forward pass: torch.compile of the stock model against the compiled level, or other levels.

Every row is a process of its own with Inductor's caches off. With ``--level auto`` nothing is compiled, and the first call is the
capture. Numbers are checked after the step that is timed: the stock model,
and the naive grouped loop.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Answer, Benchmark, Measurement, Setting, Variant
from suite.turboconn import Configuration
from workloads import Forward, TrainingStep


class FirstStep:
    """Seconds of the first step, capture and compilation included."""

    def __init__(self, model, ids: torch.Tensor):
        self.step, self.device = TrainingStep(model, ids), ids.device

    def __call__(self) -> float:
        start = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def answer(self) -> Answer:
        return self.step.answer()


class FirstForward(FirstStep):
    """The same of a forward pass without gradients."""

    def __init__(self, model, ids: torch.Tensor):
        self.step, self.device = Forward(model, ids), ids.device


def measurements(s: Namespace) -> Iterator[Measurement]:
    c = Configuration(s)
    compiled = s.level == "inductor"
    stock = "stock compiled" if compiled else "stock"

    def base():
        return torch.compile(c.stock, backend="inductor") if compiled else c.stock

    apart = {"quantity": "value", "unit": "s", "isolated": True, "environment": {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}}
    yield Measurement("first step", "first training step", stock, {
        stock: Variant(lambda: FirstStep(base(), c.ids), TrainingStep(c.stock, c.ids).answer),
        f"turboconn {s.level}": Variant(
            lambda: FirstStep(c.turbo(s.group, s.level), c.ids), lambda: c.naive(s.group).answer()
        ),
    }, **apart)
    yield Measurement("first call", "first forward pass", stock, {
        stock: Variant(lambda: FirstForward(base(), c.ids), Forward(c.stock, c.ids).answer),
        f"turboconn {s.level}": Variant(
            lambda: FirstForward(c.turbo(s.group, s.level), c.ids), lambda: {"logits": c.naive(s.group)()}
        ),
    }, **apart)


BENCHMARK = Benchmark(
    (
        Setting("blocks", 16, 3),
        Setting("width", 128, 64),
        Setting("batch", 4, 2),
        Setting("tokens", 32, 6),
        Setting("group", 4, 2),
        Setting("level", "inductor", "scheduled", choices=("inductor", "scheduled", "auto", "eager")),
        Setting("bridges", ("14-0",), ("2-0",), "source-destination of each bridge"),
        Setting("dtype", "float32", None, choices=("float32", "bfloat16")),
        Setting("device", "cpu", None, choices=("cpu", "cuda")),
    ),
    ("first step", "first call"), measurements,
)
