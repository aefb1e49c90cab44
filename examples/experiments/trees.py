"""TurboConn's arithmetic trees: bridges carry the value so far, attention reaches back to where an operand began.

The published setting is trees of 30 nodes modulo 10, with brackets, on pretrained models; here the same generator with a small
modulus, written as code for a machine with few registers. A row is one tree, and the accuracy of the table that of whole trees.
"""

from __future__ import annotations

from examples.harness.bridges import tracking
from examples.harness.problems import Trees
from examples.harness.settings import Settings


def state(c: Settings, last: int | None) -> Trees:
    """What comes first are not the last few tokens, but trees of ``pretrain.length``."""
    return Trees(c.modulus)


EXPERIMENT = tracking("random arithmetic trees modulo m, as register code: TurboConn against stock", state, "last")
