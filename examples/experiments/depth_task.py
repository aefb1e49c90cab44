"""Depth against task: state tracking, addition and hops for stock models of 2, 4 and 8 blocks, loops, feedback between tokens.

All arms have the same width and data; accuracy against n stands beside the depth that the report gives for the same n. The word
problems of S3 and S5 need a state carried from token to token, addition only the last pair of digits that decides the carry.
"""

from __future__ import annotations

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import Addition, PHop, Problem, Words
from examples.harness.settings import Settings
from examples.harness.training import measure


def problem(c: Settings, last: int | None = None) -> Problem:
    known = {"words": lambda: Words(tuple(c.generators), last), "addition": lambda: Addition(c.base),
             "p-hop": lambda: PHop(c.hops, c.alphabet)}
    if c.task not in known:
        raise ValueError(f"task: expected one of {', '.join(known)}, got {c.task!r}")
    return known[c.task]()


def title(c: Settings) -> str:
    """Of the picture."""
    if c.task == "words":
        return f"word problem of S{len(c.generators[0])}"
    return f"addition in base {c.base}" if c.task == "addition" else f"{c.hops}-hop induction"


def arms(c: Settings) -> list[Arm]:
    k = c.model.blocks
    baselines = [Arm(f"stock, {n} block{'s' * (n > 1)}", model={"blocks": n}, control=True) for n in c.arms.stock]
    systems = {
        f"loop, {k} blocks x {c.times}": dp.Loop(times=c.times),
        "TurboConn g=1": dp.TurboConn(bridges=[(k - 1, 0)], group=1, rank=c.rank),
        "TurboConn g=2": dp.TurboConn(bridges=[(k - 1, 0)], group=2, rank=c.rank),
        "Feedback Transformer": dp.FeedbackTransformer(),
        "T2MLR": dp.T2MLR(start=0, end=k - 1),
    }
    chosen = {name: s for name, s in systems.items() if any(part in name for part in c.arms.systems)}
    return baselines + [Arm(name, [s], facts={"system": True}) for name, s in chosen.items()]


def measured(model, c: Settings, arm: Arm) -> dict:
    device = c.get("device", "cpu")
    depth = dp.report(model, seq_len=c.train.length, cost=False)
    by_length = {n: measure(model, problem(c), n, c.test_rows, device=device) for n in c.lengths}
    return {
        "at": {str(n): m | {"depth": depth.depth_at(n)} for n, m in by_length.items()},
        "score": measure(model, problem(c), c.train.length, c.test_rows, device=device, seed=8)["accuracy"],
    }


def columns(c: Settings) -> dict[str, str]:
    return {f"n = {n}" + (" (trained)" if n == c.train.length else ""): f"at.{n}.accuracy" for n in c.lengths}


def draw(figure, summary) -> None:
    c = summary.settings
    left, right = figure.subplots(1, 2)
    for axes, key in ((left, "accuracy"), (right, "depth")):
        plots.band(axes, summary, {a.name: {n: f"at.{n}.{key}" for n in c.lengths} for a in summary.arms})
        plots.lengths(axes, c.lengths, c.train.length)
    left.set(ylabel="accuracy over all tokens", title=title(c))
    right.set(ylabel="block visits", title="depth by the report", yscale="log")
    left.legend(fontsize=7, frameon=False)


def depth_against(line: str) -> Experiment:
    """The experiment on the task of its settings."""
    return Experiment(line, arms, lambda c, arm: problem(c), measured, draw, columns, before=lambda c, arm: problem(c, c.before))


EXPERIMENT = depth_against("state tracking (S3, two generators): stock at 2, 4, 8 blocks, loop, TurboConn, feedback")
