"""Pictures: a line per arm with the range of its seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.harness.arms import Arm
from examples.harness.experiment import Experiment, Summary, value
from examples.harness.store import spread

COLOURS = ("#3b6fb6", "#d1603d", "#3f8f5b", "#8a5aa8", "#b08a2e", "#4aa3a8", "#a84a6a", "#6b6b6b", "#222222")


def band(axes: Any, summary: Summary, points: dict[str, dict[float, str]], *, single: bool = False, **more: Any) -> None:
    """For every arm a line through the means over its seeds, and a band from the lowest to the highest.

    Args:
        points: arm -> place on the x axis -> key of the measures.
        single: a thin line for each seed instead of the band.
    """
    for i, arm in enumerate(a for a in summary.arms if a.name in points):
        at = points[arm.name]
        held = [spread([value(r, path) for r in summary.runs[arm.name]]) for path in at.values()]
        colour = COLOURS[i % len(COLOURS)]
        # Wider below, so that lines that lie on each other are seen.
        axes.plot(list(at), [s["mean"] for s in held], color=colour, label=arm.name, marker="o", markersize=max(3.0, 6.5 - i),
                  linestyle="--" if arm.control else "-", linewidth=max(1.4, 4.0 - 0.8 * i), **more)
        if single:
            for run in summary.runs[arm.name]:
                axes.plot(list(at), [value(run, path) for path in at.values()], color=colour, linewidth=0.8, alpha=0.6,
                          linestyle="--" if arm.control else "-")
            continue
        axes.fill_between(list(at), [s["min"] for s in held], [s["max"] for s in held], color=colour, alpha=0.15, linewidth=0)


def lengths(axes: Any, tokens: list[int], trained: int) -> None:
    """Tokens on a logarithmic x axis, the trained length dotted."""
    axes.set_xscale("log")
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set_xticks([], minor=True)
    axes.axvline(trained, color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel("tokens (dotted: longest in training)")


def curves(axes: Any, summary: Summary, column: int, *, against: int = 0, arms: list[Arm] | None = None) -> None:
    """Training curves of all seeds; columns as in ``Outcome.curve``: step, FLOPs, loss, accuracy, length."""
    for i, arm in enumerate(summary.arms if arms is None else arms):
        for run in summary.runs[arm.name]:
            axes.plot([p[against] for p in run["curve"]], [p[column] for p in run["curve"]], color=COLOURS[i % len(COLOURS)],
                      linestyle="--" if arm.control else "-", linewidth=0.9, alpha=0.75)


def legend(axes: Any, summary: Summary) -> None:
    """Names of the arms in the colours of :func:`curves`."""
    for i, arm in enumerate(summary.arms):
        axes.plot([], [], color=COLOURS[i % len(COLOURS)], linestyle="--" if arm.control else "-", label=arm.name)
    axes.legend(fontsize=7, frameon=False)


def save(summary: Summary, experiment: Experiment, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    experiment.draw(figure, summary)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
