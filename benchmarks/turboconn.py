"""Training step, forward and overhead of TurboConn against the stock model and the naive grouped loop.

    python benchmarks/turboconn.py [--json out.json] [--plot out.png] [--groups 4,8,16] [--lowering auto,eager] [--memory]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch
from harness import Result, compare, machine, save
from naive import NaiveGroups
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp


def build(width: int, blocks: int, vocabulary: int = 1024) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=blocks,
            num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), max_position_embeddings=4096,
        )
    )


def training_step(model, ids):
    """Zero gradients, forward with loss, backward: what every optimizer step pays."""

    def run():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids.clone(), use_cache=False).loss.backward()

    return run


def naive_step(naive: NaiveGroups, ids):
    def run():
        naive.model.zero_grad(set_to_none=True)
        logits = naive.logits(ids)
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    return run


def floor(F: float, W: float, rows: int, group_rows: list[int], blocks: int, serial: int, block_params: int,
          head_params: int, itemsize: int = 4) -> float:
    """Roofline ratio of a training step (see docs/benchmarks.md): weights once per GEMM, weight gradients sunk."""

    def gemm(n: int, p: int) -> float:
        return max(2 * n * p / F, itemsize * p / W)

    plain = blocks * 3 * gemm(rows, block_params) + 3 * gemm(rows, head_params)
    loop = serial * (sum(2 * gemm(r, block_params) for r in group_rows) + gemm(rows, block_params))
    return ((blocks - serial) * 3 * gemm(rows, block_params) + 3 * gemm(rows, head_params) + loop) / plain


def forward_floor(F: float, W: float, rows: int, group_rows: list[int], blocks: int, serial: int, block_params: int,
                  head_params: int, itemsize: int = 4) -> float:
    """Roofline ratio of a forward pass."""

    def gemm(n: int, p: int) -> float:
        return max(2 * n * p / F, itemsize * p / W)

    head, plain = gemm(rows, head_params), gemm(rows, block_params)
    loop = serial * sum(gemm(r, block_params) for r in group_rows)
    return ((blocks - serial) * plain + head + loop) / (blocks * plain + head)


def peak_memory(step) -> float:
    """MiB that a training step needs at its peak beyond what is resident between steps (Linux with glibc)."""
    step()  # captures and compiles
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    status = Path("/proc/self/status")
    before = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    step()
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return (peak - before) / 1024


def peak_of(label: str) -> float:
    """The same for one run of this configuration, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", label]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    args = configuration(*sys.argv[1:])
    if results := measure(args):
        save(results, args.json, args.plot)


def configuration(*given: str, **values: object) -> argparse.Namespace:
    """Options of a run: from a command line, or by keyword."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default="4,8,16")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=156)
    parser.add_argument("--bridges", default="6-0,6-2")
    parser.add_argument("--lowering", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="also run the stock model through torch.compile")
    parser.add_argument("--memory", action="store_true", help="peak memory of a training step (Linux, CPU)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--json")
    parser.add_argument("--plot", help="write a picture of ratios and floors")
    args = parser.parse_args(given)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def measure(args: argparse.Namespace) -> list[Result]:
    """Training step and forward pass of one configuration."""
    dtype = getattr(torch, args.dtype)
    bridges = [tuple(map(int, b.split("-"))) for b in args.bridges.split(",")]
    stock = build(args.width, args.blocks).train().to(device=args.device, dtype=dtype)
    ids = torch.randint(0, 1024, (args.batch, args.tokens), device=args.device)
    from depthpass.analysis.roofline import ceilings

    measured = ceilings(args.device, dtype)
    F, W = measured.flops_per_s, measured.bytes_per_s
    block_params = sum(p.numel() for p in stock.model.layers[0].parameters())
    runs = {"stock": training_step(stock, ids)}
    forward = {"stock": lambda: stock(input_ids=ids, use_cache=False)}
    if args.compiled:
        compiled = torch.compile(stock)
        runs["stock compiled"] = training_step(compiled, ids)
        forward["stock compiled"] = lambda: compiled(input_ids=ids, use_cache=False)
    identity = dp.transform(stock, dp.Identity())
    runs["identity"] = training_step(identity, ids)
    forward["identity"] = lambda: identity(input_ids=ids, use_cache=False)
    floors, forward_floors = {}, {}
    for g in map(int, args.groups.split(",")):
        for lowering in args.lowering.split(","):
            turbo = dp.transform(stock, dp.TurboConn(bridges=bridges, group=g), lowering=lowering)
            label = f"g={g} {lowering}"
            runs[label] = training_step(turbo, ids)
            forward[label] = lambda turbo=turbo: turbo(input_ids=ids, use_cache=False)
            sizes = [args.batch * min(g, args.tokens - a) for a in range(0, args.tokens, g)]
            where = (
                F, W, args.batch * args.tokens, sizes, args.blocks, turbo.depth_schedule.serial_visits, block_params,
                1024 * args.width, dtype.itemsize,
            )
            floors[label], forward_floors[label] = floor(*where), forward_floor(*where)
        if not args.no_naive:
            parts = [
                (s, d, turbo.depth.get_submodule(f"turboconn.s{s}_d{d}.down"),
                 turbo.depth.get_submodule(f"turboconn.s{s}_d{d}.up")) for s, d in bridges
            ]
            runs[f"g={g} naive"] = naive_step(NaiveGroups(stock, parts, g), ids)
    setting = {
        "machine": machine(args.device), "width": args.width, "blocks": args.blocks, "batch": args.batch,
        "tokens": args.tokens, "bridges": bridges, "dtype": args.dtype,
        "ceilings": f"{F / 1e9:.0f} GFLOP/s, {W / 1e9:.1f} GB/s",
    }
    results = []
    if args.peak:
        print(peak_memory(runs[args.peak]))
        return []
    if args.memory:
        peaks = {label: peak_of(label) for label in runs}
        results.append(Result("TurboConn training step, peak memory", setting, "stock", peaks, unit="MiB"))
    results.append(Result("TurboConn training step", setting, "stock", compare(runs, args.repeat, args.device), floors))
    with torch.no_grad():
        times = compare(forward, args.repeat, args.device)
    results.append(Result("TurboConn forward", setting, "stock", times, forward_floors))
    return results


if __name__ == "__main__":
    main()
