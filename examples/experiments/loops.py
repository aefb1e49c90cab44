"""What makes a loop better on p-hop induction: timestep encoding, bounded injection, SHIFT; and loops beyond the trained number.

All arms have the same block and the same number of steps. SHIFT (arXiv 2510.10089) begins with one iteration and loops only when
that stands still, so that its steps cost less; FLOPs to a given loss of the batch say what it saves. Counts of iterations that
training never saw say whether the loop has become stable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import PHop
from examples.harness.settings import Settings
from examples.harness.training import measure


def systems(c: Settings) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Options of the loop, and of the training, by name."""
    return {
        "always": ({}, {}),
        "timestep": ({"timestep": True}, {}),
        "bounded injection": ({"inject": "bounded"}, {}),
        "damped": ({"damped": True}, {}),
        "SHIFT": ({}, {"shift": c.shift | {"loops": c.times}}),
        "SHIFT, timestep": ({"timestep": True}, {"shift": c.shift | {"loops": c.times}}),
    }


def arms(c: Settings) -> list[Arm]:
    table = systems(c)
    return [Arm(name, [dp.Loop(times=c.times, **table[name][0])], train=table[name][1], control=name == "always")
            for name in c.arms.systems]


def measured(model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    device, problem, n = c.get("device", "cpu"), PHop(c.hops, c.alphabet), c.train.length
    times = {}
    for t in c.test_times:
        with dp.using(model, [dataclasses.replace(arm.spec[0], times=t)]):
            times[str(t)] = measure(model, problem, n, c.test_rows, device=device)
    dp.set_loops(model, c.times)
    return {"times": times, "score": measure(model, problem, n, c.test_rows, device=device, seed=8)["accuracy"]}


def columns(c: Settings) -> dict[str, str | tuple[str, str]]:
    headings: dict[str, str | tuple[str, str]] = {
        f"T = {t}" + (" (trained)" if t == c.times else ""): f"times.{t}.accuracy" for t in c.shown_times}
    return headings | {f"FLOPs to loss {loss}": (f"flops_to.{loss}", "{:.2g}") for loss in c.targets}


def draw(figure, summary) -> None:
    c = summary.settings
    left, right = figure.subplots(1, 2)
    plots.curves(left, summary, 2, against=1)
    plots.legend(left, summary)
    left.set(xlabel="training FLOPs", ylabel="loss of the batch", yscale="log",
             title=f"{c.hops}-hop induction, {c.times} iterations")
    plots.band(right, summary, {a.name: {t: f"times.{t}.accuracy" for t in c.test_times} for a in summary.arms})
    right.axvline(c.times, color="gray", linestyle=":", linewidth=1)
    right.set(xlabel="iterations at test time (dotted: trained)", ylabel="accuracy", title="more and fewer loops than trained")


EXPERIMENT = Experiment(
    "loops on p-hop: timestep encoding, bounded injection, SHIFT, iterations beyond the trained number", arms,
    lambda c, arm: PHop(c.hops, c.alphabet), measured, draw, columns,
)
