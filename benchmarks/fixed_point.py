"""Prefill of one row by sweeps against the token loop, for bridges of several strengths.

    python benchmarks/fixed_point.py [--json out.json] [--tokens 256] [--groups 1,4] [--gains 0.02,0.1,0.5]

A gain is the standard deviation of the bridges' up maps in units of 1 / sqrt(rank); the downward maps have that of a linear
layer. Every run prints the sweeps it took, the rate it saw and its true error against the token loop.
"""

from __future__ import annotations

import argparse

import torch
from harness import Result, compare, machine, save
from turboconn import build

import depthpass as dp

RUNS = {
    "sweeps, to rounding": {},
    "sweeps, tol 1e-3": {"tol": 1e-3},
    "window 16, tol 1e-3": {"tol": 1e-3, "window": 16},
}


def strengthen(model, gain: float) -> dict:
    """Parameters of bridges with a given strength."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, value in model.depth.state_dict().items():
        scale = 0.0 if name.endswith("bias") else value.shape[1] ** -0.5 * (gain if ".up." in name else 1.0)
        found[name] = torch.randn(value.shape, generator=generator) * scale
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--groups", default="4")
    parser.add_argument("--gains", default="0.02,0.1,0.5")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    stock = build(args.width, args.blocks).eval()
    ids = torch.randint(3, 1024, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    last = args.blocks - 2
    results = []
    for group in map(int, args.groups.split(",")):
        spec = dp.TurboConn(bridges=[(last, 0), (last, 2)], group=group, rank=32)
        for gain in map(float, args.gains.split(",")):
            loop = dp.transform(stock, spec)
            loop.depth.load_state_dict(strengthen(loop, gain))
            models = {"token loop": loop}
            for label, options in RUNS.items():
                models[label] = dp.transform(stock, spec, schedule="fixed_point", **options)
                models[label].depth.load_state_dict(loop.depth.state_dict())

            def prefill(model):
                with torch.no_grad():
                    return model(input_ids=ids, use_cache=True, logits_to_keep=1)

            result = Result(
                f"Prefill, group {group}, gain {gain:g}",
                {"width": args.width, "blocks": args.blocks, "batch": 1, "tokens": args.tokens, "machine": machine("cpu")},
                "token loop",
            )
            result.rows = compare(
                {"stock": lambda: prefill(stock), **{k: (lambda m=m: prefill(m)) for k, m in models.items()}}, args.repeat
            )
            with torch.no_grad():
                exact = loop(input_ids=ids, use_cache=False).logits
                for label in RUNS:
                    out = models[label](input_ids=ids, use_cache=False)
                    error = float((out.logits - exact).norm() / exact.norm())
                    result.notes.append(f"{label}: {out.sweeps[0]}; true error {error:.1e}  ")
            print(result.markdown(), flush=True)
            results.append(result)
    if args.json:
        save(results, args.json)


if __name__ == "__main__":
    main()
