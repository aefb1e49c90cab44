"""Self-speculation: time of decoding with a draft of fewer iterations over that of decoding plainly, at given acceptances.

    python benchmarks/self_speculation.py [--json out.json] [--width 1024] [--blocks 2] [--times 4] [--dtype bfloat16]

The weights are random; ``--agree`` scales what the looped blocks add, so that later iterations change little and the draft is
often right, as training for it would. Acceptance is measured and printed, and the tokens are checked against plain decoding
where both run the same products (float32).
"""

from __future__ import annotations

import argparse

import torch
from harness import Result, compare, machine, save
from turboconn import build

import depthpass as dp


def looped(width: int, blocks: int, times: int, agree: float, dtype: torch.dtype):
    """A loop over all blocks whose attention and MLP add ``agree`` times what they would."""
    torch.manual_seed(0)
    stock = build(width, blocks).eval()
    with torch.no_grad():
        for block in stock.model.layers:
            block.self_attn.o_proj.weight.mul_(agree)
            block.mlp.down_proj.weight.mul_(agree)
    return dp.transform(stock.to(dtype), dp.Loop(times=times))


def measured(model, agree: float, tokens, args) -> Result:
    """One row: plain decoding and decoding with the draft, in turn."""
    ids = torch.randint(3, model.config.vocab_size, (args.batch, 32))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": args.tokens, "do_sample": False,
                "eos_token_id": None, "pad_token_id": 0}
    drafted = {"draft": "loop:1", "draft_tokens": tokens}
    plain = model.generate(ids, **settings)
    same = torch.equal(plain, model.generate(ids, **settings, **drafted))
    assert same or args.dtype != "float32", "drafted tokens differ from plain ones"
    report = model.depth_drafted
    setting = {"machine": machine("cpu"), "dtype": args.dtype, "width": args.width, "blocks": args.blocks,
               "iterations": args.times, "batch": args.batch, "tokens": args.tokens, "agree": agree}
    result = Result(f"draft loop:1 of {args.times}, acceptance {report.acceptance:.2f}", setting, "plain")
    result.rows = compare({"plain": lambda: model.generate(ids, **settings),
                           f"draft, {tokens}": lambda: model.generate(ids, **settings, **drafted)}, args.repeat)
    result.floors[f"draft, {tokens}"] = report.visits / max(report.plain_visits, 1)
    result.notes = [f"Floor: visits. {report}. Same tokens as plain decoding: {same}."]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--agree", type=float, nargs="+", default=[0.001, 20.0])
    parser.add_argument("--draft-tokens", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    dtype, results = getattr(torch, args.dtype), []
    tokens = args.draft_tokens if args.draft_tokens == "auto" else int(args.draft_tokens)
    for agree in args.agree:
        results.append(measured(looped(args.width, args.blocks, args.times, agree, dtype), agree, tokens, args))
    save(results, args.json)


if __name__ == "__main__":
    main()
