"""Lowering levels by name. Each computes what the one below computes; none replaces another silently."""

from __future__ import annotations

from functools import cache

from depthpass.errors import SpecError, did_you_mean
from depthpass_lowering.executors.base import EAGER, Executor

LEVELS = ("auto", "eager", "scheduled", "inductor", "cudagraph")
"""``eager``: op by op, autograd (the oracle). ``scheduled``: chunks as graphs, in-place keys and values, hand-scheduled
backward with sunk weight gradients. ``inductor``: the same with the chunks compiled, and what runs outside of token loops too.
``cudagraph``: the compiled loops as CUDA graphs. ``auto``: scheduled where that is legal for a region of a call, eager
elsewhere. The others are errors where they are not legal."""

AUTO_INDUCTOR = "auto-inductor"
"""``auto`` with compiled chunks: what ``torch.compile(backend="depthpass")`` runs, whose user has asked for a compiler."""


def check_level(name: str) -> str:
    """Return ``name`` or raise SpecError."""
    if name not in LEVELS:
        raise SpecError(f"lowering: expected one of {', '.join(LEVELS)}, got {name!r}.{did_you_mean(str(name), LEVELS)}")
    return name


def executor(level: str | Executor) -> Executor:
    """The executor of a level; an executor itself stands for a level of its own (``recording.py``)."""
    if isinstance(level, Executor):
        return level
    return _executor(level if level == AUTO_INDUCTOR else check_level(level))


@cache
def _executor(level: str) -> Executor:
    if level == "eager":
        return EAGER
    if level == "cudagraph":
        from depthpass_lowering.executors.graphed import Graphed

        return Graphed()
    if level in ("inductor", AUTO_INDUCTOR):
        from depthpass_lowering.executors.compiled import Compiled

        return Compiled(strict=level == "inductor")
    from depthpass_lowering.executors.scheduled import Scheduled

    return Scheduled(strict=level == "scheduled")
