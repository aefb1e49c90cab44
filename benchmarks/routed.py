"""Routed recurrence against the same stack looped: training step, prefill, batched decode; ratios in one run.

    python benchmarks/routed.py [--json out.json] [--only train,prefill,itt,decode]

The floor of a row is its FLOPs over the baseline's, from the reports of both programs at the same shape; for decode it is
the share of visits that the rows take.
"""

from __future__ import annotations

import argparse

import torch
from harness import Result, compare, machine, save
from turboconn import build, training_step

import depthpass as dp


def prefill(model, ids):
    """Score a prompt and keep its cache."""

    @torch.no_grad()
    def run():
        model(input_ids=ids, use_cache=True)

    return run


def flops(model, ids, *, training: bool) -> float:
    """FLOPs of a training step, or of a forward pass over ids."""
    found = dp.report(model, seq_len=ids.shape[1], batch=ids.shape[0]).cost
    names = ("FLOPs forward", "FLOPs backward") if training else ("FLOPs forward",)
    return sum(found.at(name, ids.shape[1], ids.shape[0]) for name in names)


def floors(models: dict, baseline: str, ids, *, training: bool) -> dict[str, float]:
    base = flops(models[baseline], ids, training=training)
    return {label: flops(m, ids, training=training) / base for label, m in models.items() if label != baseline}


def half_stops(model, rows: int, mixed: bool) -> None:
    """Routers that let half of the rows through every recursion and stop the others after the first one.

    Row r of the prompt holds token r alone. The routers read one direction of the embedding, which no block writes to.

    Args:
        mixed: every other row stops, not the second half.
    """
    with torch.no_grad():
        base = model.model
        base.embed_tokens.weight[:, 0] = -10.0
        base.embed_tokens.weight[slice(0, rows, 2) if mixed else slice(0, rows // 2), 0] = 10.0
        for block in base.layers:
            block.self_attn.o_proj.weight[0] = 0.0
            block.mlp.down_proj.weight[0] = 0.0
        for r in (2, 3):
            model.depth.mor.get_submodule(f"r{r}").router.weight[0, 0] = 1.0


def all_pass(model) -> None:
    """Routers of score 0: every token takes every recursion."""
    with torch.no_grad():
        for p in model.depth.parameters():
            p.zero_()


def decode(model, rows: int, prompt: int, steps: int):
    """Decode ``steps`` more tokens on a cache that grows from call to call; every row repeats its own token."""
    ids = torch.arange(rows)[:, None].expand(-1, prompt).contiguous()

    cache = dp.DepthCache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :prompt], past_key_values=cache)

    @torch.no_grad()
    def run():
        for _ in range(steps):
            model(input_ids=ids[:, :1], past_key_values=cache)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256, help="rows of batched decoding")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="train,prefill,itt,decode")
    parser.add_argument("--json")
    args = parser.parse_args()
    wanted = args.only.split(",")
    ids = torch.randint(3, 1024, (args.batch, args.tokens))
    setting = {"width": args.width, "batch": args.batch, "tokens": args.tokens, "machine": machine("cpu")}
    results = []

    def add(name: str, models: dict, baseline: str, timed, *, training: bool) -> None:
        made = {k: m.train(training) for k, m in models.items()}
        times = compare({k: timed(m, ids) for k, m in made.items()}, args.repeat)
        results.append(Result(name, setting, baseline, times, floors(made, baseline, ids, training=training)))

    stock = build(args.width, 4)
    stack = {"start": 1, "end": 3}
    recursions = {
        "loop x3": dp.transform(stock, dp.Loop(**stack, times=3)),
        "MoR-3 1, 2/3, 1/3": dp.transform(stock, dp.MixtureOfRecursions(**stack, recursions=3)),
    }
    thinking = {
        "loop x4": dp.transform(stock, dp.IntraLayerRecurrence([1, 4, 1, 4])),
        "ITT x4 at 50 %": dp.transform(stock, dp.InnerThinking(steps=4, ratios=[0.5, 0.5, 0.5])),
    }
    if "train" in wanted:
        add("training step: MoR-3 against the stack looped three times", recursions, "loop x3", training_step, training=True)
    if "prefill" in wanted:
        add("prefill: MoR-3 against the stack looped three times", recursions, "loop x3", prefill, training=False)
    if "itt" in wanted:
        add("training step: ITT x4 against the same blocks four times", thinking, "loop x4", training_step, training=True)
        add("prefill: ITT x4 against the same blocks four times", thinking, "loop x4", prefill, training=False)
    if "decode" in wanted:
        cycle = {"start": 0, "end": 4, "recursions": 3, "mode": "threshold", "alpha": 0.001}
        for kv in ("recursion", "shared"):
            full, half, mixed = (
                dp.transform(build(args.width, 4), dp.MixtureOfRecursions(**cycle, kv=kv)).eval() for _ in range(3)
            )
            for m in (full, half, mixed):
                all_pass(m)
            half_stops(half, args.rows, mixed=False)
            half_stops(mixed, args.rows, mixed=True)
            runs = {"every row three times": full, "second half of the rows once": half, "every other row once": mixed}
            times = compare({k: decode(m, args.rows, args.prompt, args.steps) for k, m in runs.items()}, 3 * args.repeat)
            shape = {**setting, "batch": args.rows, "tokens": f"{args.steps} after {args.prompt}"}
            results.append(Result(f"batched decode, kv={kv}", shape, "every row three times", times,
                                  dict.fromkeys(list(runs)[1:], (4 + 2 * 2) / (4 + 2 * 4))))
    save(results, args.json)


if __name__ == "__main__":
    main()
