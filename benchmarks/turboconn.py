"""Training step, forward and overhead of TurboConn against the stock model and the naive grouped loop.

    python benchmarks/turboconn.py [--json out.json] [--groups 4,8,16] [--lowering eager,scheduled]
"""

from __future__ import annotations

import argparse
import time

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default="4,8,16")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=156)
    parser.add_argument("--bridges", default="6-0,6-2")
    parser.add_argument("--lowering", default="eager")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    bridges = [tuple(map(int, b.split("-"))) for b in args.bridges.split(",")]
    stock = build(args.width, args.blocks).train()
    ids = torch.randint(0, 1024, (args.batch, args.tokens))
    from depthpass.analysis.roofline import ceilings

    measured = ceilings("cpu", torch.float32)
    F, W = measured.flops_per_s, measured.bytes_per_s
    block_params = sum(p.numel() for p in stock.model.layers[0].parameters())
    runs = {"stock": training_step(stock, ids)}
    forward = {"stock": lambda: stock(input_ids=ids, use_cache=False)}
    identity = dp.transform(stock, dp.Identity())
    runs["identity"] = training_step(identity, ids)
    floors, models = {}, {}
    for g in map(int, args.groups.split(",")):
        for lowering in args.lowering.split(","):
            began = time.perf_counter()
            turbo = dp.transform(stock, dp.TurboConn(bridges=bridges, group=g), lowering=lowering)
            label = f"g={g} {lowering}"
            models[label] = turbo
            runs[label] = training_step(turbo, ids)
            forward[label] = lambda turbo=turbo: turbo(input_ids=ids, use_cache=False)
            print(f"# transform {label}: {time.perf_counter() - began:.2f} s", flush=True)
            sizes = [args.batch * min(g, args.tokens - a) for a in range(0, args.tokens, g)]
            floors[label] = floor(
                F, W, args.batch * args.tokens, sizes, args.blocks, turbo.depth_schedule.serial_visits, block_params,
                1024 * args.width,
            )
        if not args.no_naive:
            parts = [
                (s, d, turbo.depth.get_submodule(f"turboconn.s{s}_d{d}.down"),
                 turbo.depth.get_submodule(f"turboconn.s{s}_d{d}.up")) for s, d in bridges
            ]
            runs[f"g={g} naive"] = naive_step(NaiveGroups(stock, parts, g), ids)
    setting = {
        "machine": machine("cpu"), "width": args.width, "blocks": args.blocks, "batch": args.batch,
        "tokens": args.tokens, "bridges": bridges, "dtype": "float32",
        "ceilings": f"{F / 1e9:.0f} GFLOP/s, {W / 1e9:.1f} GB/s",
    }
    results = [Result("TurboConn training step", setting, "stock", compare(runs, args.repeat), floors)]
    with torch.no_grad():
        results.append(Result("TurboConn forward", setting, "stock", compare(forward, args.repeat)))
    save(results, args.json)


if __name__ == "__main__":
    main()
