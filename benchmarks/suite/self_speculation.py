"""Self-speculation: decoding with a draft of fewer iterations against decoding plainly, at low and high acceptance.

The weights are random; `--agree` scales what the looped blocks add, so that later iterations change little and the draft is often
right, as training for it would. Acceptance is measured and printed; the floor is the share of visits. Numbers: how probable each
token is over the likeliest one, by the loop written out by hand, which is 1 in greedy decoding.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Benchmark, Measurement, Product, Setting, Variant
from oracles import Greedy, Oracle, likeliest, loop
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


def measurements(s: Namespace) -> Iterator[Measurement]:
    ids = tokens(s.batch, s.prompt)
    length = "auto" if s.draft_tokens == "auto" else int(s.draft_tokens)
    for agree in s.agree:
        stock, model = looped(s, agree)
        right = [Oracle(stock, model, loop(0, s.blocks, s.times))] * s.batch
        drafted = Drafted(model, ids, s.tokens, s.checked, right, draft="loop:1", draft_tokens=length)
        plain, oracle = Greedy(model, ids, s.tokens, s.checked, right), likeliest(s.batch, s.checked)
        yield Measurement("draft", f"draft loop:1 of {s.times}, agree {agree:g}", "plain", {
            "plain": Variant(lambda plain=plain: plain, oracle),
            f"draft, {length}": Variant(lambda drafted=drafted: drafted, oracle, floor=drafted.share),
        }, per=s.tokens, dtype=s.dtype, notes=("floor: share of the visits",))


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
        Setting("draft_tokens", "auto", "2", "length of a draft, or auto"),
        Setting("dtype", "bfloat16", None, choices=("bfloat16", "float32")),
    ),
    ("draft",), measurements, lambda s: [Product(1, s.width, s.width * 8 // 3)],
)
