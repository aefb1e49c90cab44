"""The rules of lowered programs, checked from what is written on them."""

from __future__ import annotations

from itertools import groupby

from depthpass.errors import VerifyError
from depthpass.ir.definitions import CHUNK, SWEEP
from depthpass.ir.ops import OPS, unfit
from depthpass.lowered.ops import LoweredOp
from depthpass.lowered.program import Line, LoweredProgram, LoweredRegion

_VISITS = (("keys", "attend", "finish"), ("attend", "finish"), ("block",))
"""What a visit may consist of."""

_PLACES = {"scheduled": CHUNK, "inductor": CHUNK, "cudagraph": CHUNK, "sweeps": SWEEP}


def verify_lowered(program: LoweredProgram) -> LoweredProgram:
    """Check a lowered program and return it.

    Raises:
        VerifyError: a value or slot is read before it is there, a slot is written twice per token, a chunk reads its own
            future through a delay, a level is given an op that it cannot run; the text is attached as a note.
    """
    try:
        _Checker(program).check()
    except VerifyError as error:
        error.add_note(str(program))
        raise
    return program


class _Checker:
    """What is there so far, region by region.

    Attributes:
        values: values that later ops may read.
        slots: slots by the op that writes them.
        lines: delay lines by name.
    """

    def __init__(self, program: LoweredProgram):
        self.program = program
        self.values: set[str] = set()
        self.slots: dict[int, LoweredOp] = {}
        self.lines: set[str] = set()
        self.defined: set[str] = set()

    def check(self) -> None:
        outputs = [o for r in self.program for o in r.ops if o.kind == "output"]
        if len(outputs) != 1:
            raise VerifyError(f"expected exactly one output, got {len(outputs)}.")
        for number, region in enumerate(self.program):
            self._region(f"region {number}", region)

    def _region(self, where: str, region: LoweredRegion) -> None:
        if (region.chunk is not None) != (region.kind != "parallel") or (region.chunk or 1) < 1:
            raise VerifyError(f"{where}: expected a size of at least 1 for chunks and steps alone, got {region.chunk}.")
        for name in region.inputs:
            self._need(name in self.values, f"{where}: reads %{name} before an earlier region hands it out.")
        self._visits(where, region)
        place = _PLACES.get(region.level) if region.serial else None
        if place and (reason := unfit(region.program_ops, place)):
            raise VerifyError(f"{where}: expected ops that level {region.level!r} can run, got {reason}.")
        defined = set(region.inputs)
        sources = {line.name: line for line in region.lines}
        for o in region.ops:
            self._op(where, region, o, defined, sources)
        for line in region.lines:
            self._need(line.source in defined, f"{where}: line %{line.name} takes in %{line.source}, which is not there.")
            self._need(line.name not in self.lines, f"{where}: line %{line.name} is kept twice.")
            self.lines.add(line.name)
        for name in region.outputs:
            self._need(name in defined, f"{where}: hands out %{name}, which it does not have.")
        for name in region.last:
            self._need(name in region.inputs or name in region.outputs, f"{where}: lets go of %{name}, which it does not hold.")
        self.values = (self.values | set(region.outputs)) - set(region.last)

    def _op(self, where: str, region: LoweredRegion, o: LoweredOp, defined: set[str], lines: dict[str, Line]) -> None:
        at = f"{where}: {f'%{o.name} = ' if o.name else ''}{o.kind}"
        if o.line is not None:
            line = Line(o.line, o.op.args[0], OPS[o.op.kind].lag(o.op))
            self._need(lines.get(o.line) == line, f"{at}: reads line %{o.line}, which the region does not keep so.")
            if line.source not in defined:
                self._need(region.chunk is not None and region.chunk <= line.tokens,
                           f"{at}: reads {line.tokens} tokens back what {region.chunk or 'all'} tokens run together compute "
                           "later: a future read.")
        else:
            for a in o.op.args:
                self._need(a in defined, f"{at}: reads %{a} before it is there.")
        self._slots(at, region, o)
        if o.name:
            self._need(o.name not in self.defined, f"{at}: %{o.name} is defined twice.")
            self.defined.add(o.name)
            defined.add(o.name)

    def _visits(self, where: str, region: LoweredRegion) -> None:
        """The parts of a visit, or of the visits that are rows of one call, stand next to each other and belong together."""
        rows: set[int] = set()
        for row, group in groupby(region.ops, lambda o: o.visit if o.row is None else o.row):
            visits: dict[str, list[LoweredOp]] = {}
            for o in group:
                visits.setdefault(o.visit or "", []).append(o)
            if isinstance(row, int):
                self._need(row not in rows, f"{where}: the visits of row {row} do not stand next to each other.")
                rows.add(row)
            for name, parts in visits.items():
                if name:
                    self._visit(f"{where}: visit %{name}", parts)

    def _visit(self, at: str, parts: list[LoweredOp]) -> None:
        kinds = tuple(o.kind for o in parts)
        self._need(kinds in _VISITS, f"{at}: expected keys, attend and finish next to each other, or attend and finish, got "
                                     f"{', '.join(kinds)}.")
        if kinds == ("block",):
            return
        *keys, attend, finish = parts
        stream, *route = attend.op.args
        self._need(len({o.op["index"] for o in parts}) == 1, f"{at}: expected parts of one block.")
        self._need(finish.op.args == (stream, attend.name, *route), f"{at}: expected finish of %{stream} and %{attend.name}.")
        gated = attend.op["gate"] is not None or attend.op["update"]
        self._need(len(attend.reads) == 1 + gated, f"{at}: expected {1 + gated} slots to attend to, got {len(attend.reads)}.")
        own = {o.writes for o in keys}
        self._need(None not in own and own <= {attend.reads[-1]}, f"{at}: expected keys into the last slot that it attends to.")

    def _slots(self, at: str, region: LoweredRegion, o: LoweredOp) -> None:
        # Whole blocks that are rows of one call write their keys before any of them reads.
        together = {p.writes for p in region.ops if o.kind == "block" and o.row is not None and p.row == o.row}
        if o.writes is not None:
            self._need(o.writes not in self.slots, f"{at}: slot {o.writes} is written twice per token.")
            self.slots[o.writes] = o
        for slot in o.reads:
            self._need(slot in self.slots or slot in together, f"{at}: reads slot {slot} before it is written.")
            writer = self.slots.get(slot, o)
            self._need(writer.op["index"] == o.op["index"], f"{at}: reads slot {slot}, which holds keys of another block.")

    @staticmethod
    def _need(ok: bool, message: str) -> None:
        if not ok:
            raise VerifyError(message)
