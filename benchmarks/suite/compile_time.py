"""First training step of a compiled model: torch.compile of the stock one against the compiled level.

Every row is a process of its own with Inductor's caches off. Numbers are checked after the step that is timed: the stock model,
and the naive grouped loop.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Answer, Benchmark, Measurement, Setting, Variant
from suite.turboconn import Configuration
from workloads import TrainingStep


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


def measurements(s: Namespace) -> Iterator[Measurement]:
    c = Configuration(s)
    backend, level = ("eager", "scheduled") if s.tiny else ("inductor", "inductor")
    yield Measurement("first step", "first training step of a compiled model", "stock compiled", {
        "stock compiled": Variant(
            lambda: FirstStep(torch.compile(c.stock, backend=backend), c.ids), TrainingStep(c.stock, c.ids).answer,
        ),
        f"turboconn {level}": Variant(lambda: FirstStep(c.turbo(s.group, level), c.ids), lambda: c.naive(s.group).answer()),
    }, quantity="value", unit="s", isolated=True, environment={"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"})


BENCHMARK = Benchmark(
    (
        Setting("blocks", 16, 3),
        Setting("width", 128, 64),
        Setting("batch", 4, 2),
        Setting("tokens", 32, 6),
        Setting("group", 4, 2),
        Setting("bridges", ("14-0",), ("2-0",), "source-destination of each bridge"),
        Setting("dtype", "float32", None, choices=("float32", "bfloat16")),
        Setting("device", "cpu", None, choices=("cpu", "cuda")),
    ),
    ("first step",), measurements,
)
