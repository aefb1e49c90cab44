"""Depth against task: addition, whose carry only depends on the last pair of digits that decides it; arms as for S3."""

from __future__ import annotations

from examples.experiments.depth_task import depth_against

EXPERIMENT = depth_against("addition, least digits first: stock models of 1, 2, 4 and 8 blocks, loop, TurboConn, T2MLR")
