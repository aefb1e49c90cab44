"""A loop of T visits against T stock visits, parallel loops and routed recurrence, on one machine in one run.

    python benchmarks/loops.py [--json out.json] [--width 1024] [--only training,decoding,growth,routing]

A looped model visits ``blocks + (times - 1) * core`` blocks; the baseline is a stock model with that many blocks of its
own, so the ratio is what looping costs beyond the visits themselves. ``growth``: what the number of iterations does to
graphs and to the time before the first result.
"""

from __future__ import annotations

import argparse
import time

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


def growth(stock, start: int, end: int, ids) -> None:
    """Print graph sizes and times to the first result by the number of iterations."""
    print("### graphs and time to the first result by iterations\n")
    print("| T | program ops | templates | graph nodes | transform ms | first call s | set_loops to T ms | again ms |")
    print("|---|---|---|---|---|---|---|---|")
    live = dp.transform(stock, dp.Loop(start=start, end=end, times=2)).eval()
    with torch.no_grad():
        live(input_ids=ids, use_cache=False)
    for times in (1, 4, 16, 64):
        began = time.perf_counter()
        model = dp.transform(stock, dp.Loop(start=start, end=end, times=times)).eval()
        made = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        first = time.perf_counter()
        (captured,) = model._depth.captures.values()
        templates = {id(b.template): b.template for b in captured.blocks}.values()
        switches = []
        for _ in range(2):
            dp.set_loops(live, 3)
            at = time.perf_counter()
            dp.set_loops(live, times)
            switches.append(time.perf_counter() - at)
        print(f"| {times} | {len(model.depth_program.ops)} | {len(templates)} | "
              f"{sum(len(t.graph.graph.nodes) for t in templates)} | {(made - began) * 1e3:.0f} | {first - made:.2f} | "
              f"{switches[0] * 1e3:.1f} | {switches[1] * 1e3:.2f} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="training,decoding,growth,routing")
    parser.add_argument("--json")
    args = parser.parse_args()
    wanted = args.only.split(",")
    start, end = args.blocks // 3, args.blocks - args.blocks // 3
    visits = args.blocks + (args.times - 1) * (end - start)
    stock = build(args.width, args.blocks)
    ids = torch.randint(3, 1024, (args.batch, args.tokens))
    loop = dp.Loop(start=start, end=end, times=args.times)
    setting = {"width": args.width, "blocks": args.blocks, "visits": visits, "batch": args.batch,
               "tokens": args.tokens, "machine": machine("cpu")}
    results = []
    if "training" in wanted or "decoding" in wanted:
        deep = build(args.width, visits)
        runs = {"stock": deep, "identity program": dp.transform(deep, dp.Identity()), "loop": dp.transform(stock, loop)}
        if "training" in wanted:
            results.append(Result("training step: looped against as many stock blocks", setting, "stock", compare(
                {k: training_step(m, ids) for k, m in runs.items()}, args.repeat)))
        if "decoding" in wanted:
            results.append(Result("8 decoded tokens: looped against as many stock blocks", setting, "stock", compare(
                {k: decode_step(m.eval(), ids[:, :4]) for k, m in runs.items()}, args.repeat)))
    if "growth" in wanted:
        growth(stock, start, end, ids[:, :8])
    if "routing" in wanted:
        shares = sum((args.times - r) / args.times for r in range(args.times))
        work = (args.blocks - (end - start) + shares * (end - start)) / visits
        routed = dp.transform(stock, dp.MixtureOfRecursions(start=start, end=end, recursions=args.times))
        results.append(Result("scoring: mixture of recursions (top-k) against the same stack looped", setting, "loop", compare({
            "loop": scoring(dp.transform(stock, loop).eval(), ids), "routed": scoring(routed.eval(), ids),
        }, args.repeat), {"routed": work}, ["floor: share of block visits, head and attention not counted"]))
    save(results, args.json)


if __name__ == "__main__":
    main()
