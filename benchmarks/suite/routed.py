"""Routed recurrence against the same stack looped: training step, prefill, batched decode.

The floor of a row is its FLOPs over the baseline's, from the reports of both programs at the same shape; for decode it is the
share of visits that the rows take. Numbers: both systems by hand, token by token.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Benchmark, Measurement, Setting, Variant
from oracles import Oracle, by_hand
from workloads import Forward, OurTokens, TrainingStep, build, enliven, tokens

import depthpass as dp

RECURSIONS = 3


@functools.cache
def cost(model, length: int, rows: int):
    """The report's cost of one model."""
    return dp.report(model, seq_len=length, batch=rows).cost


def flops(model, ids, training: bool) -> float:
    """FLOPs of a training step, or of a forward pass over ids."""
    rows, length = ids.shape
    names = ("FLOPs forward", "FLOPs backward") if training else ("FLOPs forward",)
    return sum(cost(model, length, rows).at(name, length, rows) for name in names)


def mixture(start: int, end: int, **options):
    """Mixture-of-Recursions by hand."""
    def want(row, p):
        routers = [p.get(f"mor.r{r}.router.weight") for r in range(1, RECURSIONS + 1)]
        return by_hand.mixture(row, start, end, RECURSIONS, routers, **options)[0]

    return want


def thinking(blocks: tuple[int, ...], steps: int, ratio: float):
    """Inner Thinking by hand."""
    def want(row, p):
        routers = {(b, t): p[f"itt.v{b}.router{t}.weight"] for b in blocks for t in range(1, steps)}
        phi = {(b, t): p[f"itt.v{b}.phi{t}.weight"] for b in blocks for t in range(steps)}
        return by_hand.inner_thinking(row, blocks, steps, routers, phi, ratio=ratio)

    return want


def repeated(times: dict[int, int], blocks: int):
    """Blocks repeated in place, by hand."""
    layers = [b for b in range(blocks) for _ in range(times.get(b, 1))]
    return lambda row, p: by_hand.layer_program(row, layers)


def half_stops(model, rows: int, mixed: bool) -> None:
    """Routers that let half of the rows through every recursion and stop the others after the first one.

    Row r of the prompt holds token r alone. The routers read one direction of the embedding, which no block writes to.

    Args:
        mixed: every other row stops, not the second half.
    """
    with torch.no_grad():
        base = model.model
        base.embed_tokens.weight[:, 0] = -10.0
        base.embed_tokens.weight[slice(0, rows, 2) if mixed else slice(0, rows // 2), 0] = 10.0
        for block in base.layers:
            block.self_attn.o_proj.weight[0] = 0.0
            block.mlp.down_proj.weight[0] = 0.0
        for r in (2, 3):
            model.depth.mor.get_submodule(f"r{r}").router.weight[0, 0] = 1.0


def against(part: str, title: str, models: dict, wants: dict, stock, s: Namespace, *, training: bool) -> Measurement:
    """Rows that run the same ids; the first one is the baseline."""
    ids, baseline = tokens(s.batch, s.tokens), next(iter(models))
    checked = ids[:2, : s.checked]
    base = flops(models[baseline], ids, training)
    variants = {}
    for label, model in models.items():
        oracle = Oracle(stock, model, wants[label])

        def make(model=model):
            model.train(training)
            return TrainingStep(model, ids, checked, language=True) if training else Forward(model, ids, True, checked)

        variants[label] = Variant(
            make, oracle.training(checked) if training else oracle.scores(checked, last=True),
            floor=None if label == baseline else flops(model, ids, training) / base,
        )
    return Measurement(part, title, baseline, variants, notes=("floor: FLOPs of the reports",))


def decoding(s: Namespace, kv: str) -> Measurement:
    """Tokens of every row of a large batch, of which half stop after the first recursion."""
    cycle = {"start": 0, "end": 4, "recursions": RECURSIONS, "mode": "threshold", "alpha": 0.001}
    ids = torch.arange(s.rows)[:, None].expand(-1, s.prompt).contiguous()
    some = sorted({0, 1, s.rows - 2, s.rows - 1})
    whole = torch.cat((ids, ids[:, -1:]), 1)[some]
    variants, cases = {}, {
        "every row three times": None, "second half of the rows once": False, "every other row once": True,
    }
    for label, stops in cases.items():
        stock = build(s.width, 4)
        model = dp.transform(stock, dp.MixtureOfRecursions(**cycle, kv=kv)).eval()
        with torch.no_grad():
            for p in model.depth.parameters():
                p.zero_()  # routers of score 0: every token takes every recursion
        if stops is not None:
            half_stops(model, s.rows, stops)
        want = mixture(0, 4, mode="threshold", alpha=0.001, kv=kv)
        variants[label] = Variant(
            lambda model=model: OurTokens(model, ids, s.decoded, some), Oracle(stock, model, want).scores(whole, last=True),
            floor=None if stops is None else (4 + 2 * 2) / (4 + 2 * 4),
        )
    return Measurement("decode", f"batched decode of {s.rows} rows, kv={kv}", "every row three times", variants,
                       per=s.decoded, notes=("floor: share of the visits",))


def measurements(s: Namespace) -> Iterator[Measurement]:
    stock = build(s.width, 4)
    recursions = {
        "loop x3": dp.transform(stock, dp.Loop(start=1, end=3, times=RECURSIONS)),
        "MoR-3 1, 2/3, 1/3": enliven(dp.transform(stock, dp.MixtureOfRecursions(start=1, end=3, recursions=RECURSIONS))),
    }
    routed = {"loop x3": lambda row, p: by_hand.loop(row, 1, 3, RECURSIONS)[-1], "MoR-3 1, 2/3, 1/3": mixture(1, 3)}
    title = "MoR-3 against the stack looped three times"
    yield against("train", f"training step: {title}", recursions, routed, stock, s, training=True)
    yield against("prefill", f"prefill: {title}", recursions, routed, stock, s, training=False)
    thought = {
        "loop x4": dp.transform(stock, dp.IntraLayerRecurrence([1, 4, 1, 4])),
        "ITT x4 at 50 %": enliven(dp.transform(stock, dp.InnerThinking(steps=4, ratios=[0.5, 0.5, 0.5]))),
    }
    steps = {"loop x4": repeated({1: 4, 3: 4}, 4), "ITT x4 at 50 %": thinking((1, 3), 4, 0.5)}
    title = "ITT x4 against the same blocks four times"
    yield against("itt", f"training step: {title}", thought, steps, stock, s, training=True)
    yield against("itt", f"prefill: {title}", thought, steps, stock, s, training=False)
    for kv in s.kv:
        yield decoding(s, kv)


BENCHMARK = Benchmark(
    (
        Setting("width", 512, 64),
        Setting("batch", 4, 2),
        Setting("tokens", 256, 8),
        Setting("checked", 24, 4, "tokens of the two rows whose numbers are checked"),
        Setting("rows", 256, 4, "rows of batched decoding"),
        Setting("prompt", 16, 3, "tokens in the cache of batched decoding"),
        Setting("decoded", 8, 2, "tokens of one call of batched decoding, behind one another: caches grow as they do in use"),
        Setting("kv", ("recursion", "shared"), ("shared",), "keys of batched decoding", ("recursion", "shared")),
    ),
    ("train", "prefill", "itt", "decode"), measurements,
)
