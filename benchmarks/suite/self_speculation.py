"""Self-speculation: decoding with a draft of fewer iterations against decoding plainly, at low and high acceptance.

`trained` trains a loop from scratch on a small language, with loop counts drawn as Huginn's are (half a minute at width 1024),
and decodes that language. In `draft` weights are random; `--agree` scales what the looped blocks add, so that later iterations
change little and the draft is often right, or much. Acceptance is measured and printed; the floor is the share of visits.
Numbers: how probable each token is over the likeliest one, by the loop written out by hand, which is 1 in greedy decoding.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from declare import Benchmark, Measurement, Product, Setting, Variant
from oracles import Greedy, Oracle, likeliest, loop
from trained import language, trained
from workloads import build, tokens

import depthpass as dp


def looped(s: Namespace, agree: float):
    """A stock model whose attention and MLP add ``agree`` times what they would, and a loop over all its blocks."""
    stock = build(s.width, s.blocks).eval()
    with torch.no_grad():
        for block in stock.model.layers:
            block.self_attn.o_proj.weight.mul_(agree)
            block.mlp.down_proj.weight.mul_(agree)
    stock = stock.to(getattr(torch, s.dtype))
    return stock, dp.transform(stock, dp.Loop(times=s.times))


class Drafted(Greedy):
    """Greedy decoding with a draft."""

    def note(self) -> str:
        return str(self.model.depth_drafted)

    def share(self) -> float:
        """Visits over those of plain decoding, of the last call."""
        report = self.model.depth_drafted
        return report.visits / max(report.plain_visits, 1)


def pair(s: Namespace, part: str, title: str, models: Callable, ids) -> Measurement:
    """Plain decoding against decoding with a draft of one iteration; models are made where they are needed."""
    length = "auto" if s.draft_tokens == "auto" else int(s.draft_tokens)

    @functools.cache
    def decoding(kind: type, **options):
        stock, model = models()
        right = [Oracle(stock, model, loop(0, s.blocks, s.times))] * s.batch
        return kind(model, ids, s.tokens, s.checked, right, **options)

    def drafted():
        return decoding(Drafted, draft="loop:1", draft_tokens=length)

    oracle = likeliest(s.batch, s.checked)
    return Measurement(part, f"draft loop:1 of {s.times}, {title}", "plain", {
        "plain": Variant(lambda: decoding(Greedy), oracle),
        f"draft, {length}": Variant(drafted, oracle, floor=lambda: drafted().share()),
    }, per=s.tokens, dtype=s.dtype, notes=("floor: share of the visits",))


def measurements(s: Namespace) -> Iterator[Measurement]:
    @functools.cache
    def learned():
        return [m.to(getattr(torch, s.dtype)) for m in trained(s.width, s.blocks, s.times, s.steps, s.rate)]

    yield pair(s, "trained", f"trained for {s.steps} steps", learned, language(s.batch, s.prompt, 10_000))
    for agree in s.agree:
        models = functools.cache(functools.partial(looped, s, agree))
        yield pair(s, "draft", f"agree {agree:g}", models, tokens(s.batch, s.prompt))


BENCHMARK = Benchmark(
    (
        Setting("width", 1024, 64),
        Setting("blocks", 2, 1),
        Setting("times", 4, 2),
        Setting("batch", 1),
        Setting("prompt", 32, 4, "tokens before the first decoded one"),
        Setting("tokens", 48, 4, "decoded tokens of one call"),
        Setting("checked", 16, 3, "decoded tokens that are checked"),
        Setting("agree", (0.001, 20.0), (0.001,), "what looped blocks add, of what they would"),
        Setting("steps", 60, 2, "training steps"),
        Setting("rate", 7e-4, None, "learning rate"),
        Setting("draft_tokens", "auto", "2", "length of a draft, or auto"),
        Setting("dtype", "bfloat16", None, choices=("bfloat16", "float32")),
    ),
    ("trained", "draft"), measurements, lambda s: [Product(1, s.width, s.width * 8 // 3)],
)
