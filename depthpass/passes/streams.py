"""Questions and edits that several passes share: where a stream goes on, straight stacks, ops with parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

from depthpass.errors import PassError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, op, writes_slot
from depthpass.ir.verify import infer
from depthpass.limits import check_program


def after_bridges(program: Program, name: str) -> str:
    """The stream after ``name`` and after every bridge that lands on it.

    A bridge landing is an ``add`` of the stream and of values that each come from one delay through maps of one
    argument; this is what TurboConn inserts, and it is recognised whichever pass inserted it. What lands on the input of
    the visit behind (``lands input``) is no part of the stream after ``name``.
    """
    while True:
        landings = [
            o for o in program.users(name)
            if o.kind == "add" and o["lands"] == "output" and o.args[0] == name
            and all(_comes_from_delay(program, a) for a in o.args[1:])
        ]
        if len(landings) != 1:
            return name
        name = landings[0].name


def _comes_from_delay(program: Program, name: str) -> bool:
    o = program.defs[name]
    while OPS[o.kind].meaning is not None and len(o.args) == 1:
        o = program.defs[o.args[0]]
    return o.kind == "delay"


def insert_before(program: Program, name: str, new: Iterable[Op]) -> Program:
    """Insert ops right before the one that defines ``name``."""
    at = program.index[name]
    return replace(program, ops=(*program.ops[:at], *new, *program.ops[at:]))


def straight(program: Program, who: str) -> tuple[Op, ...]:
    """The visits of a program that is one straight stack: each reads the one before, and nothing else does.

    Raises:
        PassError: naming the op that is in the way.
    """
    visits = program.visits
    if not visits:
        raise PassError(f"{who}: expected a program with visits, got one without a block.")
    for here, after in zip(visits, (*visits[1:], None)):
        if here["keys"] is not None or here["past"] is not None:
            slot = here["past"] if here["keys"] is None else here["keys"]
            raise PassError(f"{who}: expected visits with their own keys, got %{here.name}, which reads slot "
                            f"{slot}. Put {who} before the pass that shares keys.")
        if len(here.args) > 1:
            what = "keys from a memory" if here["memory"] else "queries of routed tokens only"
            raise PassError(f"{who}: expected visits of one stream, got %{here.name} = block {here['index']} with {what}. "
                            f"Put {who} before the pass that adds it.")
        others = [o for o in program.users(here.name) if o is not after] if after else []
        if after is not None and (after.args != (here.name,) or others):
            other = others[0] if others else program.defs[after.args[0]]
            raise PassError(
                f"{who}: expected a straight stack of visits, got {'%' + other.name + ' = ' if other.name else ''}"
                f"{other.kind}{' of ' + other.note if other.note else ''} between them. "
                f"Put {who} before the passes that add something between visits."
            )
    return visits


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


def check_scope(who: str, scope: str, program: Program) -> None:
    """Refuse a scope that the program has parameters or taps under already.

    Raises:
        PassError: it has.
    """
    taken = {str(o[k]) for o in program for k in ("name", "lora", "modulate", "clock") if k in dict(o.attrs)}
    if any(name.startswith(f"{scope}.") for name in taken):
        raise PassError(f"{who}.scope: the program already has parameters or taps under {scope!r}. "
                        "Set scope='another_name' on one of the passes.")


def check_whole(who: str, program: Program, positions: Iterable[int]) -> None:
    """Refuse positions of visits that run routed tokens only: nothing can be read from or written to them at the others.

    Raises:
        PassError: naming the visit and the positions that are left.
    """
    types = infer(program)
    routed = [types[v.name].tokens is not None for v in program.visits]
    for position in positions:
        if routed[position]:
            visit = program.visits[position]
            left = [i for i, some in enumerate(routed) if not some]
            raise PassError(
                f"{who}: expected visits that every token takes, got position {position} (%{visit.name} = block "
                f"{visit['index']}), which runs routed tokens only{f' ({visit.note})' if visit.note else ''}. Use positions "
                f"among {left}, or put {who} before the pass that routes."
            )


def modulation(who: str, visit: Op, operands: dict[str, Any]) -> dict[str, Any]:
    """The operands for a copy of a visit, unless they would take the place of scales that the visit has already.

    Raises:
        PassError: they would.
    """
    if "modulate" in operands and visit["modulate"] is not None:
        raise PassError(f"{who}: %{visit.name} is already modulated by {visit['modulate']!r}, and a visit has one set of "
                        "scales. Give timestep or scales to one of the passes only.")
    return operands


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


def linear(
    parameter: str, out: int, *args: str, name: str, note: str = "", init: float = 0.02, bias: bool = True,
    identity: bool = False,
) -> Op:
    """A learned affine map whose parameters are called ``parameter``."""
    # `name` is both the value and an attribute of the op, so the attribute is set in a second step.
    built = op("linear", *args, name=name, note=note, out=out, init=init, bias=bias, identity=identity)
    return built.with_attrs(name=parameter)
