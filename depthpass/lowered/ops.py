"""Lowered ops: ops of a program with every access to state written out, and visits as three of them.

Passes write ``block``; :func:`expanded` gives its ``keys``, ``attend`` and ``finish``, and :func:`items_of` what executors
run. The two are the only places that know both forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from depthpass.ir.ops import OPS, PARTS
from depthpass.ir.program import Op, op, reads_slots, writes_slot
from depthpass.ir.structural_ops import asks, keys_from
from depthpass.ir.visit_parts import GATE, OPERANDS
from depthpass.schedule.stacking import Stack

KEYS_OF, ATTENTION_OF = ":k", ":a"
"""What stands behind a visit's name in the names of its parts; no value of a program may be called so."""


@dataclass(frozen=True)
class BlockFacts:
    """What lowering has to know of a captured block.

    Attributes:
        side_inputs: side inputs that each part reads, by the part's kind.
        uncut: why it can only run as a whole, or None.
    """

    side_inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    uncut: str | None = None

    @property
    def all_side_inputs(self) -> tuple[int, ...]:
        return tuple(sorted({s for part in self.side_inputs.values() for s in part}))


UNKNOWN = BlockFacts()
"""A block of which no capture was given: it is taken to be one that can be cut."""


@dataclass(frozen=True)
class LoweredOp:
    """One op of a region.

    Attributes:
        op: what it computes: an op of programs, or a part of a visit (:mod:`depthpass.ir.visit_parts`).
        reads: slots it attends to; of two the second is its own: within the op's window, or in place of the first's entries.
        writes: the slot it puts the keys and values of its tokens into.
        past: the slot whose entries of earlier calls it starts from.
        line: the delay line it reads.
        side_inputs: side inputs of its block; empty where no capture was given.
        row: visits of one number are rows of one call; None = a call of its own.
        uncut: of a ``block``: why it is not three ops.
    """

    op: Op
    reads: tuple[int, ...] = ()
    writes: int | None = None
    past: int | None = None
    line: str | None = None
    side_inputs: tuple[int, ...] = ()
    row: int | None = None
    uncut: str | None = None

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def kind(self) -> str:
        return self.op.kind

    @property
    def visit(self) -> str | None:
        """Name of the visit that it is a part of, or the whole."""
        return self.name.partition(":")[0] if self.kind in PARTS or self.kind == "block" else None


def expanded(o: Op, facts: BlockFacts = UNKNOWN, row: int | None = None) -> tuple[LoweredOp, ...]:
    """An op of a program as lowered ops: a visit as its parts, where its block can be cut, any other op as itself."""
    if o.kind != "block":
        return (LoweredOp(o, line=o.name if OPS[o.kind].forward_refs else None),)
    if facts.uncut is not None:
        return (LoweredOp(o, reads_slots(o), writes_slot(o), o["past"], None, facts.all_side_inputs, row, facts.uncut),)
    operands = {key: o[key] for key in OPERANDS} | {"index": o["index"]}
    route = o.args[1:] if asks(o) else ()
    attended = f"{o.name}{ATTENTION_OF}"
    attend = op("attend", o.args[0], *route, name=attended, note=o.note, **operands, **{key: o[key] for key in GATE})
    finish = op("finish", o.args[0], attended, *route, name=o.name, note=o.note, **operands)
    rest = (
        LoweredOp(attend, reads_slots(o), side_inputs=facts.side_inputs.get("attend", ()), row=row),
        LoweredOp(finish, side_inputs=facts.side_inputs.get("finish", ()), row=row),
    )
    if writes_slot(o) is None:
        return rest
    keys = op("keys", keys_from(o), name=f"{o.name}{KEYS_OF}", note=o.note, **operands)
    return LoweredOp(keys, (), writes_slot(o), o["past"], None, facts.side_inputs.get("keys", ()), row), *rest


def items_of(ops: Sequence[LoweredOp]) -> tuple[Op | Stack, ...]:
    """What executors run one after another: the peephole of lowered programs.

    The parts of a visit stand next to each other, and those of the visits that are rows of one call. They are one call of the
    block, so that hooks and wrappers around a stock module see it once. Which of the block's graphs run in it is decided by
    :func:`of_one_stream`.
    """
    items: list[Op | Stack] = []
    parts: dict[str, list[LoweredOp]] = {}
    rows: dict[int, list[Op]] = {}
    for o in ops:
        if o.visit is None:
            items.append(o.op)
            continue
        parts.setdefault(o.visit, []).append(o)
        if o.name != o.visit:  # its last part has its name
            continue
        visit = joined(parts[o.visit])
        if o.row is None:
            items.append(visit)
            continue
        members = rows.setdefault(o.row, [])
        members.append(visit)
        if len(members) == sum(p.row == o.row and p.name == p.visit for p in ops):
            items.append(Stack(tuple(members)))
    return tuple(items)


def joined(parts: Sequence[LoweredOp]) -> Op:
    """The ``block`` that the parts of one visit make up, without what only says how its parameters begin."""
    if parts[-1].kind == "block":
        return parts[-1].op
    by_kind = {o.kind: o for o in parts}
    keys, attend, finish = by_kind.get("keys"), by_kind["attend"], by_kind["finish"]
    far = attend.reads[0]
    own = far if keys is None or keys.writes is None else keys.writes
    stream, *route = attend.op.args
    memory = keys is not None and keys.op.args[0] != stream
    source = keys.op.args if keys is not None and memory else ()
    shared = {"keys": far} if keys is None or own != far else {}
    gate = {key: attend.op[key] for key in GATE}
    return op(
        "block", stream, *route, *source, name=finish.name, note=finish.op.note, slot=own, **shared, **gate,
        past=None if keys is None else keys.past, memory=memory, **{key: finish.op[key] for key in ("index", *OPERANDS)},
    )


def of_one_stream(visit: Op) -> bool:
    """Whether a visit's keys and queries are of the same tokens of one stream.

    Then its block's captured graph runs whole, as the stock model runs it and to the same bits. Every other visit runs the
    graphs that are cut from it: keys of one stream, attention and the rest of another, or no keys at all.
    """
    return writes_slot(visit) is not None and len(visit.args) == 1
