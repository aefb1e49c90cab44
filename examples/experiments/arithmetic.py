"""Modular arithmetic, worked out left to right: bridges every g tokens carry the value; stock models do not.

The published task is random trees of 30 nodes modulo 10; here every tree is a path, and the value so far is asked
at each token.
"""

from __future__ import annotations

from examples.harness.bridges import tracking
from examples.harness.problems import Formula
from examples.harness.settings import Settings


def state(c: Settings, last: int | None) -> Formula:
    return Formula(c.modulus, last)


EXPERIMENT = tracking("sums and products modulo m, left to right: TurboConn against stock", state)
