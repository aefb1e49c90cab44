"""Layer programs of a trained model: what a search finds over random and input-blind programs of the same budget (CoLa, RYS).

A model learns p-hop induction, not perfectly. Then the search looks for blocks to skip and repeat, on one half of the samples;
the other half, which nobody searched on, decides between its program, the stock one and the controls. Beside the stock model
stands one that was trained as a loop, its visits as blocks: blocks that have learned to be repeated.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import IGNORED, PHop
from examples.harness.settings import Settings
from examples.harness.training import measure

SHOWN = {"own program": "stock", "found": "found", "random": "random", "input-blind": "input_blind"}


def arms(c: Settings) -> list[Arm]:
    all_arms = [Arm(f"stock, {c.model.blocks} blocks")] if c.arms.stock else []
    return all_arms + [Arm(f"{k} blocks x {t}", [dp.Loop(times=t)], {"blocks": k}) for k, t in c.arms.loops]


def samples(problem: PHop, count: int, length: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Rows whose last token has a label, and that label."""
    ids, labels = problem.draw(2 * count, length, torch.Generator().manual_seed(seed))
    asked = (labels[:, -1] != IGNORED).nonzero().flatten()[:count].tolist()
    return [(ids[i].tolist(), [int(labels[i, -1])]) for i in asked]


def measured(model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    device, problem = c.get("device", "cpu"), PHop(c.hops, c.alphabet)
    measures: dict[str, Any] = {"score": measure(model, problem, c.train.length, c.test_rows, device=device, seed=8)["accuracy"]}
    # A search begins with every block once, in order: of a loop its visits as blocks.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="materialize")  # that they hold copies of the weights
        base = model if arm.spec is None else dp.materialize(model)
    for method, space in c.methods:
        result = dp.search(base, samples(problem, c.samples, c.train.length, 11), method=method, space=space,
                           score="greedy_match", budget=c.budget)
        held = {"stock": result.stock, "found": result.best, **{name: control.best for name, control in result.controls.items()}}
        measures[method] = {
            "held_out": {name: f.held_out.value for name, f in held.items() if f.held_out is not None},
            "searched": {name: f.searched.value for name, f in held.items()},
            "programs": {name: str(f.layers) for name, f in held.items()},
            "visits": {name: len(f.layers) for name, f in held.items()},
        }
    return measures


def columns(c: Settings) -> dict[str, str | tuple[str, str]]:
    headings: dict[str, str | tuple[str, str]] = {"own program": f"{c.methods[0][0]}.held_out.stock"}
    for method, space in c.methods:
        headings |= {f"{space} by {method}: {k}": f"{method}.held_out.{v}" for k, v in SHOWN.items() if v != "stock"}
        headings[f"{method}: visits"] = f"{method}.visits.found", "{:.0f}"
        headings[f"{method}: where it searched"] = f"{method}.searched.found"
    return headings


def draw(figure, summary) -> None:
    methods = summary.settings.methods
    grid = figure.subplots(1, len(summary.arms) * len(methods), squeeze=False)[0]
    for axes, (arm, (method, space)) in zip(grid, [(a, m) for a in summary.arms for m in methods]):
        for i, key in enumerate(SHOWN.values()):
            values = [r["measures"][method]["held_out"][key] for r in summary.runs[arm.name]]
            axes.bar([i], [sum(values) / len(values)], color=plots.COLOURS[i], alpha=0.4)
            axes.plot([i] * len(values), values, color=plots.COLOURS[i], marker="o", linestyle="")
        axes.set_xticks(range(len(SHOWN)), list(SHOWN), rotation=40, ha="right", fontsize=7)
        axes.set(ylabel="held-out accuracy", ylim=(0, 1))
        axes.set_title(f"{arm.name}\n{space} by {method}", fontsize=9)


EXPERIMENT = Experiment(
    "layer programs found by search on a trained model, with random and input-blind controls", arms,
    lambda c, arm: PHop(c.hops, c.alphabet), measured, draw, columns,
)
