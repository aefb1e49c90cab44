"""L4: a serial region's whole forward loop as one CUDA graph, and its backward loop as another.

Thousands of small kernels are launched once per call of the graph instead of one by one. A graph is recorded per set of
shapes: pad rows to a few lengths (multiples of the group), or every new length records anew.

**Not yet run on a GPU**: the tests put a stand-in where CUDA records and replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.schedule.regions import Region
from depthpass_lowering.scheduled import Job, RegionFunction, ScheduledRun, region_parameters

MOST = 8
"""Graphs kept per region; each holds the memory of its own activations."""

_RECORDED: weakref.WeakKeyDictionary[Region, dict[tuple, Callable]] = weakref.WeakKeyDictionary()


class GraphedRun(ScheduledRun):
    """As :class:`~depthpass_lowering.scheduled.ScheduledRun`, training passes replayed as CUDA graphs."""

    def refuse(self, region: Region) -> str | None:
        reason = super().refuse(region)
        if reason is None and self.hidden.device.type != "cuda":
            reason = f"the model is on {self.hidden.device.type}, and CUDA graphs need a CUDA device"
        if reason is not None:
            raise LoweringError(f"lowering 'cudagraph' cannot run this call: {reason}. Use lowering='auto'.")
        return None

    def _trained(self, region: Region, inputs: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
        parameters = region_parameters(region, self.host)
        given = [*inputs.values(), *self.sides, *parameters.values()]
        if self.valid is not None:
            given.append(self.valid)
        key = (
            tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in given), self.valid is None,
            # A graph reads the storage of the parameters it was recorded with.
            tuple(p.data_ptr() for p in parameters.values()), torch.is_autocast_enabled(self.hidden.device.type),
        )
        kept = _RECORDED.setdefault(region, {})
        if key not in kept:
            if len(kept) >= MOST:
                kept.pop(next(iter(kept)))
            kept[key] = self._record(region, list(inputs), wanted, list(parameters), given)
        out = kept[key](*given)
        # The memory of a replay is written again by the next one.
        return dict(zip(wanted, (t.clone() for t in out)))

    def _record(
        self, region: Region, names: list[str], wanted: list[str], ids: list[int], given: list[Tensor]
    ) -> Callable[..., tuple[Tensor, ...]]:
        sides = len(self.sides)
        run = self

        def region_of(*flat: Tensor) -> tuple[Tensor, ...]:
            streams = dict(zip(names, flat))
            rest = flat[len(names) :]
            tables, weights = rest[:sides], rest[sides : sides + len(ids)]
            inner = object.__new__(ScheduledRun)
            inner.__dict__ |= run.__dict__
            inner.state, inner.sides = replace(run.state, slots={}, lines={}), tables
            inner.valid = None if run.valid is None else flat[-1]
            job = Job(inner, region, streams, wanted, dict(zip(ids, weights)))
            return RegionFunction.apply(job, len(weights), *weights, *streams.values())

        samples = tuple(
            t if i >= len(names) + sides and t.requires_grad else t.detach().clone().requires_grad_(t.requires_grad)
            for i, t in enumerate(given)
        )
        return torch.cuda.make_graphed_callables(region_of, samples, allow_unused_input=True)
