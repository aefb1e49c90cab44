"""Where results go: the terminal, a pipe, files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from depthpass.errors import InputError
from depthpass.log import Bar, working

__all__ = ["Bar", "check_outputs", "show", "working", "write_text"]


def show(result: Any, form: str | None) -> None:
    """Print a report or a table: a chosen form, rich text on a terminal, plain text elsewhere."""
    if sys.stdout.isatty() and form in (None, "text"):
        from rich.console import Console

        Console().print(result.to_rich() if form else result)
    elif form is not None:
        print(getattr(result, f"to_{form}")())
    else:
        print(result)


def write_text(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path!r} cannot be written: {error.strerror}.") from None


def check_outputs(*paths: str | None, folders: bool = False) -> None:
    """Refuse files that cannot be written before the work that they are for.

    Args:
        folders: whether a path may be a folder.

    Raises:
        InputError: the folder of a file is missing or may not be written to, or a folder stands where a file should.
    """
    for path in paths:
        if path is None:
            continue
        place = Path(path)
        if place.is_dir():
            reason = None if folders else "it is a folder"
        elif place.exists():
            reason = None if os.access(place, os.W_OK) else "permission denied"
        elif not place.parent.is_dir():
            # A folder that is asked for is made, with those above it.
            reason = None if folders and not place.suffix else f"there is no folder {str(place.parent)!r}"
        else:
            reason = None if os.access(place.parent, os.W_OK) else "permission denied"
        if reason:
            raise InputError(f"{path!r} cannot be written: {reason}. Nothing was computed yet.")
