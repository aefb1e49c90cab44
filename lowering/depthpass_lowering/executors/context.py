"""What an executor gets, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from depthpass.ir.definitions import Type
from depthpass.ir.program import Op, Program
from depthpass.lowered.program import LoweredProgram
from depthpass.lowered.record import Lowered
from depthpass.schedule.regions import Schedule
from depthpass_lowering.host import Host
from depthpass_lowering.state.slots import State


@dataclass(frozen=True, eq=False)
class CallContext:
    """One call: everything an executor reads and nothing it changes.

    Attributes:
        schedule: of the program.
        host: the modules it runs on.
        hidden: the embedded new tokens, ``[batch, m, width]``.
        side_inputs: the prologue's per-token tables for the new tokens.
        side_axes: their token axes; None = none.
        valid: validity of all columns, old and new, ``[batch, start + m]``; None = no padding anywhere.
        keep: whether the state is needed afterwards (a cache, not just a forward pass).
        types: of the program's values.
        start: columns before the new ones.
        whole_slots: whether gated visits keep all their keys for now, because it is open where the kept part ends.
        padded: columns of nobody among the new ones.
    """

    schedule: Schedule
    host: Host
    hidden: Tensor
    side_inputs: tuple[Tensor, ...]
    side_axes: tuple[int | None, ...]
    valid: Tensor | None
    keep: bool
    types: Mapping[str, Type]
    start: int = 0
    whole_slots: bool = False
    padded: int = 0

    @property
    def program(self) -> Program:
        return self.schedule.program

    @property
    def count(self) -> int:
        """New columns."""
        return self.hidden.shape[1]

    @property
    def batch(self) -> int:
        return self.hidden.shape[0]

    @cached_property
    def read(self) -> frozenset[int]:
        """Slots that other visits than their own read."""
        return frozenset(o["keys"] for o in self.program.visits if o["keys"] is not None)

    @cached_property
    def passing(self) -> tuple[Op, ...]:
        """Visits whose own keys do not outlive the call."""
        return tuple(o for o in self.program.visits if o["past"] is not None)

    @cached_property
    def looped(self) -> frozenset[str]:
        """Visits in token loops, where there are any that do not keep their keys."""
        return frozenset(o.name for r in self.schedule.serial_regions for o in r.visits) if self.passing else frozenset()

    def narrowed(self, at: int, count: int) -> dict[str, Any]:
        """Fields of the context of some of the new columns: tokens and tables."""
        return {
            "hidden": self.hidden.narrow(1, at, count), "start": self.start + at,
            "side_inputs": tuple(
                s if axis is None else s.narrow(axis, at, count) for s, axis in zip(self.side_inputs, self.side_axes)
            ),
        }

    def valid_until(self, end: int) -> Tensor | None:
        """Validity of the columns before ``end``."""
        return None if self.valid is None else self.valid[:, :end]


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run returns.

    Attributes:
        streams: of ``output`` and of every tap, by name.
        state: the new state; the one that the run was given is unchanged.
        record: how each serial region was run.
        lowered: the program that ran.
    """

    streams: dict[str, Tensor]
    state: State
    record: Sequence[Lowered]
    lowered: LoweredProgram

