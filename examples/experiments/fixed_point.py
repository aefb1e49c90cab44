"""How many hops trained models use, and what the fixed-point schedule then saves.

Models with bridges are trained on tasks that need every hop (parity), some, or few (text). ``dp.contraction`` counts the hops
after which the results are right; then the same weights run a long row by sweeps and in the token loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import Parity, PHop, Problem, Text
from examples.harness.settings import Settings
from examples.harness.training import clock, measure


def problem(c: Settings, name: str) -> Problem:
    known: Mapping[str, Problem] = {"parity": Parity(), "p-hop": PHop(2), "text": Text()}
    if name not in known:
        raise ValueError(f"arms.tasks: expected tasks among {', '.join(known)}, got {name!r}")
    return known[name]


def spec(c: Settings, name: str, g: int) -> Any:
    last = c.model.blocks - 1
    return dp.T2MLR(start=0, end=last) if name == "T2MLR" else dp.TurboConn(bridges=[(last, 0)], group=g, rank=c.rank)


def arms(c: Settings) -> list[Arm]:
    all_arms = []
    for task, name, g in c.arms.tasks:
        train = c.growing if task == "parity" else {}
        model = {"window": max(2, g)} if task == "parity" else {}
        title = f"{task}, {name}" + ("" if name == "T2MLR" else f" g={g}")
        all_arms.append(Arm(title, [spec(c, name, g)], model, train, facts={"task": task, "g": g}))
    return all_arms


def before(c: Settings, arm: Arm) -> Problem | None:
    """As the experiment on parity: the last g bits first."""
    return Parity(arm.facts["g"]) if arm.facts["task"] == "parity" else None


def swept(model: Any, arm: Arm, ids: torch.Tensor, tol: float | None, device: str) -> dict[str, float]:
    """The same weights by sweeps and in the token loop: how many sweeps, CPU time of one against the other, largest error."""
    other = dp.transform(dp.restore(model), arm.spec, schedule=dp.FixedPoint(tol=tol)).to(device).eval()
    other.load_state_dict(model.state_dict())

    def spent(m: Any) -> float:
        begun = clock(device)
        m(input_ids=ids, use_cache=False)
        return clock(device) - begun

    with torch.no_grad():
        out = other(input_ids=ids, use_cache=False)
        error = (out.logits - model(input_ids=ids, use_cache=False).logits).abs().max().item()
        times = [min(spent(m) for _ in range(3)) for m in (other, model)]
    solve = out.sweeps[0]
    return {"sweeps": solve.sweeps, "sequential": solve.sequential, "error": error, "share": times[0] / times[1],
            "loop_ms": 1e3 * times[1]}


def measured(model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    device, task = c.get("device", "cpu"), problem(c, arm.facts["task"])
    score = measure(model, task, c.train.length, c.test_rows, device=device, seed=8)
    ids, _ = task.draw(4, c.hops, torch.Generator().manual_seed(5))
    region = dp.contraction(model, {"input_ids": ids.to(device)}, eps=c.eps).regions[0]
    measures: dict[str, Any] = {"score": -score["loss"], "accuracy": score["accuracy"], "used": region.used(c.eps),
                                "available": region.available, "rate": region.rate(c.eps),
                                "errors": [h.output_error for h in region.hops]}
    for name, tol in (("exact", None), ("near", c.tol)):
        measures[name] = swept(model, arm, ids[:1].to(device), tol, device)
    return measures


def columns(c: Settings) -> dict[str, str | tuple[str, str]]:
    headings: dict[str, str | tuple[str, str]] = {
        "accuracy": ("accuracy", "{:.1%}"), f"hops used, n = {c.hops}": ("used", "{:.0f}"), "available": ("available", "{:.0f}"),
        "rho": ("rate", "{:.2f}"), "token loop, ms": ("exact.loop_ms", "{:.0f}")}
    for name, key in (("to rounding", "exact"), (f"to {c.tol:g}", "near")):
        headings |= {f"sweeps {name}": (f"{key}.sweeps", "{:.0f}"), f"then in the loop, {name}": (f"{key}.sequential", "{:.0f}"),
                     f"time of the loop's, {name}": (f"{key}.share", "{:.2f}")}
    return headings | {f"error of logits, to {c.tol:g}": ("near.error", "{:.0e}")}


def draw(figure, summary) -> None:
    left, right = figure.subplots(1, 2)
    for i, arm in enumerate(summary.arms):
        colour = plots.COLOURS[i % len(plots.COLOURS)]
        for j, run in enumerate(summary.runs[arm.name]):
            errors = [max(e, 1e-8) for e in run["measures"]["errors"]]
            left.plot(range(len(errors)), errors, color=colour, label=None if j else arm.name)
            right.plot([i], [run["measures"]["near"]["share"]], color=colour, marker="o", linestyle="")
            right.plot([i], [run["measures"]["exact"]["share"]], color=colour, marker="x", linestyle="")
    left.axhline(summary.settings.eps, color="gray", linestyle=":", linewidth=1)
    left.set(xlabel="hops (sweeps - 1)", ylabel="relative error of the results", yscale="log",
             title="networks cut off after so many hops")
    left.legend(fontsize=7, frameon=False)
    right.axhline(1, color="gray", linestyle=":", linewidth=1)
    right.set_xticks(range(len(summary.arms)), [a.name for a in summary.arms], rotation=30, ha="right", fontsize=7)
    right.set(ylabel="time of sweeps / time of the token loop", title=f"x: to rounding, o: to {summary.settings.tol:g}")


EXPERIMENT = Experiment(
    "hops that trained models use, and what sweeps save over the token loop", arms, lambda c, arm: problem(c, arm.facts["task"]),
    measured, draw, columns, before=before, form="{:.2f}",
)
