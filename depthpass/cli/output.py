"""Where results go: the terminal, a pipe, files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthpass.errors import InputError


def show(made: Any, form: str | None) -> None:
    """Print a report or a table: a chosen form, rich text on a terminal, plain text elsewhere."""
    if sys.stdout.isatty() and form in (None, "text"):
        from rich.console import Console

        Console().print(made.to_rich() if form else made)
    elif form is not None:
        print(getattr(made, f"to_{form}")())
    else:
        print(made)


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


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on a terminal what is going on, as long as it goes on; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


class Bar:
    """A progress bar on a terminal's standard error; silent elsewhere. Use as a context, call it with (done, total)."""

    def __init__(self, what: str) -> None:
        self.what, self.bar = what, None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.row = self.bar.add_task(self.what, total=None)
        return self

    def __call__(self, done: int, total: int | None = None) -> None:
        if self.bar is not None:
            self.bar.update(self.row, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
