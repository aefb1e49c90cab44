"""Rows with loop counts of their own in one batch: every other row takes one iteration, against all rows taking every one.

Whole calls of `generate` with a short prompt are timed. The floor is the share of block visits. Numbers: each row's own loop
written out by hand, of the first two rows.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from declare import Benchmark, Measurement, Setting, Variant
from oracles import Greedy, Oracle, likeliest, loop
from workloads import build, tokens

import depthpass as dp
from depthpass.hf.decoding.row_depth import ladder_of


def measurements(s: Namespace) -> Iterator[Measurement]:
    stock = build(s.width, s.blocks).eval()
    model = dp.transform(stock, dp.Loop(times=s.times))
    by = {times: Oracle(stock, model, loop(0, s.blocks, times)) for times in (1, s.times)}
    for rows in s.rows:
        ids, most, mixed = tokens(rows, s.prompt), [s.times] * rows, [s.times, 1] * (rows // 2)
        ladder = ladder_of(model, sorted(set(mixed)))

        def row(counts, ids=ids, **options):
            return lambda: Greedy(model, ids, s.tokens, s.checked, [by[n] for n in counts[:2]], **options)

        right, share = likeliest(2, s.checked), ladder.visits(mixed) / ladder.visits(most)
        yield Measurement("decode", f"{rows} rows, every other one once instead of {s.times} times", "all iterations", {
            "all iterations": Variant(row(most), right),
            "mixed": Variant(row(mixed, loops=mixed), right, floor=share),
            "all iterations through loops=": Variant(row(most, loops=most), right),
        }, per=s.tokens, notes=("floor: share of the visits",))


BENCHMARK = Benchmark(
    (
        Setting("width", 512, 64),
        Setting("blocks", 4, 1),
        Setting("rows", (256, 16), (2,), "rows of the batch"),
        Setting("times", 3, 2),
        Setting("prompt", 8, 3, "tokens before the first decoded one"),
        Setting("tokens", 12, 3, "decoded tokens of one call"),
        Setting("checked", 6, 2, "decoded tokens that are checked"),
    ),
    ("decode",), measurements,
)
