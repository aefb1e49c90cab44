"""L1 on top of L3: the hand-scheduled token loop with its block segments compiled by Inductor."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from depthpass.capture.model import Template
from depthpass.errors import LoweringError
from depthpass.schedule.regions import Region
from depthpass_lowering.joint import Segment
from depthpass_lowering.scheduled import Job, ScheduledRun, SunkHost
from depthpass_lowering.segments import Segmented

_COMPILED: weakref.WeakKeyDictionary[Template, Segmented] = weakref.WeakKeyDictionary()


def compiled_template(template: Template) -> Segmented:
    """The template cut at its attention calls, each segment compiled on first use; one for all blocks that share it."""
    if template not in _COMPILED:
        _COMPILED[template] = Segmented(template.graph, Segment)
    return _COMPILED[template]


class CompiledRun(ScheduledRun):
    """As :class:`~depthpass_lowering.scheduled.ScheduledRun`, with compiled segments; what cannot is an error."""

    def sunk_host(self, job: Job, leaves: dict[int, Tensor]) -> SunkHost:
        return _CompiledHost(self.host, job, leaves, self.count)

    def refuse(self, region: Region) -> str | None:
        reason = super().refuse(region)
        device = self.hidden.device.type
        if reason is None and torch.is_autocast_enabled(device):
            reason = "autocast is on (the segments are compiled for the parameters' own dtype)"
        if reason is not None:
            raise LoweringError(
                f"lowering 'inductor' cannot run this call: {reason}. Use lowering='auto' to fall back to 'eager'."
            )
        return None


class _CompiledHost(SunkHost):
    """Runs blocks on their compiled segments."""

    def __init__(self, host, job: Job, leaves: dict[int, Tensor], count: int):
        super().__init__(host, job.sink, leaves)
        self.count, self.chunk = count, job.region.chunk

    def block(self, index: int, visit, hidden: Tensor, sides: Sequence[Tensor]) -> Tensor:
        # The last chunk of a row may be short: it is not worth a compilation of its own.
        if self.count > self.chunk != hidden.shape[1]:
            return super().block(index, visit, hidden, sides)
        template, params = self.bound_leaves(index)
        return compiled_template(template)(visit, hidden, *sides, *params, lead=(self.sink,))
