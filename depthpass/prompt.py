"""How objects look at a prompt and in a notebook: at most twelve lines, in the colours of the page they stand in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any, TypeVar

from depthpass.limits import shown

T = TypeVar("T", bound=type)

LINES = 12
WIDTH = 120

STYLE = ("color:inherit;background:transparent;border:0;margin:0;padding:0;overflow-x:auto;white-space:pre;"
         "font:12px/1.45 ui-monospace,Menlo,Consolas,monospace")


def at_prompt(cls: T) -> T:
    """Class decorator: ``repr`` is the beginning of ``str``, or a card of the fields where a class has no ``str`` of its own.

    Stands above ``@dataclass``, whose ``repr`` it replaces. Also gives the class ``_repr_html_`` where it has none.
    """
    told = cls.__str__ is not object.__str__
    cls.__repr__ = (lambda self: beginning(str(self))) if told else card  # type: ignore[method-assign, assignment]
    return in_notebooks(cls)


def in_notebooks(cls: T) -> T:
    """Class decorator for a class whose own ``repr`` is short: notebooks show the same."""
    if not hasattr(cls, "_repr_html_"):
        cls._repr_html_ = lambda self: as_html(repr(self))  # type: ignore[attr-defined]
    return cls


def beginning(text: str) -> str:
    """The first lines of a text, with a last one that says how much is missing.

    >>> beginning("a")
    'a'
    """
    lines = [line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..." for line in text.splitlines()]
    if len(lines) <= LINES:
        return "\n".join(lines)
    return "\n".join([*lines[: LINES - 1], f"... {len(lines) - LINES + 1} more lines: print(...) shows them"])


def card(value: Any) -> str:
    """The name of a class and its fields, one a line, each cut to the line."""
    names = [f.name for f in fields(value) if f.repr] if is_dataclass(value) else list(vars(value))
    pairs = [(k, getattr(value, k)) for k in names if not k.startswith("_")]
    room = max((len(k) for k, _ in pairs), default=0)
    lines = [f"  {k:<{room}}  {_brief(v)}" for k, v in pairs]
    if len(lines) >= LINES:
        lines = [*lines[: LINES - 2], f"  ... {len(lines) - LINES + 2} more fields"]
    return "\n".join(line[:WIDTH] for line in [type(value).__name__, *lines])


def _brief(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple | Mapping) and len(value) > 4:
        inside = {type(v).__name__ for v in (value.values() if isinstance(value, Mapping) else value)}
        return f"{len(value)} of {', '.join(sorted(inside))}"
    return " ".join(shown(value).split())


def as_html(text: str) -> str:
    """Text for a notebook; it takes the notebook's own colours, light or dark."""
    return f'<pre style="{STYLE}">{escape(text)}</pre>'


def listing(rows: list[tuple[str, ...]], *, last: str = "") -> None:
    """Print columns: on a terminal within its width, long texts over several lines; else one line a row."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table, Text(last), end="")
        return
    widths = [max(map(len, column)) for column in zip(*rows)]
    print("\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows))
    if last:
        print(last)
