"""Layer gradients of fast and slow answers (arXiv 2410.23743): arithmetic, answered at once or by way of a trace.

A small model learns nested sums and products from both kinds of rows. Then the nuclear norms of its gradients are compared,
response by response: the answer alone (fast), the trace that leads to it and the answer (slow), another item's answer (wrong).
The published claim: slow responses have smaller gradients that differ less from layer to layer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

import depthpass as dp
from depthpass import tasks
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import IGNORED
from examples.harness.settings import Settings

KINDS = ("fast", "slow", "wrong")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Responses:
    """Prompts with an answer or a trace and an answer, half and half; labels on the response, token by token.

    Args:
        task: of :mod:`depthpass.tasks`.
        modulus: of its numbers.
        sizes: smallest and largest.
    """

    task: str
    modulus: int
    sizes: tuple[int, int]

    @property
    def vocabulary(self) -> int:
        return len(tasks.tokenizer("char"))

    def pairs(self, count: int, seed: int) -> dict[str, list[Pair]]:
        """(prompt, response) of every kind, as token ids; of the same items in the same order."""
        words, rng, task = tasks.tokenizer("char"), random.Random(seed), tasks.get(self.task, modulus=self.modulus)
        items = [task.instance(rng.randint(*self.sizes), seed=rng.randrange(1 << 30)) for _ in range(count)]

        def ids(text: str) -> list[int]:
            return words(text, add_special_tokens=False)["input_ids"]

        prompts = [ids(f"{item.prompt} ") for item in items]
        fast = [ids(f"{item.answer};") for item in items]
        slow = [ids(f"{item.trace}|{item.answer};") for item in items]
        wrong = [next(ids(f"{o.answer};") for o in items[i + 1 :] + items[:i] if o.answer != item.answer)
                 for i, item in enumerate(items)]
        return {kind: list(zip(prompts, texts, strict=True)) for kind, texts in zip(KINDS, (fast, slow, wrong), strict=True)}

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Rows no longer than ``length``; what is longer is drawn again."""
        ids = torch.zeros(rows, length, dtype=torch.long)
        labels, row = torch.full_like(ids, IGNORED), 0
        while row < rows:
            pairs = self.pairs(rows, int(torch.randint(1 << 30, (), generator=generator)))
            for i, pair in enumerate(zip(pairs["fast"], pairs["slow"], strict=True)):
                prompt, response = pair[i % 2]
                whole = (prompt + response)[:-1]
                if row < rows and len(whole) <= length:
                    ids[row, : len(whole)] = torch.tensor(whole)
                    labels[row, len(prompt) - 1 : len(whole)] = torch.tensor(response)
                    row += 1
        return ids, labels


def problem(c: Settings) -> Responses:
    return Responses(c.task, c.modulus, tuple(c.sizes))


def arms(c: Settings) -> list[Arm]:
    return [Arm(f"after {n} steps", train={"steps": n}, control=n == min(c.arms.steps)) for n in c.arms.steps]


def measured(model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    sets = problem(c).pairs(c.responses, 17)
    device = c.get("device", "cpu")
    gradients = dp.gradients(model, {k: [(torch.tensor(p, device=device), torch.tensor(r, device=device)) for p, r in v]
                                     for k, v in sets.items()}, projections=PROJECTIONS)
    norms = {k: [[m.nuclear for m in report.layers if m.block == b] for b in range(report.blocks)]
             for k, report in gradients.sets.items()}
    measures: dict[str, Any] = {}
    for kind, report in gradients.sets.items():
        by_block = [sum(row) / len(row) for row in norms[kind]]
        mad = gradients.mad()[kind]
        measures[kind] = {"loss": report.loss, "norm": sum(by_block) / len(by_block), "by_block": by_block,
                          "mad": sum(mad.values()) / len(mad)}
    for kind in KINDS[1:]:
        rd = gradients.rd_table("fast", kind)["all"]
        measures[kind]["rd"] = sum(rd.values()) / len(rd)
    return measures | {"score": -measures["fast"]["loss"] - measures["slow"]["loss"]}


def columns(c: Settings) -> dict[str, str | tuple[str, str]]:
    headings: dict[str, str | tuple[str, str]] = {}
    for heading, key in (("loss", "loss"), ("norm", "norm"), ("MAD", "mad"), ("RD against fast", "rd")):
        headings |= {f"{heading}, {kind}": f"{kind}.{key}" for kind in KINDS if key != "rd" or kind != "fast"}
    return headings


def draw(figure, summary) -> None:
    for axes, arm in zip(figure.subplots(1, len(summary.arms), squeeze=False)[0], summary.arms, strict=True):
        for i, kind in enumerate(KINDS):
            lines = [r["measures"][kind]["by_block"] for r in summary.runs[arm.name]]
            blocks = range(len(lines[0]))
            axes.plot(blocks, [sum(v) / len(v) for v in zip(*lines, strict=True)], color=plots.COLOURS[i], marker="o", label=kind)
            axes.fill_between(blocks, [min(v) for v in zip(*lines, strict=True)], [max(v) for v in zip(*lines, strict=True)],
                              color=plots.COLOURS[i], alpha=0.15)
        axes.set(xlabel="block", ylabel="nuclear norm, mean of q, k, v, o", yscale="log", title=arm.name)
        axes.legend(fontsize=7, frameon=False)


EXPERIMENT = Experiment(
    "layer gradients of arithmetic: answers at once, by way of a trace, and wrong ones", arms, lambda c, arm: problem(c),
    measured, draw, columns, form="{:.3f}",
)
