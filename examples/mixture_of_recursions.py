"""A small language model from scratch on text that ships with Python: stock, looped, MoR and ITT at equal training FLOPs.

The text is the language reference in ``pydoc_data.topics`` (about 465,000 characters), one token per character; every
eighth topic is held out. Each model trains until it has used the FLOPs that the report counts for the stock model's steps,
so a cheaper program takes more steps. Routed models train by top-k over the row, which looks ahead: they are scored twice,
as trained and by threshold, which is causal and the only one of the two that can generate.

    python examples/mixture_of_recursions.py [--steps 300] [--out mor]

Writes ``OUT.json``, ``OUT.svg`` with the loss curves (needs matplotlib) and ``OUT.html``, the tokens of a held-out passage
coloured by the block visits that they took.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import depthpass as dp

LENGTH = 128


def build(layers: int, args) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=args.width, intermediate_size=8 * args.width // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=True,
    ))


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out characters; the few that are not ASCII become question marks."""
    parts: tuple[list[str], list[str]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        parts[i % 8 == 0].append(topics[name])
    return tuple(torch.tensor(list("\n".join(p).encode("ascii", "replace"))) for p in parts)  # type: ignore[return-value]


def rows(text: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(text) - LENGTH, (count,), generator=generator)
    return torch.stack([text[s : s + LENGTH] for s in starts])


def held_out_loss(model, text: torch.Tensor) -> float:
    """Nats per character over the same 64 rows for every model."""
    ids = rows(text, 64, torch.Generator().manual_seed(99))
    model.eval()
    with torch.no_grad():
        return sum(model(input_ids=b, labels=b, use_cache=False).loss.item() for b in ids.split(16)) / 4


def step_flops(model, args) -> float:
    cost = dp.report(model, seq_len=LENGTH, batch=args.batch).cost
    return sum(cost.at(name, LENGTH, args.batch) for name in ("FLOPs forward", "FLOPs backward"))


def train(model, text, held_out, steps: int, flops: float, args) -> dict:
    """Train for a number of steps; losses against FLOPs, and CPU seconds of the steps alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 30) * (0.1 + 0.45 * (1 + math.cos(math.pi * s / steps)))
    )
    generator, curve, seconds = torch.Generator().manual_seed(args.seed), [], 0.0
    for step in range(steps):
        start = time.process_time()
        ids = rows(text, args.batch, generator)
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - start
        if step % max(1, steps // 12) == 0 or step == steps - 1:
            curve.append((flops * (step + 1), held_out_loss(model, held_out)))
    return {"curve": curve, "cpu_seconds": seconds}


def by_threshold(model, spec, layers: int, args):
    """The trained model with its routers read as thresholds: same parameters, causal."""
    causal = dp.transform(build(layers, args), spec)
    causal.load_state_dict(model.state_dict())
    return causal.eval()


def systems(args) -> dict:
    """By name: number of unique layers, the pass that trains, the pass that scores causally."""
    stack = {"start": 1, "end": 3}
    mor = {**stack, "recursions": 3, "taps": True}
    itt = {"steps": 3, "blocks": (1, 3), "taps": True}
    return {
        "stock, 8 layers": (8, dp.Identity(), None),
        "stock, 4 layers": (4, dp.Identity(), None),
        "looped: 1 + 2 x 3 + 1 visits of 4 layers": (4, dp.Loop(**stack, times=3), None),
        "MoR-3 on the same 4 layers": (
            4, dp.MixtureOfRecursions(**mor), dp.MixtureOfRecursions(**mor, mode="threshold"),
        ),
        "ITT x3 at 50 % on 4 layers": (
            4, dp.InnerThinking(**itt, ratios=(0.5, 0.5)), dp.InnerThinking(**itt, mode="threshold"),
        ),
    }


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, r in results.items():
        axes.plot([f / 1e12 for f, _ in r["curve"]], [loss for _, loss in r["curve"]], label=name, linewidth=1.5)
    axes.set(xlabel="training FLOPs (10^12)", ylabel="held-out loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the first stock model; the others follow from FLOPs")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="train only the systems whose name has this in it; the others are read from OUT.json")
    parser.add_argument("--out", type=Path, default=Path("mor"))
    args = parser.parse_args()
    console, (text, held_out) = Console(), corpus()
    table = Table("model", "parameters", "visits per token", "steps", "held-out loss", "by threshold", "CPU s")
    done = args.out.with_suffix(".json")
    results = json.loads(done.read_text()) if args.only and done.exists() else {}
    budget = args.steps * step_flops(dp.transform(build(8, args), dp.Identity()), args)
    for name, (layers, spec, causal_spec) in systems(args).items():
        if args.only and not any(word in name for word in args.only.split(",")):
            continue
        model = dp.transform(build(layers, args), spec)
        flops = step_flops(model, args)
        steps = round(budget / flops)
        found = train(model, text, held_out, steps, flops, args)
        causal = None if causal_spec is None else by_threshold(model, causal_spec, layers, args)
        report = dp.report(model, seq_len=LENGTH, batch=args.batch, cost=False)
        visits = [n.value for s in report.sections for n in s.numbers if n.key == "token_visits_expected"]
        found |= {
            "layers": layers, "steps": steps, "parameters": sum(p.numel() for p in model.parameters()),
            "visits": visits[0] if visits else report.visits,
            "loss": found["curve"][-1][1], "causal_loss": None if causal is None else held_out_loss(causal, held_out),
        }
        if causal is not None:
            ids = rows(held_out, 4, torch.Generator().manual_seed(5))
            with torch.no_grad():
                seen = dp.routing_of(causal, causal(input_ids=ids, use_cache=False))
            found["share_by_threshold"] = dict(seen.share)
            if "MoR" in name:
                words = [[chr(c) for c in row] for row in ids.tolist()]
                dp.plot_depth(words, seen, title=f"{name}, by threshold").save(args.out.with_suffix(".html"))
        results[name] = found
        console.print(f"{name}: {steps} steps, held-out loss {found['loss']:.3f}, {found['cpu_seconds']:.0f} CPU s")
        done.write_text(json.dumps(results, indent=1))
    results = {name: results[name] for name in systems(args) if name in results}
    for name, r in results.items():
        causal = "-" if r["causal_loss"] is None else f"{r['causal_loss']:.3f}"
        table.add_row(name, f"{r['parameters']:,}", f"{r['visits']:.2f}", str(r["steps"]), f"{r['loss']:.3f}", causal,
                      f"{r['cpu_seconds']:.0f}")
    console.print(table)
    draw(results, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
