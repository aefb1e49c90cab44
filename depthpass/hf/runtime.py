"""What a transformed model knows besides its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from depthpass.capture import Capture
from depthpass.hf.modules.watch import Watch
from depthpass.hf.plans import Plans
from depthpass.ir.program import Program
from depthpass.lowered.record import LoweredCall
from depthpass.plan import Plan
from depthpass.schedule.fixed_point import FixedPoint, Measure

PREFIX = "depth"
"""Name under which a transformed model holds its new parameters."""


@dataclass
class Runtime:
    """What a transformed model knows besides its parameters; shared by nothing.

    Attributes:
        plans: what may run, and which plan does.
        layers: path of the list of blocks.
        decoder: path of the inner decoder, which runs the program; empty where the model has no head.
        lowering: level that runs serial regions.
        fixed_point: how serial regions are swept; None = the sequential schedule.
        captures: one per call signature, made on first use.
        bindings: the live tensors that each part and block of a capture reads, by its id.
        watches: what the captures depend on, as it was at the last calls, newest last.
        tokens: compiled steps of one decoded token, by what they were compiled for.
        ready: what the last compiled step asked of the model, while its watch stays the same.
        ran: the programs of the last call with their rows and columns, for ledgers; never read to decide what runs.
        lowered: the lowered programs of the last call and how each serial region was run, likewise.
        said_compiled, said_parts: whether a user of torch.compile was told that it does nothing, and one of hooks that they
            see parts of rows.
        drafted: what the last generation with a draft did.
        ratios: shares of tokens by route label that replace those of the program, see :func:`depthpass.set_ratios`.
    """

    plans: Plans
    layers: str
    decoder: str
    position_table: str | None
    lowering: str = "auto"
    fixed_point: FixedPoint | Measure | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    captures: dict[tuple, Capture] = field(default_factory=dict)
    bindings: dict[int, list[Callable[[], Tensor]]] = field(default_factory=dict)
    watches: list[Watch] = field(default_factory=list)
    tokens: dict[tuple, Any] = field(default_factory=dict)
    ready: Any = None
    ran: tuple[tuple[Program, int, int], ...] = ()
    drafted: object = None
    lowered: LoweredCall = field(default_factory=LoweredCall)
    said_compiled: bool = False
    said_parts: bool = False

    @property
    def plan(self) -> Plan:
        """The plan in force in this thread."""
        return self.plans.current

    @property
    def program(self) -> Program:
        return self.plan.program

    def config(self) -> dict:
        """The entry of the model's config that loads what is in force here again."""
        swept = {"schedule": self.fixed_point.to_dict()} if isinstance(self.fixed_point, FixedPoint) else {}
        return self.plan.config() | swept

    def __deepcopy__(self, memo):
        # Captures hold graphs only, but they belong to the module tree they were made from: a copy makes its own.
        build, arguments = self.__reduce__()
        return build(*arguments)

    def __reduce__(self):
        return _runtime, (
            self.plans.home, self.plans.default, self.layers, self.decoder, self.position_table, self.lowering, self.fixed_point,
            dict(self.ratios),
        )


def _runtime(home: Plan, default: Plan, *rest) -> Runtime:
    """A runtime with plans of its own: what is in force for one model says nothing about its copies."""
    runtime = Runtime(Plans(home), *rest)
    runtime.plans.default = runtime.plans.kept[default.key] = default
    return runtime
