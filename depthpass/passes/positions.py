"""Blocks that a pass chooses by their position."""

from __future__ import annotations

from collections.abc import Sequence

from depthpass.errors import PassError
from depthpass.passes.base import require


def positions(who: str, blocks: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Positions of chosen blocks among ``count`` visits; ``every_other`` starts from the second.

    Raises:
        PassError: the program does not have them.
    """
    chosen = tuple(range(1, count, 2)) if isinstance(blocks, str) else tuple(blocks)
    if not chosen or max(chosen) >= count:
        got = f"{blocks!r} of {count} visits" if isinstance(blocks, str) else list(chosen)
        raise PassError(f"{who}.blocks: expected positions in 0..{count - 1}, got {got}.")
    return chosen


def check_positions(who: str, blocks: str | Sequence[int]) -> None:
    """Refuse an empty list of positions, negative ones and repeats."""
    if isinstance(blocks, str):
        return
    require(blocks != (), f"{who}.blocks", "at least one position", [])
    require(len(set(blocks)) == len(blocks), f"{who}.blocks", "positions that differ", list(blocks))
    require(min(blocks) >= 0, f"{who}.blocks", "positions of at least 0", list(blocks))
