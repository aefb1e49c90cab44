"""Peak memory of a training step with gradient checkpointing where one block is visited several times: eager and compiled.

    python benchmarks/checkpointing.py [--times 4,8] [--width 256] [--json out.json]

Blocks 1 and 2 of 4 are looped; every number comes from a process of its own (Linux). Public reports show compiled models with
activation checkpointing at 2.3 to 3.5 times eager memory when a block is traversed several times.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
from harness import Result, machine, save
from turboconn import build, peak_memory, training_step

import depthpass as dp

RUNS = (("eager", False), ("eager", True), ("inductor", False), ("inductor", True))


def label(level: str, checkpointed: bool) -> str:
    return f"{level}, checkpointed" if checkpointed else level


def peak(level: str, checkpointed: bool, times: int, args: argparse.Namespace) -> float:
    """MiB of one run, in this process."""
    stock = build(args.width, 4).train()
    model = dp.transform(stock, dp.Loop(start=1, end=3, times=times), lowering=level).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    return peak_memory(training_step(model, torch.randint(0, 1024, (args.batch, args.tokens))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", default="4,8")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--checkpointed", action="store_true", help="only the runs with gradient checkpointing")
    parser.add_argument("--json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        level, checkpointed, times = args.one.split(",")
        print(peak(level, checkpointed == "True", int(times), args))
        return
    results = []
    for times in map(int, args.times.split(",")):
        rows = {}
        for level, checkpointed in RUNS:
            if args.checkpointed and not checkpointed:
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{level},{checkpointed},{times}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[label(level, checkpointed)] = float(done.stdout.splitlines()[-1])
        setting = {"machine": machine("cpu"), "width": args.width, "batch": args.batch, "tokens": args.tokens, "times": times}
        results.append(Result(f"Peak memory, loop of {times}", setting, label("eager", True), rows, unit="MiB"))
    save(results, args.json)


if __name__ == "__main__":
    main()
