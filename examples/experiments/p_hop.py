"""Loops on p-hop induction (arXiv 2502.17416): k blocks run T times against k and k T blocks, at equal cost.

p hops need p lookups one after another, so depth decides and not the number of parameters: k blocks looped T times should come
near k T blocks of T times the parameters, and leave k blocks behind, trained for as many steps or for as many FLOPs.
"""

from __future__ import annotations

import dataclasses

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import PHop
from examples.harness.settings import Settings
from examples.harness.training import measure


def blocks(k: int) -> str:
    return f"{k} block" + "s" * (k > 1)


def arms(c: Settings) -> list[Arm]:
    k, times = c.model.blocks, c.arms.times
    looped, facts = f"{blocks(k)} x {times}", {"times": times}
    all_arms = [Arm(looped, [dp.Loop(times=times, **c.loop)], facts=facts)]
    if c.arms.timestep:
        all_arms.append(Arm(f"{looped}, timestep", [dp.Loop(times=times, timestep=True, **c.loop)], facts=facts))
    all_arms.append(Arm(f"{blocks(k)} (equal parameters)", control=True))
    for by in c.arms.longer:
        all_arms.append(Arm(f"{blocks(k)}, longer (equal {by})", twin=looped, by=by, control=True))
    if c.arms.deep:
        all_arms.append(Arm(f"{blocks(k * times)} (equal FLOPs)", twin=looped, by="flops", control=True))
    return all_arms


def measured(model, c: Settings, arm: Arm) -> dict:
    device, problem = c.get("device", "cpu"), PHop(c.hops, c.alphabet)
    measures = {
        "at": {str(n): measure(model, problem, n, c.test_rows, device=device) for n in c.lengths},
        "score": measure(model, problem, c.train.length, c.test_rows, device=device, seed=8)["accuracy"],
    }
    if arm.spec is not None:
        measures["times"] = {}
        for t in c.test_times:
            with dp.using(model, [dataclasses.replace(arm.spec[0], times=t)]):
                measures["times"][str(t)] = measure(model, problem, c.train.length, c.test_rows, device=device)
    return measures


def columns(c: Settings) -> dict[str, str]:
    return {f"n = {n}" + (" (trained)" if n == c.train.length else ""): f"at.{n}.accuracy" for n in c.lengths}


def draw(figure, summary) -> None:
    c = summary.settings
    left, right = figure.subplots(1, 2)
    plots.curves(left, summary, 3)
    plots.legend(left, summary)
    left.set(xlabel="training step", ylabel="accuracy of the batch", title=f"{c.hops}-hop induction")
    looped = [a.name for a in summary.arms if a.spec is not None]
    plots.band(right, summary, {name: {t: f"times.{t}.accuracy" for t in c.test_times} for name in looped})
    right.axvline(c.arms.times, color="gray", linestyle=":", linewidth=1)
    right.set(xlabel="iterations at test time (dotted: trained)", ylabel="accuracy", title="more and fewer loops than trained")


EXPERIMENT = Experiment(
    "p-hop induction: k blocks looped T times against k and k T blocks", arms, lambda c, arm: PHop(c.hops, c.alphabet), measured,
    draw, columns,
)
