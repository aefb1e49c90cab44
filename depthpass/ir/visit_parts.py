"""The three ops that a visit is below the pass level. Passes write ``block``, which lowering expands.

    %3:k = keys 0 (%2)  writes slot 0          keys and values of a stream's tokens, into a slot
    %3:a = attend 0 (%2)  reads slot 0         what a stream's queries see in one slot, or in two that a gate mixes
    %3 = finish 0 (%2, %3:a)                   output projection, residual, MLP

Slots are operands of the lowered op and no attributes, see :class:`depthpass.lowered.ops.LoweredOp`. Keys may come from another
stream than queries, and a visit without ``keys`` reads what another one has written. A route behind the stream of ``attend``
and ``finish`` says which of its tokens ask.
"""

from __future__ import annotations

from depthpass.ir.definitions import AttrDef, OpDef

OPERANDS: dict[str, AttrDef] = dict(
    lora=AttrDef(str), modulate=AttrDef(str), clock=AttrDef(str, needs="modulate"), step=AttrDef(int, 0, needs="clock"),
    base=AttrDef(float, 1.0, needs="modulate"),
)
"""What changes a visit's weights or branches, in all of its parts."""

_BLOCK = AttrDef(int, required=True, block=True)

KEYS = OpDef("keys", "index", (1, 1), dict(index=_BLOCK, **OPERANDS))
ATTEND = OpDef(
    "attend", "index", (1, 2),
    dict(index=_BLOCK, gate=AttrDef(str), window=AttrDef(int, needs="gate"), gate_input=AttrDef(str, "query", needs="gate"),
         **OPERANDS),
    token_local=False,
)
FINISH = OpDef("finish", "index", (2, 3), dict(index=_BLOCK, **OPERANDS))

PARTS: dict[str, OpDef] = {d.kind: d for d in (KEYS, ATTEND, FINISH)}
"""The parts by kind, in the order in which they run. They stand in lowered programs alone."""
