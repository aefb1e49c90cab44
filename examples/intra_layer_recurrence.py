"""Intra-layer recurrence (arXiv 2505.01855) from scratch: where does reusing a block help, at equal parameters?

A small Llama-shaped character model is trained on the documentation that ships with Python (``pydoc_data.topics``: nothing
is downloaded) for every reuse map, with the same data order, seed, steps and optimizer. A map that visits more blocks costs
more, so the plain map is also trained for as many FLOPs as the dearest one (``[1,1,1,1] long``).

    python examples/intra_layer_recurrence.py [--steps 600] [--seeds 0,1] [--out reuse]

Writes ``OUT.json`` after every run, and prints a table of held-out perplexity per character.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp


def texts() -> tuple[str, str]:
    """Training and held-out text: every tenth topic is held out."""
    names = sorted(topics)
    held = set(names[::10])
    return "\n".join(topics[k] for k in names if k not in held), "\n".join(topics[k] for k in sorted(held))


def encode(text: str, alphabet: dict[str, int]) -> torch.Tensor:
    return torch.tensor([alphabet.get(c, 0) for c in text])


def build(seed: int, vocabulary: int, args) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=args.context, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True, initializer_range=args.init,
    ))


def train(model, data: torch.Tensor, steps: int, seed: int, args) -> float:
    """Train on random windows; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * s / steps)))
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    model.train()
    began = time.process_time()
    for _ in range(steps):
        at = torch.randint(0, len(data) - args.context, (args.rows,), generator=generator)
        ids = torch.stack([data[i : i + args.context] for i in at.tolist()])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.process_time() - began


@torch.no_grad()
def perplexity(model, data: torch.Tensor, args) -> float:
    """Per character, over windows that do not overlap."""
    model.eval()
    windows = data[: len(data) // args.context * args.context].view(-1, args.context)[:: args.every]
    losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in windows.split(32)]
    return math.exp(sum(losses) / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--maps", default="1111,2111,4211,1124", help="one digit per block")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--init", type=float, default=0.02, help="standard deviation of the weights at the start")
    parser.add_argument("--every", type=int, default=4, help="evaluate every so many held-out windows")
    parser.add_argument("--long", action=argparse.BooleanOptionalAction, default=True, help="the run of equal FLOPs")
    parser.add_argument("--out", default="reuse")
    args = parser.parse_args()
    training, held = texts()
    alphabet = {c: i for i, c in enumerate(sorted(set(training)))}
    data, test = encode(training, alphabet), encode(held, alphabet)
    maps = [[int(c) for c in word] for word in args.maps.split(",")]
    most = max(map(sum, maps)) / 4
    runs = [(str(m).replace(" ", ""), m, args.steps) for m in maps]
    if args.long:
        runs.insert(1, ("[1,1,1,1] long", [1, 1, 1, 1], round(args.steps * most)))
    found: dict[str, dict] = {}
    for seed in map(int, args.seeds.split(",")):
        for name, reuse, steps in runs:
            model = dp.transform(build(seed, len(alphabet), args), dp.IntraLayerRecurrence(reuse))
            seconds = train(model, data, steps, seed, args)
            row = found.setdefault(name, {"reuse": reuse, "steps": steps, "perplexity": [], "cpu_seconds": [],
                                          "depth": dp.report(model, seq_len=args.context, cost=False).depth_at(args.context)})
            row["perplexity"].append(perplexity(model, test, args))
            row["cpu_seconds"].append(seconds)
            print(f"seed {seed} {name}: {row['perplexity'][-1]:.3f} ({seconds:.0f} s)", flush=True)
            Path(f"{args.out}.json").write_text(json.dumps({"args": vars(args), "runs": found}, indent=1))
    parameters = sum(p.numel() for p in model.parameters())
    table = Table(title=f"{parameters:,} parameters, {len(data):,} training characters, {len(test):,} held out")
    for column in ("map", "visits", "steps", "work", "perplexity, each seed", "mean", "CPU s"):
        table.add_column(column, justify="left" if column == "map" else "right")
    for name, r in found.items():
        table.add_row(
            name, str(r["depth"]), str(r["steps"]), f"{r['depth'] * r['steps'] / 4 / args.steps:.2f}",
            " ".join(f"{p:.3f}" for p in r["perplexity"]), f"{statistics.mean(r['perplexity']):.3f}",
            f"{statistics.mean(r['cpu_seconds']):.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
