"""Thresholds of routers: one for all, or one for each route of a pass in program order."""

from __future__ import annotations

from collections.abc import Sequence

from depthpass.errors import PassError
from depthpass.passes.streams import Builder

Thresholds = float | Sequence[float]


def threshold_of(build: Builder, thresholds: Thresholds) -> float:
    """The threshold of the route that is built next; any where too few are given, see :func:`check_thresholds`."""
    if isinstance(thresholds, float | int):
        return thresholds
    place = sum(o.kind == "route" for o in build.ops)
    return thresholds[place] if place < len(thresholds) else 0.0


def check_thresholds(who: str, build: Builder, thresholds: Thresholds) -> None:
    """Refuse a number of thresholds that is not the number of routes.

    Raises:
        PassError: naming both.
    """
    routes = sum(o.kind == "route" for o in build.ops)
    if not isinstance(thresholds, float | int) and len(thresholds) != routes:
        raise PassError(f"{who}.threshold: expected one number for all routes, or one for each of the {routes} routes of this "
                        f"program, got {len(thresholds)}.")
