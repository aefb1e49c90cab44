"""What takes long is said: one logger, ``depthpass``, and a line or a bar on the terminal while it runs.

``logging.getLogger("depthpass").setLevel("INFO")`` shows every capture and compilation with its time; ``DEBUG`` every pass.
What runs otherwise than asked is a warning, said once (:func:`fallback`); without a configuration Python prints warnings alone.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("depthpass")
_said: set[str] = set()

_shown = True
_busy = False
"""Whether something is on the terminal already: what goes on inside it shows nothing of its own."""


def progress(on: bool = True) -> bool:
    """Show what takes long while it runs, on a terminal, or be silent; returns what was set before.

    Without a terminal nothing is shown either way. The logger ``depthpass`` has the same, at level INFO.
    """
    global _shown
    before, _shown = _shown, bool(on)
    return before


def _is_shown() -> bool:
    return _shown and not _busy and sys.stderr.isatty()


def fallback(message: str, asked: bool) -> None:
    """Say, once per process and message, that something slower or other than the best runs.

    Args:
        message: what runs in place of what, and why.
        asked: whether somebody has asked for what does not run: a warning; else it was ours to choose: level INFO.
    """
    if message in _said or not logger.isEnabledFor(level := logging.WARNING if asked else logging.INFO):
        return
    _said.add(message)
    logger.log(level, "%s", message)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is being done: a line on the terminal until it is over, and a record with the seconds it took."""
    global _busy
    begun = time.perf_counter()
    try:
        if _is_shown():
            from rich.console import Console

            _busy = True
            try:
                with Console(stderr=True).status(f"depthpass: {what}"):
                    yield
            finally:
                _busy = False
        else:
            yield
    except BaseException as error:
        logger.info("%s: %s after %.1f s", what, type(error).__name__, time.perf_counter() - begun)
        raise
    logger.info("%s: %.1f s", what, time.perf_counter() - begun)


class Bar:
    """A progress bar on a terminal's standard error; silent elsewhere. Use as a context, call it with (done, total)."""

    def __init__(self, what: str) -> None:
        self.what, self.row = what, 0
        self.bar: Any = None

    def __enter__(self) -> Bar:
        global _busy
        if _is_shown():
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            _busy = True
            self.row = self.bar.add_task(self.what, total=None)
        return self

    def __call__(self, done: int, total: int | None = None) -> None:
        if self.bar is not None:
            self.bar.update(self.row, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        global _busy
        if self.bar is not None:
            self.bar.stop()
            _busy = False
