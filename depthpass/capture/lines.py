"""Where in a model's code an op of a trace comes from: the innermost ``forward`` alone, which is what messages name.

torch looks up its whole stack for every node, and that takes a tenth of a trace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import StackSummary

from torch.fx import proxy


class _Forward:
    """Stands in for torch's ``CapturedTraceback``."""

    @staticmethod
    def extract(**_: object) -> _Forward:
        return _Forward()

    def summary(self) -> StackSummary:
        from torch.fx.experimental.symbolic_shapes import uninteresting_files

        frame, torchs = sys._getframe(1), uninteresting_files()
        while frame is not None and (frame.f_code.co_name != "forward" or frame.f_code.co_filename in torchs):
            frame = frame.f_back
        return StackSummary.from_list([(frame.f_code.co_filename, frame.f_lineno, "forward", None)] if frame else [])


@contextmanager
def innermost_forwards() -> Iterator[None]:
    """Nodes that are traced while this is open have one line as their ``stack_trace``."""
    stock = getattr(proxy, "CapturedTraceback", None)
    setattr(proxy, "CapturedTraceback", _Forward)  # noqa: B010  pyright knows it as a class
    try:
        yield
    finally:
        setattr(proxy, "CapturedTraceback", stock)  # noqa: B010
