"""Rows with loop counts of their own in one batch: every other row takes one iteration, against all rows taking every one.

    python benchmarks/row_depth.py [--json out.json] [--width 512] [--rows 256] [--times 3]

Whole calls of ``generate`` with a short prompt are timed, in turn. The floor is the share of block visits.
"""

from __future__ import annotations

import argparse

import torch
from harness import Result, compare, machine, save
from turboconn import build

import depthpass as dp
from depthpass.hf.row_depth import ladder_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 16])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    model = dp.transform(build(args.width, args.blocks).eval(), dp.Loop(times=args.times))
    results = []
    for rows in args.rows:
        ids = torch.randint(3, model.config.vocab_size, (rows, args.prompt))
        mixed = [args.times, 1] * (rows // 2)
        results.append(measured(model, ids, mixed, args))
    save(results, args.json)


def measured(model, ids, mixed, args) -> Result:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": args.tokens, "do_sample": False,
                "eos_token_id": None, "pad_token_id": 0}
    most, rows = [args.times] * len(mixed), len(mixed)
    result = Result(f"{rows} rows, every other one once instead of {args.times} times", {
        "machine": machine("cpu"), "width": args.width, "blocks": args.blocks, "prompt": args.prompt, "tokens": args.tokens,
    }, "all rows, all iterations")
    result.rows = compare({
        "all rows, all iterations": lambda: model.generate(ids, **settings),
        "mixed": lambda: model.generate(ids, **settings, loops=mixed),
        "all rows through loops=": lambda: model.generate(ids, **settings, loops=most),
    }, args.repeat)
    made = ladder_of(model, sorted(set(mixed)))
    result.floors["mixed"] = made.visits(mixed) / made.visits(most)
    return result


if __name__ == "__main__":
    main()
