"""A loop of T visits against T stock visits, parallel loops and routed recurrence, on one machine in one run.

    python benchmarks/loops.py [--json out.json] [--width 512] [--blocks 8]

A looped model visits ``blocks + (times - 1) * core`` blocks; the baseline is a stock model with that many blocks of its
own, so the ratio is what looping costs beyond the visits themselves.
"""

from __future__ import annotations

import argparse

import torch
from harness import Result, compare, machine, save
from turboconn import build, training_step

import depthpass as dp


def decode_step(model, prompt, steps: int = 8):
    """Decode a few tokens after a prompt with a cache; the prompt is part of every call, so keep it short."""

    @torch.no_grad()
    def run():
        model.generate(prompt, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None,
                       pad_token_id=0)

    return run


def scoring(model, ids):
    @torch.no_grad()
    def run():
        model(input_ids=ids, use_cache=False)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    start, end = args.blocks // 3, args.blocks - args.blocks // 3
    visits = args.blocks + (args.times - 1) * (end - start)
    stock, deep = build(args.width, args.blocks), build(args.width, visits)
    ids = torch.randint(3, 1024, (args.batch, args.tokens))
    looped = dp.transform(stock, dp.Loop(start=start, end=end, times=args.times))
    setting = {"width": args.width, "blocks": args.blocks, "visits": visits, "batch": args.batch,
               "tokens": args.tokens, "machine": machine("cpu")}
    identity = dp.transform(deep, dp.Identity())

    stack = {"start": start, "end": end, "recursions": args.times}
    plain = dp.transform(stock, dp.Loop(start=start, end=end, times=args.times))
    routed = dp.transform(stock, dp.MixtureOfRecursions(**stack))
    shares = sum((args.times - r) / args.times for r in range(args.times))
    work = (args.blocks - (end - start) + shares * (end - start)) / visits
    results = [
        Result("training step: looped against as many stock blocks", setting, "stock", compare({
            "stock": training_step(deep, ids), "identity program": training_step(identity, ids),
            "loop": training_step(looped, ids),
        }, args.repeat)),
        Result("8 decoded tokens: looped against as many stock blocks", setting, "stock", compare({
            "stock": decode_step(deep.eval(), ids[:, :4]), "identity program": decode_step(identity.eval(), ids[:, :4]),
            "loop": decode_step(looped.eval(), ids[:, :4]),
        }, args.repeat)),
        Result("scoring: mixture of recursions (top-k) against the same stack looped", setting, "loop", compare({
            "loop": scoring(plain.eval(), ids), "routed": scoring(routed.eval(), ids),
        }, args.repeat), {"routed": work}, ["floor: share of block visits, head and attention not counted"]),
    ]
    save(results, args.json)


if __name__ == "__main__":
    main()
