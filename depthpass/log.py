"""What takes long is said: one logger, ``depthpass``, and a line on the terminal while it runs.

``logging.getLogger("depthpass").setLevel("INFO")`` shows every capture and compilation with its time; ``DEBUG`` every pass.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("depthpass")
logger.addHandler(logging.NullHandler())

_shown = True


def progress(on: bool = True) -> bool:
    """Show what takes long while it runs, on a terminal, or be silent; returns what was set before.

    Without a terminal nothing is shown either way. The logger ``depthpass`` has the same, at level INFO.
    """
    global _shown
    before, _shown = _shown, bool(on)
    return before


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is being done: a line on the terminal until it is over, and a record with the seconds it took."""
    begun = time.perf_counter()
    try:
        if _shown and sys.stderr.isatty():
            from rich.console import Console

            with Console(stderr=True).status(f"depthpass: {what}"):
                yield
        else:
            yield
    except BaseException as error:
        logger.info("%s: %s after %.1f s", what, type(error).__name__, time.perf_counter() - begun)
        raise
    logger.info("%s: %.1f s", what, time.perf_counter() - begun)
