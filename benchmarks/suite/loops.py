"""A loop against as many stock blocks: training step, generation; and what more iterations do to graphs and to the first call.

A looped model visits ``blocks + (times - 1) * core`` blocks; the baseline is a stock model with that many blocks of its own,
so the ratio is what looping costs beyond the visits. Numbers: the loop by hand, token by token.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Answer, Benchmark, Measurement, Setting, Variant
from oracles import Greedy, Oracle, by_hand, likeliest, loop
from workloads import Forward, TrainingStep, build, tokens

import depthpass as dp

STEPS = 8


class FirstCall:
    """Seconds of the first call of a loop: capture and all."""

    def __init__(self, stock, start: int, end: int, times: int, ids: torch.Tensor):
        began = time.perf_counter()
        self.model, self.ids, self.times = dp.transform(stock, dp.Loop(start=start, end=end, times=times)).eval(), ids, times
        self.transform = time.perf_counter() - began

    def __call__(self) -> float:
        began = time.perf_counter()
        Forward(self.model, self.ids)()
        return time.perf_counter() - began

    def answer(self) -> Answer:
        return Forward(self.model, self.ids).answer()

    def note(self) -> str:
        """Sizes of what was made, and how long the number of iterations takes to change, and to change again."""
        (captured,) = self.model._depth.captures.values()
        templates = {id(b.template): b.template for b in captured.blocks}.values()
        switches = []
        for _ in range(2):
            dp.set_loops(self.model, self.times + 1)
            at = time.perf_counter()
            dp.set_loops(self.model, self.times)
            switches.append(f"{(time.perf_counter() - at) * 1e3:.1f}")
        return (f"{len(self.model.depth_program.ops)} program ops, {len(templates)} templates, "
                f"{sum(len(t.graph.graph.nodes) for t in templates)} graph nodes, transform {self.transform * 1e3:.0f} ms, "
                f"set_loops {' then '.join(switches)} ms")


def measurements(s: Namespace) -> Iterator[Measurement]:
    start, end = s.blocks // 3, s.blocks - s.blocks // 3
    visits = s.blocks + (s.times - 1) * (end - start)
    stock, deep = build(s.width, s.blocks), build(s.width, visits)
    ids = tokens(s.batch, s.tokens)
    checked, few = ids[:2, : s.checked], ids[:, :4]
    looped = dp.transform(stock, dp.Loop(start=start, end=end, times=s.times))
    identity = dp.transform(deep, dp.Identity())
    right = Oracle(stock, looped, loop(start, end, s.times))
    yield Measurement("training", f"training step: loop of {visits} visits against as many stock blocks", "stock", {
        "stock": Variant(lambda: TrainingStep(deep.train(), ids)),
        "identity program": Variant(
            lambda: TrainingStep(identity.train(), ids, checked), TrainingStep(deep, ids, checked).answer,
        ),
        "loop": Variant(lambda: TrainingStep(looped.train(), ids, checked), right.training(checked)),
    })
    steps = 2 if s.tiny else STEPS
    rows = {
        "stock": (deep, Oracle(deep, identity, lambda row, p: by_hand.layer_program(row, range(visits)))),
        "loop": (looped, right),
    }
    rows["identity program"] = identity, rows["stock"][1]
    yield Measurement("decoding", f"{steps} decoded tokens (generate)", "stock", {
        label: Variant(
            lambda m=model, by=by: Greedy(m.eval(), few, steps, steps, [by] * s.batch), likeliest(s.batch, steps)
        ) for label, (model, by) in rows.items()
    })
    short = ids[:, :8]
    yield Measurement("growth", "time to the first result by iterations", f"T={s.iterations[0]}", {
        f"T={times}": Variant(
            lambda times=times: FirstCall(stock, start, end, times, short),
            Oracle(stock, looped, loop(start, end, times)).scores(short),
        ) for times in s.iterations
    }, quantity="value", unit="s")


BENCHMARK = Benchmark(
    (
        Setting("width", 1024, 64),
        Setting("blocks", 6, 3),
        Setting("times", 3, 2),
        Setting("batch", 4, 2),
        Setting("tokens", 64, 8),
        Setting("checked", 16, 4, "tokens of the two rows whose numbers are checked"),
        Setting("iterations", (1, 4, 16, 64), (1, 2), "iterations in the part growth"),
    ),
    ("training", "decoding", "growth"), measurements,
)
