"""Depth against task, harder: the word problem of S5, which is complete for NC1: a fixed depth is not known to solve it."""

from __future__ import annotations

from examples.experiments.depth_task import depth_against

EXPERIMENT = depth_against("state tracking (S5, two generators): stock at 2, 4, 8 blocks, loop, TurboConn, feedback")
