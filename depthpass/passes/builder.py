"""Collects the ops that replace a stack of visits, with fresh names and slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

from depthpass.ir.program import Op, Program, op, writes_slot
from depthpass.limits import check_program


class Builder:
    """Collects the ops that replace a stack of visits, with fresh names and slots.

    The first copy of a visit keeps its name and its place in provenance; further copies are new ops.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ops: list[Op] = []
        self._names = map(str, count(int(program.fresh()[0])))
        self._slots = count(1 + max((o["slot"] for o in program.visits), default=-1))
        self._kept: set[str] = set()
        self._normed: dict[str, str] = {}
        self._visits = 0
        self._places: dict[str, int] = {}

    @property
    def pads(self) -> int:
        """Pad tokens of the program's rows, which a state that starts anew has, too."""
        return next((o["tokens"] for o in self.program if o.kind == "pad"), 0)

    def _append(self, built: Op) -> None:
        self._visits += built.kind == "block"
        check_program(self._visits, len(self.ops) + 1, "spec")
        self._places[built.name] = len(self.ops)
        self.ops.append(built)

    def emit(self, kind: str, *args: str, parameter: str = "", **attrs: Any) -> str:
        """Append an op and return the name of its value; ``parameter`` is the op's own attribute ``name``."""
        built = op(kind, *args, name=next(self._names), **attrs)
        self._append(built.with_attrs(name=parameter) if parameter else built)
        return built.name

    def norm(self, x: str) -> str:
        """The stock final norm of a value, appended once."""
        if x not in self._normed:
            self._normed[x] = self.emit("norm", x)
        return self._normed[x]

    def tap(self, name: str, value: str, *, head: bool) -> None:
        self._append(op("tap", value, head=head).with_attrs(name=name))

    def loss(self, rule: str, name: str, coefficient: float, *args: str) -> None:
        """Append a training loss, unless its coefficient is 0."""
        if coefficient:
            self._append(op("loss", *args, rule=rule, coefficient=coefficient).with_attrs(name=name))

    def visit(self, like: Op, x: str, *, asks: str = "", **attrs: Any) -> str:
        """Append a copy of a visit that reads ``x``, with a slot of its own.

        Args:
            asks: the route whose tokens alone ask for a result; empty = every token of ``x``.
        """
        copy = replace(like, args=(x, asks) if asks else (x,)).with_attrs(**attrs)
        if like.name in self._kept:
            copy = replace(copy, name=next(self._names), note="").with_attrs(slot=next(self._slots))
        self._kept.add(like.name)
        self._append(copy)
        return copy.name

    def set(self, value: str, **attrs: Any) -> None:
        """Set attributes of an op appended before."""
        self.ops[self._places[value]] = self.ops[self._places[value]].with_attrs(**attrs)

    def slot_of(self, value: str) -> int:
        """Slot of a visit appended before."""
        return self.ops[self._places[value]]["slot"]

    def splice(self, visits: tuple[Op, ...], end: str) -> Program:
        """The program with ``visits`` (a straight stack) replaced by the collected ops, which end in ``end``."""
        program, gone = self.program, {v.name for v in visits}
        last = program.index[visits[-1].name]

        def rewired(ops: Iterable[Op]) -> list[Op]:
            return [replace(o, args=tuple(end if a == visits[-1].name else a for a in o.args)) for o in ops if o.name not in gone]

        # Whatever stands between the visits (nothing, usually) reads none of them, so it may come first; delays before the stack
        # read what it ends in.
        before, after = rewired(program.ops[:last]), rewired(program.ops[last + 1 :])
        return with_slots(replace(program, ops=(*before, *self.ops, *after)))


def with_slots(program: Program) -> Program:
    """Number the slots 0, 1, ... in the order of the visits that write them.

    A visit that only reads another visit's keys carries the number of the slot it reads.
    """
    new: dict[int, int] = {}
    for v in program.visits:
        if (slot := writes_slot(v)) is not None:
            new[slot] = len(new)

    def number(o: Op) -> Op:
        if o.kind != "block":
            return o
        keys, past = (None if o[k] is None else new[o[k]] for k in ("keys", "past"))
        return o.with_attrs(slot=keys if writes_slot(o) is None else new[o["slot"]], keys=keys, past=past)

    return program.map_ops(number)
