"""Depth against task, harder: the word problem of S5, which no fixed number of blocks can solve for all lengths (NC1-complete)."""

from __future__ import annotations

from examples.experiments.depth_task import depth_against

EXPERIMENT = depth_against("state tracking (S5, two generators): stock at 2, 4, 8 blocks, loop, TurboConn, feedback")
