"""Depth against task: p hops, for which lookups follow one another in depth and not from token to token; arms as for S3."""

from __future__ import annotations

from examples.experiments.depth_task import depth_against

EXPERIMENT = depth_against("p-hop induction by depth: stock at 2, 4, 8 blocks, loop, TurboConn, T2MLR")
