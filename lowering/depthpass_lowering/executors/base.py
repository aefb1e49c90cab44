"""Executors: how the serial regions of a call are run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from depthpass.lowered.program import LoweredRegion
from depthpass.lowered.record import Lowered
from depthpass.schedule.regions import Region
from depthpass_lowering.executors.context import CallContext
from depthpass_lowering.state.slots import State

if TYPE_CHECKING:
    from depthpass_lowering.executors.eager import Run


class Executor:
    """A strategy over serial regions: this one runs them op by op under autograd, and is the oracle of all others.

    Executors hold no call: what they need of one comes with the run.

    Attributes:
        name: the level that is asked for with it.
    """

    name = "eager"

    def start(self, context: CallContext, state: State) -> Run:
        """The run of a call; it may change the state."""
        from depthpass_lowering.executors.eager import Run

        return Run(context, state, self)

    def level(self, run: Run, region: Region) -> tuple[str, str | None]:
        """The level that runs a region in this call, and why not a higher one (None = it is what was asked for).

        Raises:
            LoweringError: the region cannot be run as was asked for.
        """
        return "eager", None

    def region(self, run: Run, region: LoweredRegion) -> dict[str, Tensor]:
        """Run a serial region; the streams it hands out."""
        note(run, region, region.level, region.reason)
        return run.loop(region, run.streams(region), region.outputs, True)


EAGER = Executor()


def note(run: Run, region: LoweredRegion, level: str, reason: str | None = None, **more) -> None:
    """Keep how a region is run."""
    blocks = tuple(o["index"] for o in region.calls)
    run.record.append(Lowered(blocks, run.context.count, region.chunk or run.context.count, level, reason, **more))
