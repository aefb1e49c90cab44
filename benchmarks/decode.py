"""One decoded token: stock eager and compiled, each rung, parallel loops; milliseconds per token at batch 1.

    python benchmarks/decode.py [--json out.json] [--width 512] [--blocks 8] [--context 128]

Stock compiled is ``torch.compile`` of the stock forward over transformers' static cache.
"""

from __future__ import annotations

import argparse

import torch
from harness import Result, compare, machine, save
from transformers import DynamicCache, StaticCache
from turboconn import build

import depthpass as dp
from depthpass.hf.cache import STOCK_NAME

TOKENS = 16


def stock_tokens(model, ids, compiled: bool | str):
    """A function that decodes ``TOKENS`` tokens behind a prompt that is cached already."""
    config, length = model.config, ids.shape[1]
    mode = compiled if isinstance(compiled, str) else None
    forward = torch.compile(model.forward, dynamic=False, mode=mode) if compiled else model.forward
    cache = StaticCache(config=config, max_cache_len=256) if compiled else DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=ids, **{STOCK_NAME: cache}, use_cache=True)
    token = ids[:, -1:].clone()

    @torch.no_grad()
    def run():
        for step in range(TOKENS):
            at = torch.tensor([[length + step]], device=ids.device)
            forward(input_ids=token, position_ids=at, **{STOCK_NAME: cache}, use_cache=True)
        if not compiled:
            cache.crop(-TOKENS)
            return
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    return run


def our_tokens(model, ids):
    cache = dp.DepthCache(model)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    token, start = ids[:, -1:].clone(), cache.state

    @torch.no_grad()
    def run():
        for _ in range(TOKENS):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.state = start

    return run


def token_times(
    width: int, blocks: int, bridges: str, group: int, context: int, dtype: str, device: str, repeat: int
) -> Result:
    """Milliseconds per decoded token of each run."""
    stock = build(width, blocks).eval().to(device=device, dtype=getattr(torch, dtype))
    ids = torch.randint(3, 1024, (1, context), device=device)
    spec = dp.TurboConn(bridges=[tuple(map(int, b.split("-"))) for b in bridges.split(",")], group=group)
    runs = {
        "stock compiled": stock_tokens(stock, ids, compiled=True), "stock eager": stock_tokens(stock, ids, compiled=False),
    }
    for lowering in ("eager", "inductor"):
        runs[f"turboconn {lowering}"] = our_tokens(dp.transform(stock, spec, lowering=lowering), ids)
    runs["identity inductor"] = our_tokens(dp.transform(stock, dp.Identity(), lowering="inductor"), ids)
    from depthpass.analysis.roofline import ceilings

    measured = ceilings(device, getattr(torch, dtype))
    weights = sum(p.nbytes for n, p in stock.named_parameters() if "embed" not in n)
    setting = {
        "machine": machine(device), "width": width, "blocks": blocks, "context": context, "batch": 1, "dtype": dtype,
        "reading the weights": f"{weights / measured.bytes_per_s * 1e3:.2f} ms",
    }
    times = {label: seconds / TOKENS for label, seconds in compare(runs, repeat, device).items()}
    return Result("one decoded token", setting, "stock compiled", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--bridges", default="6-0,6-2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    result = token_times(
        args.width, args.blocks, args.bridges, args.group, args.context, args.dtype, args.device, args.repeat
    )
    save([result], args.json)


if __name__ == "__main__":
    main()
