"""Peak memory of a training step with gradient checkpointing where one block is visited several times: eager and compiled.

Blocks 1 and 2 of 4 are looped; every row comes from a process of its own (Linux). Public reports show compiled models with
activation checkpointing at 2.3 to 3.5 times eager memory when a block is traversed several times. Numbers: the loop by hand.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Answer, Benchmark, Measurement, Setting, Variant
from memory import peak_memory
from oracles import Oracle, loop
from workloads import TrainingStep, build, tokens

import depthpass as dp


def enable_checkpointing(model) -> None:
    """transformers 5.24 renamed it."""
    name = "activation_checkpointing_enable"
    (getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable)()


class Peak:
    """MiB at the peak of a training step beyond what is resident between steps."""

    def __init__(self, model, ids: torch.Tensor, checked: torch.Tensor):
        self.step = TrainingStep(model, ids, checked)

    def __call__(self) -> float:
        return peak_memory(self.step)

    def answer(self) -> Answer:
        return self.step.answer()


def measurements(s: Namespace) -> Iterator[Measurement]:
    ids = tokens(s.batch, s.tokens)
    checked = ids[:2, : s.checked]
    for times in s.times:
        stock = build(s.width, 4).train()

        def ours(level: str, checkpointed: bool, stock=stock, times=times):
            model = dp.transform(stock, dp.Loop(start=1, end=3, times=times), lowering=level).train()
            if checkpointed:
                enable_checkpointing(model)
            return Peak(model, ids, checked)

        right = Oracle(stock, dp.transform(stock, dp.Loop(start=1, end=3, times=times)), loop(1, 3, times)).training(checked)
        rows = {}
        for level in s.lowering:
            for checkpointed in (True,) if s.checkpointed else (False, True):
                label = f"{level}, checkpointed" if checkpointed else level
                rows[label] = Variant(lambda level=level, on=checkpointed, ours=ours: ours(level, on), right)
        yield Measurement("peak", f"peak memory, loop of {times}", f"{s.lowering[0]}, checkpointed", rows, quantity="value",
                          unit="MiB", isolated=True)


BENCHMARK = Benchmark(
    (
        Setting("times", (4, 8), (2,), "iterations of the loop"),
        Setting("lowering", ("eager", "inductor"), ("eager", "scheduled"), "levels; the first one is the baseline"),
        Setting("width", 256, 64),
        Setting("batch", 8, 2),
        Setting("tokens", 256, 6),
        Setting("checked", 12, 4, "tokens of the two rows whose numbers are checked"),
        Setting("checkpointed", False, None, "only the rows with gradient checkpointing"),
    ),
    ("peak",), measurements,
)
