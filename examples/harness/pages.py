"""The page of results: tables between marks, written by ``publish`` and never by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def marks(name: str) -> tuple[str, str]:
    return f"<!-- results: {name} -->", f"<!-- end: {name} -->"


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of an experiment; without marks a section is added at the end."""
    begin, end = marks(name)
    held = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    if begin not in held:
        held += f"\n## {name}\n\n{begin}\n{end}\n\n![{name}](images/results_{name}.png)\n"
    body = re.sub(re.escape(begin) + r".*?" + re.escape(end), lambda _: f"{begin}\n{text.strip()}\n{end}", held, flags=re.DOTALL)
    page.write_text(body, encoding="utf-8")


def thinned(held: dict[str, Any], points: int = 30) -> dict[str, Any]:
    """A result whose training curves have at most so many points, and numbers of four digits."""

    def short(run: dict[str, Any]) -> dict[str, Any]:
        return run | {"curve": run["curve"][:: max(1, len(run["curve"]) // points)]}

    return _rounded(held | {key: [short(run) for run in held[key]] for key in ("runs", "others") if key in held})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
