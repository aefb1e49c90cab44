"""Prefill of one row by sweeps against the token loop, for bridges of several strengths.

A gain is the standard deviation of the bridges' up maps in units of 1 / sqrt(rank); the downward maps have that of a linear
layer. Every row prints its sweeps and the rate it saw. Numbers: the naive grouped loop, within ``tol`` for sweeps that stop
there.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from declare import Benchmark, Measurement, Setting, Variant
from naive import NaiveGroups
from workloads import Forward, build, tokens

import depthpass as dp

RUNS = {
    "token loop": None,
    "sweeps, to rounding": {},
    "sweeps, tol 1e-3": {"tol": 1e-3},
    "window 16, tol 1e-3": {"tol": 1e-3, "window": 16},
}


def strengthen(model, gain: float):
    """The model with bridges of a given strength."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.depth.named_parameters():
            scale = 0.0 if name.endswith("bias") else p.shape[1] ** -0.5 * (gain if ".up." in name else 1.0)
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def measurements(s: Namespace) -> Iterator[Measurement]:
    stock = build(s.width, s.blocks).eval()
    ids, last = tokens(1, s.tokens), s.blocks - 2
    bridges = [(last, 0), (last, s.blocks // 4)]
    for group in s.groups:
        spec = dp.TurboConn(bridges=bridges, group=group, rank=32)
        for gain in s.gains:
            def ours(options, spec=spec, gain=gain):
                options = {} if options is None else {"schedule": "fixed_point", **options}
                return strengthen(dp.transform(stock, spec, **options), gain)

            @torch.no_grad()
            def naive(ours=ours, group=group):
                depth = ours(None).depth.turboconn
                parts = [(d, e, depth.get_submodule(f"s{d}_d{e}.down"), depth.get_submodule(f"s{d}_d{e}.up")) for d, e in bridges]
                return {"logits": NaiveGroups(stock, parts, group).logits(ids)[:, -1:]}

            yield Measurement("prefill", f"prefill, group {group}, gain {gain:g}", "token loop", {
                "stock": Variant(lambda: Forward(stock, ids, True)),
                **{label: Variant(lambda options=options, ours=ours: Forward(ours(options), ids, True), naive,
                                  (options or {}).get("tol")) for label, options in RUNS.items()},
            })


BENCHMARK = Benchmark(
    (
        Setting("width", 512, 64),
        Setting("blocks", 8, 4),
        Setting("tokens", 256, 20),
        Setting("groups", (4,)),
        Setting("gains", (0.02, 0.1, 0.5), (0.1,), "strengths of the bridges"),
    ),
    ("prefill",), measurements,
)
