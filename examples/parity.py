"""Running parity from scratch: a stock model against TurboConn at several groups, on CPU in minutes.

Token i is a random bit, its label the parity of all bits up to i. A stock model of L blocks has depth L whatever the
length; with bridges the depth grows with every group of tokens. All runs share data, seed, steps and optimizer.

    python examples/parity.py [--steps 1500] [--groups 1,2,4] [--out parity]

Writes ``OUT.json`` and ``OUT.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp


def build(seed: int, width: int, blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=None,
            bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
        )
    )


def batch(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits and running parities, ``[rows, length]`` each."""
    bits = torch.randint(0, 2, (rows, length), generator=generator)
    return bits, bits.cumsum(-1) % 2


def accuracy(model, length: int, rows: int = 128) -> tuple[float, float]:
    """Shares of right labels over all tokens and at the last token of rows of one length."""
    bits, want = batch(rows, length, torch.Generator().manual_seed(10_000 + length))
    with torch.no_grad():
        right = model(input_ids=bits, use_cache=False).logits.argmax(-1) == want
    return right.float().mean().item(), right[:, -1].float().mean().item()


def train(model, args, seed: int, tick) -> list[tuple[int, float]]:
    """Train on lengths 1..``--length``; returns (step, loss) every 25 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * 0.5 * (1 + math.cos(math.pi * s / args.steps))
    )
    generator, curve = torch.Generator().manual_seed(seed), []
    model.train()
    for step in range(args.steps):
        # Short rows first: the length grows to its maximum over the first half of training.
        top = max(2, min(args.length, round(args.length * 2 * (step + 1) / args.steps)))
        length = int(torch.randint(2, top + 1, (), generator=generator))
        bits, want = batch(args.rows, length, generator)
        loss = cross_entropy(model(input_ids=bits, use_cache=False).logits.flatten(0, 1), want.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            curve.append((step, loss.item()))
        tick(loss.item())
    model.eval()
    return curve


def plot(results: dict, lengths: list[int], trained: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, r in results.items():
        axes[0].plot(*zip(*r["curve"]), label=name)
        axes[1].plot(lengths, r["accuracy"], marker="o", label=name)
    axes[0].set(xlabel="step", ylabel="loss", title="training")
    axes[1].axvline(trained, color="gray", linestyle=":", label="longest in training")
    axes[1].axhline(0.5, color="gray", linewidth=0.5)
    axes[1].set(xlabel="tokens", ylabel="accuracy over all tokens", title="running parity", ylim=(0.4, 1.02))
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--groups", default="1,2,4")
    parser.add_argument("--length", type=int, default=24, help="longest row in training")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="parity")
    args = parser.parse_args()
    if args.steps < 1 or args.length < 2:
        parser.error("--steps must be at least 1 and --length at least 2")
    runs: dict[str, object] = {"stock": None}
    for g in map(int, args.groups.split(",")):
        runs[f"TurboConn g={g}"] = dp.TurboConn(bridges=[(args.blocks - 1, 0)], group=g, rank=args.width // 2)
    lengths = sorted({args.length // 2, args.length, 2 * args.length, 4 * args.length})
    results: dict[str, dict] = {}
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
               TimeRemainingColumn())
    with Progress(*columns) as progress:
        for name, spec in runs.items():
            model = build(args.seed, args.width, args.blocks)
            if spec is not None:
                model = dp.transform(model, spec)
            task = progress.add_task(name, total=args.steps, loss=math.nan)
            began = time.perf_counter()
            curve = train(model, args, args.seed, lambda loss, task=task: progress.update(task, advance=1, loss=loss))
            seconds = time.perf_counter() - began
            scores = [accuracy(model, n) for n in lengths]
            depths = [args.blocks if spec is None else dp.report(model, seq_len=n).depth_at(n) for n in lengths]
            results[name] = {
                "curve": curve, "accuracy": [a for a, _ in scores], "last_token": [b for _, b in scores],
                "depth": depths, "seconds": seconds,
            }
    table = Table(title=f"running parity, trained on up to {args.length} tokens, {args.steps} steps")
    table.add_column("model")
    for n in lengths:
        table.add_column(f"n={n}: all / last (depth)", justify="right")
    table.add_column("training", justify="right")
    for name, r in results.items():
        cells = [f"{a:.1%} / {b:.1%} ({d})" for a, b, d in zip(r["accuracy"], r["last_token"], r["depth"])]
        table.add_row(name, *cells, f"{r['seconds']:.0f} s")
    Console(width=140).print(table)
    Path(f"{args.out}.json").write_text(json.dumps({"args": vars(args), "lengths": lengths, "runs": results}, indent=1))
    plot(results, lengths, args.length, Path(f"{args.out}.png"))
    print(f"wrote {args.out}.json and {args.out}.png")


if __name__ == "__main__":
    main()
