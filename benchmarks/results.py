"""Results of a benchmark as data, Markdown, JSON and pictures."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from conditions import Conditions
from declare import Measurement
from gate import Gate


@dataclass
class Row:
    """One variant.

    Attributes:
        values: seconds by call, or the value.
        ratios: of each call to the baseline's of the same pair.
        gate: how far its numbers are off; None = others are held against it.
        products: matrix products of one call by kind.
        failed: why it was not timed.
    """

    label: str
    gate: Gate | None = None
    values: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    floor: float | None = None
    peak_mib: float | None = None
    products: dict[str, int] = field(default_factory=dict)
    note: str = ""
    failed: str = ""

    def to_json(self) -> dict:
        gate = None if self.gate is None else {**vars(self.gate), "passed": self.gate.passed}
        return {
            **vars(self), "gate": gate, "value": spread(self.values), "ratio": spread(self.ratios),
        }


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, least and most; None of nothing."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)} if values else None


@dataclass
class Result:
    """One measurement with its rows."""

    measurement: Measurement
    rows: list[Row]

    @property
    def failed(self) -> list[Row]:
        return [r for r in self.rows if r.failed]

    def to_json(self) -> dict:
        m = self.measurement
        return {
            "part": m.part, "title": m.title, "baseline": m.baseline, "quantity": m.quantity, "unit": m.unit, "axis": m.axis,
            "notes": list(m.notes), "rows": [r.to_json() for r in self.rows],
        }

    def markdown(self) -> str:
        """A table of the columns that have something in them."""
        unit = self.measurement.unit
        columns = {
            "run": lambda r: r.label,
            unit: lambda r: self._middle(r.values, self._scale),
            f"{unit}, range": lambda r: self._range(r.values, self._scale),
            f"over {self.measurement.baseline}": lambda r: self._middle(r.ratios, 1, 2),
            "range": lambda r: self._range(r.ratios, 1, 2),
            "floor": lambda r: "" if r.floor is None else f"{r.floor:.2f}",
            "over floor": lambda r: f"{statistics.median(r.ratios) / r.floor:.2f}" if r.floor and r.ratios else "",
            "peak MiB": lambda r: "" if r.peak_mib is None else f"{r.peak_mib:.0f}",
            "numbers off by": lambda r: f"not timed: {r.failed}" if r.failed else str(r.gate or "(oracle or stock)"),
            "products": lambda r: ", ".join(f"{n} {k}" for k, n in r.products.items()),
            "note": lambda r: r.note,
        }
        table = {name: [cell(r) for r in self.rows] for name, cell in columns.items()}
        table = {name: cells for name, cells in table.items() if any(cells)}
        lines = [f"### {self.measurement.title}", "", "| " + " | ".join(table) + " |", "|---" * len(table) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in zip(*table.values())]
        return "\n".join([*lines, "", *self.measurement.notes])

    @property
    def _scale(self) -> float:
        return 1e3 if self.measurement.quantity == "seconds" else 1

    @staticmethod
    def _middle(values: list[float], scale: float, digits: int | None = None) -> str:
        if not values:
            return ""
        value = statistics.median(values) * scale
        return f"{value:.{digits}f}" if digits is not None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"

    @staticmethod
    def _range(values: list[float], scale: float, digits: int = 1) -> str:
        return f"{min(values) * scale:.{digits}f}-{max(values) * scale:.{digits}f}" if len(values) > 1 else ""


@dataclass
class Report:
    """All measurements of one run of a benchmark."""

    name: str
    settings: dict[str, object]
    conditions: Conditions
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        return [row for result in self.results for row in result.failed]

    def head(self) -> str:
        settings = ", ".join(f"{k} {','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in self.settings.items())
        return "\n".join([f"## {self.name}", "", settings, "", *(f"- {line}" for line in self.conditions.lines()), ""])

    def markdown(self) -> str:
        return "\n".join([self.head(), *(f"{r.markdown()}\n" for r in self.results)])

    def to_json(self) -> dict:
        return {
            "benchmark": self.name, "settings": self.settings, "conditions": self.conditions.to_json(),
            "measurements": [r.to_json() for r in self.results],
        }

    def write(self, json_path: str | None, markdown_path: str | None, plot_path: str | None) -> None:
        """Files that were asked for; called after every measurement, so that a run that is stopped keeps what it has."""
        if json_path:
            Path(json_path).write_text(json.dumps(self.to_json(), indent=2))
        if markdown_path:
            Path(markdown_path).write_text(self.markdown())
        if plot_path and any(r.ratios for result in self.results for r in result.rows):
            plot(self.results, plot_path)


def plot(results: list[Result], path: str) -> None:
    """Ratios with their ranges and floors: lines by size where a size was varied, else bars by row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[Result]] = {}
    for r in results:
        panels.setdefault(r.measurement.axis[0] if r.measurement.axis else r.measurement.title, []).append(r)
    figure, axes = plt.subplots(1, len(panels), figsize=(max(3.2, 8 / len(panels)) * len(panels), 3.4), squeeze=False)
    for axis, (name, shown) in zip(axes[0], panels.items()):
        (_lines if shown[0].measurement.axis else _bars)(axis, shown)
        axis.set(title=name, ylabel=f"over {shown[0].measurement.baseline}")
        axis.axhline(1.0, color="0.7", linewidth=0.8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _timed(result: Result) -> list[Row]:
    return [r for r in result.rows if r.ratios and r.label != result.measurement.baseline]


def _errors(rows: list[Row]) -> list[list[float]]:
    """Distances of the least and the most ratio from the median."""
    spreads = [spread(r.ratios) for r in rows]
    return [[f["median"] - f["least"] for f in spreads], [f["most"] - f["median"] for f in spreads]]


def _bars(axis, results: list[Result]) -> None:
    rows = _timed(results[0])
    axis.bar([r.label for r in rows], [spread(r.ratios)["median"] for r in rows], yerr=_errors(rows), color="0.7", capsize=3)
    marked = [r for r in rows if r.floor]
    if marked:
        axis.plot([r.label for r in marked], [r.floor for r in marked], "k_", markersize=20, label="floor")
    axis.tick_params(axis="x", rotation=30)


def _lines(axis, results: list[Result]) -> None:
    lines: dict[str, list[tuple[int, Row]]] = {}
    for result in results:
        for row in _timed(result):
            lines.setdefault(row.label, []).append((result.measurement.axis[1], row))
    for label, points in lines.items():
        sizes, rows = zip(*points)
        axis.errorbar(sizes, [spread(r.ratios)["median"] for r in rows], yerr=_errors(list(rows)), marker="o", capsize=3,
                      label=label)
        axis.plot(sizes, [r.floor for r in rows], "k--", label="floor" if label == next(iter(lines)) else None)
    axis.set(xscale="log", xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
