"""Where results go: the terminal, a pipe, files."""

from __future__ import annotations

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
        if path is not None and (reason := _why_not(path, folders)):
            raise InputError(f"{path!r} cannot be written: {reason}. Nothing was computed yet.")


def _why_not(path: str, folders: bool) -> str | None:
    """Why a file or folder cannot be written, found out by writing; None = it can."""
    if not path:
        return "the name is empty"
    place = Path(path)
    if place.is_dir():
        if not folders:
            return "it is a folder"
        place /= ".depthpass"
    elif not place.parent.is_dir():
        # A folder that is asked for is made, with those above it.
        if not folders or (place.suffix and not path.endswith("/")):
            return f"there is no folder {str(place.parent)!r}"
        place = next(p for p in place.parents if p.exists()) / ".depthpass"
    there = place.exists()
    try:
        with place.open("ab"):
            pass
        if not there:
            place.unlink()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
