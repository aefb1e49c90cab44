"""First training step of a compiled model: torch.compile of the stock one against the compiled rung, each in a process of
its own with Inductor's caches off.

    python benchmarks/compile_time.py [--blocks 16] [--width 128] [--bridges 14-0] [--group 4] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch
from harness import Result, machine, save
from turboconn import build, training_step

import depthpass as dp


def first_step(args: argparse.Namespace) -> float:
    """Seconds of the first step, capture and compilation included."""
    stock = build(args.width, args.blocks).train().to(args.device)
    ids = torch.randint(0, 1024, (args.batch, args.tokens), device=args.device)
    if args.only == "stock compiled":
        model = torch.compile(stock)
    else:
        bridges = [tuple(map(int, b.split("-"))) for b in args.bridges.split(",")]
        model = dp.transform(stock, dp.TurboConn(bridges=bridges, group=args.group), lowering="inductor")
    start = time.perf_counter()
    training_step(model, ids)()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("blocks", 16), ("width", 128), ("batch", 4), ("tokens", 32), ("group", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bridges", default="14-0")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(first_step(args))
        return
    rows = {}
    for label in ("stock compiled", "turboconn inductor"):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", label], capture_output=True, text=True, check=True,
            env=os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        )
        rows[label] = float(done.stdout.splitlines()[-1])
    setting = {"machine": machine(args.device), **{k: v for k, v in vars(args).items() if k not in ("json", "only", "device")}}
    save([Result("first training step of a compiled model", setting, "stock compiled", rows, unit="s")], args.json)


if __name__ == "__main__":
    main()
