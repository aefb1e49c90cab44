"""Layer programs of a trained model: what a search finds over random and input-blind programs of the same budget (CoLa, RYS).

A stock model learns the median of some digits, not perfectly. Then the search looks for blocks to skip and repeat, on one half of
the samples; the other half, which nobody searched on, decides between its program, the stock one and the controls.
"""

from __future__ import annotations

from typing import Any

import torch

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import IGNORED, Median
from examples.harness.settings import Settings
from examples.harness.training import measure

SHOWN = {"stock program": "stock", "found": "found", "best random": "random", "best input-blind": "input_blind"}


def arms(c: Settings) -> list[Arm]:
    return [Arm(f"{method}, space {space}", facts={"method": method, "space": space}) for method, space in c.arms.methods]


def samples(problem: Median, count: int, length: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompts up to the ``=`` and their medians."""
    ids, labels = problem.draw(count, length, torch.Generator().manual_seed(seed))
    ends = (labels != IGNORED).int().argmax(-1).tolist()
    return [(ids[i, : e + 1].tolist(), [int(labels[i, e])]) for i, e in enumerate(ends)]


def measured(model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    device, problem = c.get("device", "cpu"), Median(tuple(c.counts))
    found = dp.search(model, samples(problem, c.samples, c.train.length, 11), method=arm.facts["method"],
                      space=arm.facts["space"], score="greedy_match", budget=c.budget)
    held = {"stock": found.stock, "found": found.best, **{name: control.best for name, control in found.controls.items()}}
    return {
        "score": measure(model, problem, c.train.length, 512, device=device, seed=8)["accuracy"],
        "held_out": {name: f.held_out.value for name, f in held.items() if f.held_out is not None},
        "searched": {name: f.searched.value for name, f in held.items()},
        "programs": {name: str(f.layers) for name, f in held.items()},
    }


def columns(c: Settings) -> dict[str, str | tuple[str, str]]:
    return {"searched on: stock": "searched.stock", "found there": "searched.found"} | {
        f"held out: {k}": f"held_out.{v}" for k, v in SHOWN.items()}


def draw(figure, summary) -> None:
    for axes, arm in zip(figure.subplots(1, len(summary.arms), squeeze=False)[0], summary.arms):
        for i, key in enumerate(SHOWN.values()):
            values = [r["measures"]["held_out"][key] for r in summary.runs[arm.name]]
            axes.bar([i], [sum(values) / len(values)], color=plots.COLOURS[i], alpha=0.4)
            axes.plot([i] * len(values), values, color=plots.COLOURS[i], marker="o", linestyle="")
        axes.set_xticks(range(len(SHOWN)), list(SHOWN), rotation=20, fontsize=8)
        axes.set(ylabel="held-out accuracy", title=arm.name)


EXPERIMENT = Experiment(
    "layer programs found by search on a trained model, with random and input-blind controls", arms,
    lambda c, arm: Median(tuple(c.counts)), measured, draw, columns,
)
