"""RELAY from scratch on a CPU: a looped model learns arithmetic round by round, then writes chains for longer problems.

One bidirectional block, run once per operator, is supervised with one round per loop (arXiv 2502.08482); a control with the
same data, seed and steps is supervised with the answer alone. Lengths beyond those of the training measure what the rounds
are for.

    python examples/relay.py [--steps 1500] [--out relay.json]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp
import depthpass.tasks as tasks


def build(vocabulary: int, seed: int, width: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width,
                                         num_hidden_layers=2, num_attention_heads=4, pad_token_id=0))
    return dp.transform(stock, [dp.Loop(times=2, taps=True, inject="add"), dp.Bidirectional()])


def train(model, task, words, args, weight: float) -> None:
    """One batch holds problems of one number of operators, since the loop count follows it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    rng = random.Random(args.seed)
    model.train()
    for step in range(args.steps):
        loops = rng.randint(1, args.longest)
        given = [task.instance(loops, f"train {step} {row}") for row in range(args.rows)]
        batch = tasks.relay_batch(given, words, iterations=loops)
        dp.set_loops(model, loops)
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        # The rounds are summed over the batch as published; per token here, so that the step does not depend on its size.
        loss = tasks.relay_total_loss(output, batch, weight=weight / batch.mask.sum().item() * loops)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def evaluate(model, task, words, operators: int, rows: int = 64) -> dict[str, float]:
    """Shares of right answers, and of chains of which every round is right."""
    given = [task.instance(operators, f"test {row}") for row in range(rows)]
    chains = tasks.write_chains(model, given, words, batch=rows)
    return {"answer": sum(c.answer == c.instance.answer for c in chains) / rows, "chain": sum(c.right for c in chains) / rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--longest", type=int, default=4)
    parser.add_argument("--modulus", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    task, words = tasks.get("relay_arithmetic", modulus=args.modulus), tasks.tokenizer("symbol", numbers=args.modulus)
    shares_of = {}
    for name, weight in (("round by round", 1.0), ("answer alone", 0.0)):
        model, begun = build(len(words), args.seed, args.width), time.perf_counter()
        train(model, task, words, args, weight)
        shares_of[name] = {n: evaluate(model, task, words, n) for n in range(1, args.longest + 3)}
        print(f"{name}, {time.perf_counter() - begun:.0f} s")
        for n, shares in shares_of[name].items():
            print(f"  {n} operators: {100 * shares['answer']:5.1f} % of answers, {100 * shares['chain']:5.1f} % of chains"
                  + ("" if n <= args.longest else "  (longer than any in training)"))
    if args.out:
        args.out.write_text(json.dumps({"arguments": vars(args) | {"out": None}, "results": shares_of}, indent=2))


if __name__ == "__main__":
    main()
