"""Adaptive exits in decode: one token on a cache, leaving the loop after half of the iterations, against all of them.

    python benchmarks/exits.py [--json out.json] [--width 512] [--batch 1]

The exit gate is set to a constant, so every token leaves after the same iteration. The floor is the share of block
visits that are left.
"""

from __future__ import annotations

import argparse

import torch
from harness import Result, compare, machine, save
from turboconn import build

import depthpass as dp


def constant_exit(model, after: int):
    """Let every token leave after so many iterations, at q = 0.5."""
    gate = model.depth.loop.exit
    with torch.no_grad():
        gate.weight.zero_()
        # 1 - (1 - p)^after passes 0.5, 1 - (1 - p)^(after - 1) does not.
        gate.bias.fill_(torch.logit(torch.tensor(1 - 0.5 ** (1 / (after - 0.5)))))
    return model


def decode(model, ids):
    """One token after the others, from the same state every time."""
    cache = dp.DepthCache(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
    state = cache.state

    @torch.no_grad()
    def run():
        cache.state = state
        model(ids[:, -1:], past_key_values=cache, use_cache=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--outer", type=int, default=0, help="blocks before and after the loop")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json")
    args = parser.parse_args()
    stock = build(args.width, args.blocks).eval()
    ids = torch.randint(3, 1024, (args.batch, args.tokens + 1))
    inner, half = args.blocks - 2 * args.outer, args.times // 2
    core = {"start": args.outer, "end": args.outer + inner, "times": args.times}
    visits = 2 * args.outer + args.times * inner
    runs = {"all iterations": decode(dp.transform(stock, dp.Loop(**core)).eval(), ids)}
    for kv in ("own", "first"):
        for after in (half, args.times):
            model = constant_exit(dp.transform(stock, dp.Loop(**core, kv=kv, exit=0.5)).eval(), after)
            runs[f"exit after {after}, kv {kv}"] = decode(model, ids)
    floor = (visits - (args.times - half) * inner) / visits
    setting = {"width": args.width, "blocks": args.blocks, "visits": visits, "batch": args.batch, "cached": args.tokens,
               "machine": machine("cpu")}
    save([Result("decode one token: exits after half of the iterations", setting, "all iterations",
                 compare(runs, args.repeat), {f"exit after {half}, kv {kv}": floor for kv in ("own", "first")})], args.json)


if __name__ == "__main__":
    main()
