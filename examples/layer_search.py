"""Search over layer programs on a model trained from scratch, with the controls that a claim needs.

A small Llama-shaped model learns the median of some digits, and not perfectly. Then three searches: one program for all
samples, a program for each sample with its answer in sight (as CoLa and Dr.LLM search), and the scan of repeated ranges
(RYS). Each is printed beside as many random and input-blind programs, on samples that nobody searched on.

    python examples/layer_search.py [--steps 150] [--budget 40] [--samples 60] [--out layer_search]

Takes about a minute on one CPU core and writes specs, JSON and pictures to OUT.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp

EQUALS, TOKENS = 10, 11


def pairs(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """5 to 11 digits and ``=``, and their median."""
    rng, drawn = random.Random(seed), []
    for _ in range(count):
        digits = [rng.randrange(EQUALS) for _ in range(2 * rng.randint(2, 5) + 1)]
        drawn.append(([*digits, EQUALS], [sorted(digits)[len(digits) // 2]]))
    return drawn


def build(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=TOKENS, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ))


def train(model: LlamaForCausalLM, steps: int, rows: int = 64) -> float:
    """Answers only; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        batch = pairs(rows, 10_000 + step)
        width = max(len(p) for p, _ in batch) + 1
        ids = torch.tensor([p + a + [0] * (width - len(p) - 1) for p, a in batch])
        labels = torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(batch):
            labels[i, len(prompt)] = answer[0]
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("layer_search"))
    args = parser.parse_args(argv)
    model = build()
    print(f"trained: loss {train(model, args.steps):.3f}\n")
    # Seeds of the training data start at 10 000.
    live, samples = dp.transform(model, dp.Identity()), pairs(args.samples, 1)

    pooled = dp.search(live, samples, method="mcts", budget=args.budget)
    print(f"== one program for all samples\n{pooled}\n")
    pooled.save(args.out)

    single = dp.search(live, samples, method=dp.search.MCTS(penalty=3), score="greedy_match", budget=args.budget // 2,
                       per_sample=True)
    print(f"== a program for each sample\n{single}\n")

    scan = dp.search(live, samples, method="sweep", space="rys", score="log_prob")
    print(f"== one repeated range\n{scan}\n\n{scan.heat_map()}")
    (args.out / "heat_map.svg").write_text(scan.heat_map().to_svg(), encoding="utf-8")

    better = dp.transform(model, args.out / "best.yaml")
    print(f"\nloaded {args.out / 'best.yaml'}: {len(better.depth_program.visits)} visits")


if __name__ == "__main__":
    main()
