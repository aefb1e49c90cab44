"""Running parity: bridges every g tokens carry the bit as far as the row goes; stock models do not."""

from __future__ import annotations

from examples.harness.bridges import tracking
from examples.harness.problems import Parity, Text
from examples.harness.settings import Settings


def state(c: Settings, last: int | None) -> Parity:
    return Parity(last, Text().vocabulary if c.before == "text" else 3)


EXPERIMENT = tracking("parity of all bits so far: TurboConn at several groups against stock", state)
