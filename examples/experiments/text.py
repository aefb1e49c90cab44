"""Reuse and routing on text at equal training FLOPs: stock, ILR, loops, PLT, MoR, ITT, MoD; loss and decode time.

Small Llama-shaped models read the language reference that ships with Python, one token per character; every tenth topic is held
out. Every arm is trained for as many FLOPs as the first one, so that a dearer program takes fewer steps. Routed models train by
top-k of the row, which looks ahead; they are scored by threshold too, which is causal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

import depthpass as dp
from examples.harness import plots
from examples.harness.arms import Arm
from examples.harness.experiment import Experiment
from examples.harness.problems import Text
from examples.harness.settings import Settings
from examples.harness.training import clock, measure


def systems(c: Settings) -> Mapping[str, Any]:
    """Passes by name, all on the model of the first arm."""
    k = c.model.blocks
    stack = {"start": 1, "end": k - 1}
    every = tuple(range(1, k, 2))
    named: dict[str, Any] = {f"ILR {''.join(map(str, m))}": dp.IntraLayerRecurrence(m) for m in c.maps}
    return named | {
        "loop-2": dp.Loop(times=2),
        "PLT-2": dp.ParallelLoop(loops=2, window=c.window),
        "loop 1+2x3+1": dp.Loop(**stack, times=3),
        "MoR-3": dp.MixtureOfRecursions(**stack, recursions=3),
        "ITT x3": dp.InnerThinking(steps=3, blocks=every, ratios=(0.5, 0.5)),
        "MoD 50 %": dp.MixtureOfDepths(capacity=0.5),
    }


def causal(spec: Any) -> Any:
    """The same parameters, read as thresholds; None where nothing is routed."""
    if isinstance(spec, dp.InnerThinking):
        return dataclasses.replace(spec, mode="threshold", ratios=None)
    if isinstance(spec, dp.MixtureOfDepths):
        return dp.MixtureOfDepths(mode="threshold")
    return dataclasses.replace(spec, mode="threshold") if isinstance(spec, dp.MixtureOfRecursions) else None


def arms(c: Settings) -> list[Arm]:
    first = f"stock, {c.model.blocks} blocks"
    all_arms = [Arm(first, control=True)]
    equal = {"twin": first, "by": "training FLOPs"}
    all_arms += [Arm(f"stock, {n} blocks", model={"blocks": n}, control=True, **equal) for n in c.arms.stock]
    table = systems(c)
    return all_arms + [Arm(name, [table[name]], **equal) for name in c.arms.systems]


def decode_ms(model: Any, device: str, tokens: int = 48) -> float:
    """Milliseconds of a token decoded with a cache, one row; the best of three; CPU time, as training seconds."""
    ids = Text(held_out=True).draw(1, 32, torch.Generator().manual_seed(3))[0].to(device)

    def spent(count: int) -> float:
        begun = clock(device)
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count)
        return clock(device) - begun

    spent(4)
    first, all_ = (min(spent(n) for _ in range(3)) for n in (1, tokens))
    return 1e3 * (all_ - first) / (tokens - 1)


def measured(model: Any, c: Settings, arm: Arm) -> dict[str, Any]:
    device, text, n = c.get("device", "cpu"), Text(held_out=True), c.train.length
    measures = {"loss": measure(model, text, n, c.test_rows, device=device)["loss"]}
    measures["score"] = -measure(model, text, n, c.test_rows, device=device, seed=8)["loss"]
    spec = arm.spec[0] if arm.spec else None
    other = causal(spec)
    if other is not None:
        with dp.using(model, other):
            measures["causal"] = measure(model, text, n, c.test_rows, device=device)["loss"]
    elif c.decode:
        measures["decode_ms"] = decode_ms(model, device)
    return measures


def columns(c: Settings) -> dict[str, str]:
    return {"held-out loss": "loss", "by threshold": "causal"} | ({"decode, ms / token": "decode_ms"} if c.decode else {})


def draw(figure, summary) -> None:
    left, right = figure.subplots(1, 2)
    for i, arm in enumerate(summary.arms):
        style = {"color": plots.COLOURS[i % len(plots.COLOURS)]}
        runs = summary.runs[arm.name]
        losses = [r["measures"].get("causal", r["measures"]["loss"]) for r in runs]
        left.plot([i] * len(losses), losses, marker="o", linestyle="", **style)
        left.plot([i - 0.3, i + 0.3], [sum(losses) / len(losses)] * 2, **style)
        if "decode_ms" in runs[0]["measures"]:
            right.plot([min(r["measures"]["decode_ms"] for r in runs)], [sum(losses) / len(losses)], marker="o", linestyle="",
                       label=arm.name, **style)
    left.set_xticks(range(len(summary.arms)), [a.name for a in summary.arms], rotation=40, ha="right", fontsize=7)
    left.set(ylabel="held-out loss, causal (nats per character)", title="equal training FLOPs")
    right.set(xlabel="decode, ms per token", ylabel="held-out loss", title="loss and decode time")
    right.legend(fontsize=7, frameon=False)


EXPERIMENT = Experiment(
    "text at equal training FLOPs: stock, ILR, loops, PLT, MoR, ITT, MoD; loss and decode time", arms, lambda c, arm: Text(),
    measured, draw, columns, form="{:.3f}",
)
