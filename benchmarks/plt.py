"""Parallel loops when decoding: stock, plain loop, PLT with and without stacked visits, side by side in one run.

    OMP_NUM_THREADS=2 python benchmarks/plt.py [--json out.json] [--loops 2,3] [--prompt 64] [--kv 4096]

bfloat16 on CPU by default, where a matrix product of a few rows costs what reading its weights costs. Runs take turns token
by token, so that drift of the machine hits all alike; a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from harness import Result, compare, machine, save
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import depthpass as dp
from depthpass.hf.cache import STOCK_NAME


def build(width: int, blocks: int, vocabulary: int, positions: int, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A random Llama: head size 64, two query heads per key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), max_position_embeddings=positions,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


class Decoder:
    """One run: a model, a cache with the prompt in it, one token per call."""

    def __init__(self, model, cache, prompt: torch.Tensor):
        self.model, self.cache, self.token = model, cache, prompt[:, -1:]
        with torch.no_grad():
            model(input_ids=prompt, **{STOCK_NAME: cache}, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> None:
        out = self.model(input_ids=self.token, **{STOCK_NAME: self.cache}, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)


def in_turn(runs: dict[str, Decoder], tokens: int, sync) -> dict[str, list[float]]:
    """Seconds of every token of every run."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range(-3, tokens):
        for label, run in runs.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            if turn >= 0:
                times[label].append(time.perf_counter() - start)
    return times


def cache_of(model, stock):
    return DynamicCache(config=stock.config) if model is stock else dp.DepthCache(model)


def kv_bytes(cache) -> int:
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return cache.state.nbytes()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--loops", default="2,3")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache before the first timed one")
    parser.add_argument("--tokens", type=int, default=30, help="decoded tokens")
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the timed prefill; 0 = leave it out")
    parser.add_argument("--kv", type=int, default=4096, help="tokens at which bytes are counted; 0 = leave it out")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    sync = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    positions = max(args.kv, args.prompt + args.tokens + 8, args.prefill)
    stock = build(args.width, args.blocks, args.vocabulary, positions, getattr(torch, args.dtype), args.device)
    models = {"stock": stock, "identity program": dp.transform(stock, dp.Identity())}
    loops = [int(r) for r in args.loops.split(",")]
    for r in loops:
        spec = dp.ParallelLoop(loops=r, window=args.window)
        models[f"plain loop R={r}"] = dp.transform(stock, dp.ParallelLoop(loops=r, shift=0, mix=(0.0, 1.0), kv="own"))
        models[f"PLT R={r} unstacked"] = dp.transform(stock, spec, stack=False)
        models[f"PLT R={r} stacked"] = dp.transform(stock, spec)
    setting = {
        "machine": machine(args.device), "parameters": f"{sum(p.numel() for p in stock.parameters()) / 1e6:.0f} M",
        "width": args.width, "blocks": args.blocks, "batch": 1, "window": args.window, "dtype": args.dtype,
    }
    ids = torch.randint(3, args.vocabulary, (1, positions), device=args.device)
    times = in_turn(
        {label: Decoder(m, cache_of(m, stock), ids[:, : args.prompt]) for label, m in models.items()}, args.tokens, sync
    )
    paired = {
        label: statistics.median(x / y for x, y in zip(t, times["stock"])) for label, t in times.items()
    }
    base = statistics.median(times["stock"])
    results = [Result(
        f"PLT: one decoded token after {args.prompt}", setting, "stock", {k: base * v for k, v in paired.items()},
        notes=["median over the tokens of the time relative to stock at the same turn"],
    )]
    if args.prefill:
        def prefill(model):
            @torch.no_grad()
            def run():
                model(input_ids=ids[:, : args.prefill], use_cache=True, logits_to_keep=1)

            return run

        chosen = {k: prefill(m) for k, m in models.items() if "unstacked" not in k}
        results.append(Result(f"PLT: prefill of {args.prefill} tokens", setting, "stock",
                              compare(chosen, args.repeat, args.device)))
    save(results, args.json)
    if args.kv:
        print(f"KV bytes after {args.kv} tokens\n")
        held = {}
        for label in ("stock", *(f"PLT R={r} stacked" for r in loops)):
            run = Decoder(models[label], cache_of(models[label], stock), ids[:, : args.kv])
            held[label] = kv_bytes(run.cache)
            report = "" if label == "stock" else dp.report(models[label], seq_len=args.kv).kv_bytes
            print(f"| {label} | {held[label]} | {held[label] / held['stock']:.4f} | {report} |", flush=True)


if __name__ == "__main__":
    main()
