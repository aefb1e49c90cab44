"""L4: a serial region's whole forward loop of compiled chunks as one CUDA graph, and its backward loop as another.

Thousands of small kernels are launched once per call of the graph instead of one by one. A graph is recorded per set of
shapes, so rows are padded to a few lengths.

The tests put a stand-in where CUDA records and replays; `benchmarks/gpu.py` checks the real thing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from depthpass.schedule.regions import Region
from depthpass_lowering.compiled import CompiledRun
from depthpass_lowering.scheduled import Job, RegionFunction, region_parameters

MOST = 8
"""Graphs kept per region; each holds the memory of its own activations."""

_RECORDED: weakref.WeakKeyDictionary[Region, dict[tuple, Callable]] = weakref.WeakKeyDictionary()


class GraphedRun(CompiledRun):
    """As :class:`~depthpass_lowering.compiled.CompiledRun`, training passes replayed as CUDA graphs."""

    rung = "cudagraph"
    extra = 0
    """Columns of padding that the run has been given."""

    def refuse(self, region: Region) -> str | None:
        if reason := super().refuse(region):
            return reason
        device = self.hidden.device.type
        return None if device == "cuda" else f"the model is on {device}, and CUDA graphs need a CUDA device"

    def note(self, region: Region, rung: str, **more) -> None:
        if rung != self.rung or torch.is_grad_enabled():
            columns = bucket(self.count, region.chunk) - self.count if rung == self.rung else 0
            return super().note(region, rung, padded=columns, **more)
        return super().note(region, "inductor", reason="passes without gradients are not recorded", **more)

    def _trained(self, region: Region, inputs: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
        padded = self.padded_to(bucket(self.count, region.chunk))
        parameters = region_parameters(region, self.host)
        streams = {n: padded.pad(t, 1) for n, t in inputs.items()}
        given = [*streams.values(), *padded.sides, *parameters.values()]
        if padded.valid is not None:
            given.append(padded.valid)
        key = (
            tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in given), padded.valid is None,
            # A graph reads the storage of the parameters it was recorded with.
            tuple(p.data_ptr() for p in parameters.values()), self.recomputes(region),
        )
        kept = _RECORDED.setdefault(region, {})
        if key not in kept:
            if len(kept) >= MOST:
                kept.pop(next(iter(kept)))
            kept[key] = padded._record(region, list(streams), wanted, list(parameters), given)
        out = kept[key](*given)
        # The memory of a replay is written again by the next one.
        return {name: t[:, : self.count].clone() for name, t in zip(wanted, out)}

    def padded_to(self, columns: int) -> GraphedRun:
        """The run with so many new columns, the last of which belong to nobody: nothing that is real comes after them."""
        made = copy.copy(self)
        made.extra = columns - self.count
        if made.extra:
            made.count, made.hidden = columns, made.pad(self.hidden, 1)
            made.sides = tuple(s if axis is None else made.pad(s, axis) for s, axis in zip(self.sides, self.side_axes))
            made.valid = None if self.valid is None else made.pad(self.valid, 1)
        return made

    def pad(self, t: Tensor, axis: int) -> Tensor:
        """Zeros behind the last column."""
        if not self.extra:
            return t
        return torch.cat((t, t.new_zeros(*t.shape[:axis], self.extra, *t.shape[axis + 1 :])), axis)

    def _record(
        self, region: Region, names: list[str], wanted: list[str], ids: list[int], given: list[Tensor]
    ) -> Callable[..., tuple[Tensor, ...]]:
        sides = len(self.sides)
        run = self

        def region_of(*flat: Tensor) -> tuple[Tensor, ...]:
            streams = dict(zip(names, flat))
            rest = flat[len(names) :]
            tables, weights = rest[:sides], rest[sides : sides + len(ids)]
            inner = object.__new__(CompiledRun)
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


def bucket(tokens: int, chunk: int) -> int:
    """The length that rows are padded to: a multiple of the chunk, at most an eighth longer from 8 chunks on."""
    chunks = -(-tokens // chunk)
    step = max(1, 1 << max(0, chunks.bit_length() - 4))
    return -(-chunks // step) * step * chunk
