"""TurboConn on tasks that carry a state from token to token: bridges every g tokens against stock models.

Attention is a sliding window as wide as the group (or ``least_window``), so that what lies further back than the blocks'
windows can only come over the bridge; one more control has no window. Every model is first trained, without bridges, on the state
after the last g tokens alone (in the papers: a pretrained model). Rows grow only after two batches that were almost right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import Problem, Text
from examples.harness.settings import Settings
from examples.harness.training import measure

State = Callable[[Settings, int | None], Problem]
"""Of settings: the task, whole or of the last so many tokens."""

TOKENS = {"accuracy": "all tokens", "last": "last token"}
"""Measures -> what they are of."""


def before(state: State, c: Settings, arm: Arm) -> Problem | None:
    """What the stock model learns first."""
    known = {"last": state(c, arm.facts["g"]), "text": Text(), "nothing": None}
    if c.before not in known:
        raise ValueError(f"before: expected one of {', '.join(known)}, got {c.before!r}")
    return known[c.before]


def arms(c: Settings) -> list[Arm]:
    all_arms, wanted, last = [], c.arms, c.model.blocks - 1
    for g in wanted.groups:
        model, facts = {"window": max(g, c.least_window)}, {"g": g}
        name = f"TurboConn g={g}"
        bridge = {"bridges": [(last, 0)], "group": g, "rank": c.rank}
        all_arms.append(Arm(name, [dp.TurboConn(**bridge)], model, facts=facts))
        if g in wanted.weak:
            all_arms.append(Arm(f"{name}, alpha 1", [dp.TurboConn(**bridge, alpha=1.0)], model, facts=facts))
        if g in wanted.stock:
            all_arms.append(Arm(f"stock, window {model['window']}", None, model, facts=facts, control=True))
        if g in wanted.parameters:
            all_arms.append(Arm(f"stock, window {model['window']}, parameters of g={g}", None, model, twin=name, by="params",
                                facts=facts, control=True))
    if wanted.no_window:
        all_arms.append(Arm("stock, no window", facts={"g": wanted.groups[0]}, control=True))
    return all_arms


def measured(problem: Problem, asked: str, model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    """Accuracy at every length; of a model with bridges also the hops that it uses."""
    device = c.get("device", "cpu")
    by_length = {str(n): measure(model, problem, n, c.test_rows, device=device) for n in c.lengths}
    valid = measure(model, problem, c.train.length, c.test_rows, device=device, seed=8)
    measures = {"at": by_length, "score": valid[asked]}
    if arm.spec is not None and c.hops:
        ids, _ = problem.draw(16, c.hops, torch.Generator().manual_seed(5))
        region = dp.contraction(model, {"input_ids": ids.to(device)}, eps=1e-2).regions[0]
        measures["hops"] = {"available": region.available, "used": region.used(1e-2), "rate": region.rate(1e-2)}
    return measures


def columns(asked: str, c: Settings) -> dict[str, str | tuple[str, str]]:
    headings: dict[str, str | tuple[str, str]] = {}
    for n in c.lengths:
        times = n // c.train.length
        headings[f"n = {n}" + (" (trained)" if times == 1 else f" ({times}x)" if times > 1 else "")] = f"at.{n}.{asked}"
    other = "last" if asked == "accuracy" else "accuracy"
    headings[f"{TOKENS[other]}, n = {c.lengths[-1]}"] = f"at.{c.lengths[-1]}.{other}"
    if c.hops:
        headings |= {f"hops used, n = {c.hops}": ("hops.used", "{:.0f}"), "available": ("hops.available", "{:.0f}")}
    return headings


def draw(asked: str, figure, summary) -> None:
    c = summary.settings
    left, right = figure.subplots(1, 2)
    parts = c.arms.get("picture")
    shown = [a for a in summary.arms if not parts or a.name in parts]
    plots.band(left, summary, {a.name: {n: f"at.{n}.{asked}" for n in c.lengths} for a in shown}, single=True)
    plots.lengths(left, c.lengths, c.train.length)
    left.set(ylabel=f"accuracy, {TOKENS[asked]}", title=f"trained to {c.train.length} tokens, thin: seeds", ylim=(0.2, 1.02))
    plots.curves(right, summary, 4, arms=shown)
    right.set(xlabel="training step", ylabel="length of the rows", title="rows grow when two batches are right")
    left.figure.legend(*left.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower center", ncols=4)


def tracking(title: str, state: State, asked: str = "accuracy") -> Experiment:
    """The experiment on one task; ``asked``: of all tokens (``accuracy``) or of the last one of a row (``last``)."""
    return Experiment(
        title, arms, lambda c, arm: state(c, None), lambda model, c, arm: measured(state(c, None), asked, model, c, arm),
        partial(draw, asked), partial(columns, asked), before=lambda c, arm: before(state, c, arm),
    )
