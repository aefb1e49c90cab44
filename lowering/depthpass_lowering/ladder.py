"""The ladder: rungs by name. Each computes what the rung below computes; none replaces another silently."""

from __future__ import annotations

from collections.abc import Callable

from depthpass.errors import SpecError, did_you_mean
from depthpass_lowering.eager import Run

RUNGS = ("auto", "eager", "scheduled", "inductor", "cudagraph")
"""``eager``: op by op, autograd (the oracle). ``scheduled``: chunks as graphs, in-place keys and values, hand-scheduled
backward with sunk weight gradients. ``inductor``: the same with the chunks compiled, and what runs outside of token loops too.
``cudagraph``: the compiled loops as CUDA graphs. ``auto``: scheduled where that is legal for a region of a call, eager
elsewhere. The others are errors where they are not legal."""

AUTO_INDUCTOR = "auto-inductor"
"""``auto`` with compiled chunks: what ``torch.compile(backend="depthpass")`` runs, whose user has asked for a compiler."""


def check_rung(name: str) -> str:
    """Return ``name`` or raise SpecError."""
    if name not in RUNGS:
        raise SpecError(f"lowering: expected one of {', '.join(RUNGS)}, got {name!r}.{did_you_mean(str(name), RUNGS)}")
    return name


def rung(name: str | Callable[..., Run]) -> Callable[..., Run]:
    """What makes the runs of a rung; a maker itself stands for a rung of its own (:mod:`depthpass_lowering.recording`)."""
    if callable(name):
        return name
    if name == AUTO_INDUCTOR:
        from depthpass_lowering.compiled import AutoCompiledRun

        return AutoCompiledRun
    if check_rung(name) == "eager":
        return Run
    if name == "cudagraph":
        from depthpass_lowering.graphed import GraphedRun

        return GraphedRun
    if name == "inductor":
        from depthpass_lowering.compiled import CompiledRun

        return CompiledRun
    from depthpass_lowering.scheduled import ScheduledRun, StrictScheduledRun

    return StrictScheduledRun if name == "scheduled" else ScheduledRun
