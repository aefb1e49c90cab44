"""TurboConn training step over the stock one, one size varied at a time: group, batch, tokens, width, depth.

    python benchmarks/sweep.py [--axes group,batch] [--lowering auto] [--repeat 3] [--json out.json] [--plot out.png]

Every point is a run of benchmarks/turboconn.py: stock and ours in turn, the floor from ceilings measured in that run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from turboconn import configuration, measure

BASE = {"group": 4, "batch": 8, "tokens": 156, "width": 512, "blocks": 8}
AXES = {
    "group": (2, 4, 8, 16, 32), "batch": (1, 4, 8, 32), "tokens": (40, 156, 512), "width": (128, 256, 512, 1024),
    "blocks": (4, 8, 16),
}


@dataclass
class Point:
    """Ratios of one configuration to its stock step, by lowering, and the floor of each."""

    axis: str
    value: int
    stock_ms: float
    rows: int
    floor: float
    ratios: dict[str, float]


def bridges(blocks: int) -> str:
    """Two overlapping bridges over three quarters of the blocks, as in the base configuration."""
    source = blocks * 3 // 4
    return f"{source}-0,{source}-{blocks // 4}"


def point(axis: str, value: int, lowering: str, repeat: int, device: str, dtype: str) -> Point:
    size = BASE | {axis: value}
    step, _ = measure(configuration(
        groups=str(size["group"]), width=size["width"], blocks=size["blocks"], batch=size["batch"], tokens=size["tokens"],
        bridges=bridges(size["blocks"]), lowering=lowering, repeat=repeat, no_naive=True, device=device, dtype=dtype,
    ))
    labels = [label for label in step.rows if label.startswith("g=")]
    return Point(
        axis, value, step.rows["stock"] * 1e3, size["batch"] * size["group"], step.floors[labels[0]],
        {label.split(" ", 1)[1]: step.ratio(label) for label in labels},
    )


def markdown(points: list[Point]) -> str:
    """One table per axis."""
    lines: list[str] = []
    for axis in dict.fromkeys(p.axis for p in points):
        mine = [p for p in points if p.axis == axis]
        rungs = list(mine[0].ratios)
        lines += [f"| {axis} | rows per chunk | stock ms | floor | {' | '.join(rungs)} |", "|---" * (4 + len(rungs)) + "|"]
        lines += [
            f"| {p.value} | {p.rows} | {p.stock_ms:.0f} | {p.floor:.2f} | {' | '.join(f'{p.ratios[r]:.2f}' for r in rungs)} |"
            for p in mine
        ]
        lines.append("")
    return "\n".join(lines)


def plot(points: list[Point], path: str) -> None:
    """Ratio against each size, the floor below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(p.axis for p in points))
    figure, panels = plt.subplots(1, len(axes), figsize=(3.2 * len(axes), 3.2), squeeze=False, sharey=True)
    for panel, axis in zip(panels[0], axes):
        mine = [p for p in points if p.axis == axis]
        values = [p.value for p in mine]
        for rung in mine[0].ratios:
            panel.plot(values, [p.ratios[rung] for p in mine], marker="o", label=rung)
        panel.plot(values, [p.floor for p in mine], "k--", label="floor")
        panel.set(xlabel=axis, xscale="log", xticks=values, xticklabels=values)
        panel.minorticks_off()
    panels[0][0].set_ylabel("training step over stock")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--lowering", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    points: list[Point] = []
    for axis in args.axes.split(","):
        for value in AXES[axis]:
            points.append(point(axis, value, args.lowering, args.repeat, args.device, args.dtype))
            print(f"# {axis} {value}: {points[-1].ratios}, floor {points[-1].floor:.2f}", flush=True)
    print(markdown(points))
    if args.json:
        Path(args.json).write_text(json.dumps([vars(p) for p in points], indent=2))
    if args.plot:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
