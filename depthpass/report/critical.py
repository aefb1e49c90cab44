"""A critical path as people read it: cut where it changes the token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from depthpass.analysis.depth import PathVisit
from depthpass.prompt import in_notebooks


@in_notebooks
@dataclass(frozen=True)
class Segment:
    """Part of a critical path that stays at one token.

    Attributes:
        token: position in the row, from 0.
        visits: value names of the visits, in order.
        blocks: their physical blocks.
    """

    token: int
    visits: tuple[str, ...]
    blocks: tuple[int, ...]

    def __str__(self) -> str:
        return f"token {self.token}: {'block' if len(self.blocks) == 1 else 'blocks'} {_ranges(self.blocks)}"


def segments(steps: Sequence[PathVisit]) -> tuple[Segment, ...]:
    """A path cut where it changes the token."""
    return tuple(
        Segment(token, tuple(s.visit for s in part), tuple(s.block for s in part))
        for token, group in groupby(steps, key=lambda s: s.token)
        if (part := list(group))
    )


def _ranges(blocks: Sequence[int]) -> str:
    """Blocks as text, runs of consecutive ones joined: ``0..3, 2, 3..5``."""
    runs: list[list[int]] = []
    for b in blocks:
        if runs and b == runs[-1][-1] + 1:
            runs[-1].append(b)
        else:
            runs.append([b])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs)
