"""One harness for every benchmark: build, time in turn, print ratios beside the floor, write JSON and Markdown."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Result:
    """One benchmark: seconds per call (or MiB) by label, with the setting they were taken in."""

    name: str
    setting: dict[str, object]
    baseline: str
    rows: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unit: str = "ms"

    def ratio(self, label: str) -> float:
        return self.rows[label] / self.rows[self.baseline]

    def markdown(self) -> str:
        lines = [f"### {self.name}", "", ", ".join(f"{k} {v}" for k, v in self.setting.items()), "",
                 f"| run | {self.unit} | ratio | floor | ratio / floor |", "|---|---|---|---|---|"]
        for label, seconds in self.rows.items():
            floor = self.floors.get(label)
            lines.append(
                f"| {label} | {seconds * (1e3 if self.unit == 'ms' else 1):.1f} | {self.ratio(label):.2f} | "
                + (f"{floor:.2f} | {self.ratio(label) / floor:.2f} |" if floor else "| |")
            )
        return "\n".join([*lines, "", *self.notes])


def machine(device: str) -> str:
    """The machine in words, without its name."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def compare(runs: dict[str, Callable[[], object]], repeat: int = 5, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each run, taken in turn so that drift of the machine hits all alike; one warm-up each."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {label: [] for label in runs}
    for run in runs.values():
        run()
    for _ in range(repeat):
        for label, run in runs.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            times[label].append(time.perf_counter() - start)
    return {label: statistics.median(t) for label, t in times.items()}


def save(results: list[Result], path: str | None, plot: str | None = None) -> None:
    """Print Markdown; with a path also write ``path`` as JSON and ``plot`` as a picture."""
    for result in results:
        print(result.markdown(), flush=True)
        print()
    if path:
        Path(path).write_text(json.dumps([vars(r) for r in results], indent=2))
    if plot:
        _plot(results, plot)


def _plot(results: list[Result], path: str) -> None:
    """Ratios as bars, floors as marks, one panel per result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(8, 3.2 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results):
        labels = [label for label in result.rows if label != result.baseline]
        axis.bar(labels, [result.ratio(label) for label in labels], color="0.7")
        marked = [label for label in labels if label in result.floors]
        axis.plot(marked, [result.floors[label] for label in marked], "k_", markersize=20, label="floor")
        axis.axhline(1.0, color="0.3", linewidth=0.8)
        axis.set(title=result.name, ylabel=f"ratio to {result.baseline}")
        axis.tick_params(axis="x", rotation=30)
        if marked:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
