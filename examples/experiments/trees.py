"""TurboConn's arithmetic trees: bridges against stock models, trained on short trees and asked for longer ones.

The published setting is trees of 30 nodes modulo 10 on pretrained models; here the same generator with a small modulus and few
nodes. Tokens see the whole row in all arms; brackets are labelled in training, the accuracy of the table is that of whole trees.
"""

from __future__ import annotations

from typing import Any

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import Trees
from examples.harness.settings import Settings
from examples.harness.training import measure


def arms(c: Settings) -> list[Arm]:
    last, all_arms = c.model.blocks - 1, []
    for g in c.arms.groups:
        all_arms.append(Arm(f"TurboConn g={g}", [dp.TurboConn(bridges=[(last, 0)], group=g, rank=c.rank)]))
    if c.arms.stock:
        all_arms.append(Arm(f"stock, {c.model.blocks} blocks", control=True))
    if c.arms.parameters:
        all_arms.append(Arm("stock, equal parameters", twin=all_arms[0].name, by="params", control=True))
    return all_arms + [Arm(f"stock, {n} blocks", model={"blocks": n}, control=True) for n in c.arms.deeper]


def measured(model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    device, whole = c.get("device", "cpu"), Trees(c.modulus, inner=False)
    return {
        "at": {str(n): measure(model, whole, n, c.test_rows, device=device) for n in c.lengths},
        "score": measure(model, whole, c.train.length, c.test_rows, device=device, seed=8)["last"],
    }


def columns(c: Settings) -> dict[str, str]:
    return {f"{n // 2} to {n} tokens" + (" (trained)" if n == c.train.length else ""): f"at.{n}.last" for n in c.lengths}


def draw(figure, summary) -> None:
    c = summary.settings
    left, right = figure.subplots(1, 2)
    plots.band(left, summary, {a.name: {n: f"at.{n}.last" for n in c.lengths} for a in summary.arms})
    plots.lengths(left, c.lengths, c.train.length)
    left.axhline(1 / c.modulus, color="gray", linestyle=":", linewidth=1)
    left.set(ylabel="accuracy, whole trees", title=f"random trees modulo {c.modulus}")
    left.legend(fontsize=7, frameon=False)
    plots.curves(right, summary, 3)
    right.set(xlabel="training step", ylabel="accuracy of the batch, brackets too", title="training")


EXPERIMENT = Experiment(
    "random arithmetic trees modulo m: TurboConn against stock", arms, lambda c, arm: Trees(c.modulus), measured, draw, columns,
    before=lambda c, arm: Trees(c.modulus) if c.short else None,
)
