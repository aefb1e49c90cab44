"""A picture of tokens coloured by how deep each one went: one self-contained HTML page, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from depthpass.errors import InputError

# Light to dark, one hue: deeper is darker. The text turns white where the ground is dark.
_LOW, _HIGH = (239, 246, 255), (23, 64, 139)


@dataclass(frozen=True)
class DepthPlot:
    """Tokens with their depths.

    Attributes:
        rows: per row the tokens' texts and depths.
        title: above the picture.
    """

    rows: tuple[tuple[tuple[str, float], ...], ...]
    title: str = ""

    def _repr_html_(self) -> str:
        depths = [d for row in self.rows for _, d in row]
        low, high = min(depths), max(depths)
        lines = "\n".join(
            "<p>" + "".join(_token(text, d, low, high) for text, d in row) + "</p>" for row in self.rows
        )
        steps = sorted({low, (low + high) / 2, high})
        legend = "".join(_token(f" {s:g} ", s, low, high) for s in steps)
        head = f"<h3>{escape(self.title)}</h3>" if self.title else ""
        return (
            '<div class="depth-plot" style="font: 14px/1.9 ui-monospace, monospace; max-width: 60em">'
            f"{head}<p>block visits: {legend}</p>\n{lines}</div>"
        )

    def to_html(self) -> str:
        """A whole page."""
        title = escape(self.title or "Depth per token")
        return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
                f"<body>{self._repr_html_()}</body></html>\n")

    def save(self, path: str | Path) -> None:
        """Write the page to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8")


def plot_depth(tokens: Sequence[Sequence[str]], routing: Any, title: str = "") -> DepthPlot:
    """Tokens coloured by depth.

    Args:
        tokens: the text of every token, per row, pads included.
        routing: from :func:`depthpass.routing_of`; or depths per row and token (pads are not known then).
        title: above the tokens.

    Raises:
        InputError: rows or tokens do not match the depths.
    """
    depth = getattr(routing, "depth", routing)
    depths = depth.tolist() if hasattr(depth, "tolist") else [list(row) for row in depth]
    valid = routing.valid.tolist() if hasattr(routing, "valid") else [[True] * len(row) for row in depths]
    if [len(row) for row in tokens] != [len(row) for row in depths] or not any(map(any, valid)):
        raise InputError(f"tokens: expected rows of {[len(r) for r in depths]} tokens, as many as there are depths, got "
                         f"{[len(r) for r in tokens]}.")
    rows = tuple(
        tuple((str(t), float(d)) for t, d, real in zip(*row) if real) for row in zip(tokens, depths, valid)
    )
    return DepthPlot(rows, title)


def _token(text: str, depth: float, low: float, high: float) -> str:
    at = (depth - low) / (high - low) if high > low else 0.0
    ground = ", ".join(str(round(a + (b - a) * at)) for a, b in zip(_LOW, _HIGH))
    ink = "#fff" if at > 0.5 else "#111"
    shown = escape(text).replace("\n", "⏎").replace(" ", "&nbsp;")
    return (f'<span title="{depth:g}" style="background: rgb({ground}); color: {ink}; padding: 1px 2px; '
            f'border-radius: 2px">{shown}</span><wbr>')
