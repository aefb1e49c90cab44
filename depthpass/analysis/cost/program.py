"""Cost of a program on a model: FLOPs, bytes, parameters, steps; symbolic in rows, tokens and group, and in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import sympy as sp

from depthpass.analysis.cost.flops import CLASSES
from depthpass.analysis.cost.stock import ModelCost
from depthpass.analysis.cost.symbols import B, Convention, g, n
from depthpass.analysis.roofline import Ceilings, Floor, Work, floor
from depthpass.errors import InputError, SpecError, did_you_mean
from depthpass.ir.program import Program
from depthpass.prompt import at_prompt, in_notebooks
from depthpass.schedule import Schedule

Trainable = Literal["all", "new", "none"]
TRAINABLE: dict[str, str] = {
    "all": "every parameter trains",
    "new": "the stock parameters are frozen, new ones train",
    "none": "no backward pass",
}


@in_notebooks
@dataclass(frozen=True)
class Quantity:
    """One number of a cost table.

    Attributes:
        name, unit: e.g. ``FLOPs forward`` in ``FLOP``.
        expr: in the positive integer symbols B, n and g.
        note: what it counts.
    """

    name: str
    unit: str
    expr: sp.Expr
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table: a quantity at numbers, beside the stock model.

    Attributes:
        value, stock: numbers in ``unit``.
        ratio: value over stock; None when the stock model has none of it.
    """

    name: str
    unit: str
    value: float
    stock: float
    ratio: float | None
    note: str = ""


@at_prompt
@dataclass(frozen=True)
class RegionCost:
    """One region of the schedule.

    Attributes:
        index: in execution order.
        serial: whether it runs chunk by chunk.
        visits: block visits inside.
        chunk: tokens per step, or None = all tokens at once; ``g`` where it is the program's group.
        steps: how often it runs for one sequence.
        flops: forward, all steps together.
        weight_bytes_per_step: weights that one step reads.
    """

    index: int
    serial: bool
    visits: int
    chunk: sp.Expr | None
    steps: sp.Expr
    flops: sp.Expr
    weight_bytes_per_step: sp.Expr

    @property
    def intensity(self) -> sp.Expr:
        """Arithmetic intensity: forward FLOPs per byte of weights read, in FLOP/byte; 0 without weights."""
        moved = self.weight_bytes_per_step * self.steps
        return sp.Integer(0) if moved == 0 else self.flops / moved


@at_prompt
@dataclass(frozen=True)
class Cost:
    """Cost of a program.

    Attributes:
        program, model, schedule: what it is the cost of.
        attention: convention of attention FLOPs, a key of :data:`~depthpass.analysis.cost.symbols.CONVENTIONS`.
        trainable: a key of :data:`TRAINABLE`.
        flops, backward_flops, decode_flops: FLOPs by class, in B, n and g. Decode is one token per row after n - 1
            others, as expected over routes; a token that takes every route is among the quantities.
        quantities: every number in symbols.
        regions: see :class:`RegionCost`.
        work: the matrix multiplies as roofline work.
        notes: conventions, and what is not counted.
        stock: cost of the stock model's own program; None for that program itself.
    """

    program: Program
    model: ModelCost
    schedule: Schedule
    attention: Convention
    trainable: Trainable
    flops: Mapping[str, sp.Expr]
    backward_flops: Mapping[str, sp.Expr]
    decode_flops: Mapping[str, sp.Expr]
    quantities: tuple[Quantity, ...]
    regions: tuple[RegionCost, ...]
    work: tuple[Work, ...] = field(repr=False)
    notes: tuple[str, ...]
    stock: Cost | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> sp.Expr:
        """A quantity in symbols by name."""
        for q in self.quantities:
            if q.name == name:
                return q.expr
        names = [q.name for q in self.quantities]
        raise SpecError(f"cost: no quantity {name!r}.{did_you_mean(name, names)} Known: {', '.join(names)}.")

    @property
    def group(self) -> int | None:
        """Tokens per step of the serial region, which ``g`` stands for; None when nothing is serial."""
        return self.schedule.chunk

    def evaluate(self, expr: sp.Expr, tokens: int, batch: int = 1, group: int | None = None) -> float:
        """An expression at numbers; ``group`` instead of the program's own one.

        Raises:
            InputError: a size below 1, or a group for a program without a serial region.
        """
        for name, value in (("tokens", tokens), ("batch", batch), ("group", group)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name}: expected an integer of at least 1, got {value!r}.")
        if group is not None and self.group is None:
            raise InputError(f"group: expected none, got {group}: the program has no serial region.")
        value = sp.sympify(expr).subs({B: batch, n: tokens, g: group or self.group or tokens})
        return int(value) if value.is_Integer else float(value)

    def at(self, name: str, tokens: int, batch: int = 1, group: int | None = None) -> float:
        """A quantity in numbers by name, e.g. ``KV bytes``."""
        return self.evaluate(self[name], tokens, batch, group)

    def rows(self, tokens: int, batch: int = 1, group: int | None = None) -> list[Row]:
        """Every quantity in numbers, beside the stock model and as a ratio to it."""
        return [
            self._row(q.name, q.unit, q.expr, (self.stock or self)[q.name], tokens, batch, group, q.note)
            for q in self.quantities
        ]

    def flop_rows(self, tokens: int, batch: int = 1) -> list[Row]:
        """Forward FLOPs by class."""
        zero, stock = sp.Integer(0), (self.stock or self).flops
        return [
            self._row(c, "FLOP", self.flops.get(c, zero), stock.get(c, zero), tokens, batch, None, "")
            for c in CLASSES if c in self.flops or c in stock
        ]

    def _row(self, name, unit, expr, stock, tokens, batch, group, note) -> Row:
        value, plain = self.evaluate(expr, tokens, batch, group), (self.stock or self).evaluate(stock, tokens, batch)
        return Row(name, unit, value, plain, value / plain if plain else None, note)

    def region_rows(self, tokens: int, batch: int = 1, group: int | None = None) -> list[dict[str, object]]:
        """Regions in numbers, one mapping from column to value each."""
        def at(expr: sp.Expr | None) -> float | None:
            return None if expr is None else self.evaluate(expr, tokens, batch, group)

        return [
            {"region": r.index, "schedule": "serial" if r.serial else "parallel", "visits": r.visits,
             "chunk (token)": at(r.chunk), "steps (step)": at(r.steps), "FLOPs (FLOP)": at(r.flops),
             "weights per step (byte)": at(r.weight_bytes_per_step), "intensity (FLOP/byte)": at(r.intensity)}
            for r in self.regions
        ]

    def floor(self, machine: Ceilings, tokens: int, batch: int = 1, *, sink: bool = True) -> Floor:
        """Roofline seconds of a forward pass, a training step and a decoded token, in the dtype of the ceilings."""
        return floor(self.work, machine, tokens=tokens, batch=batch, sink=sink)
