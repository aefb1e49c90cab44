"""The three ops that a visit is below the pass level. Passes write ``block``, which lowering expands.

    %3:k = keys 0 (%2)  writes slot 0          keys and values of a stream's tokens, into a slot
    %3:a = attend 0 (%2)  reads slot 0         what a stream's queries see in one slot, or in two that a gate mixes
    %3 = finish 0 (%2, %3:a)                   output projection, residual, MLP

Slots are operands of the lowered op and no attributes, see :class:`depthpass.lowered.ops.LoweredOp`. Keys may come from another
stream than queries, and a visit without ``keys`` reads what another one has written. A route behind the stream of ``attend``
and ``finish`` says which of its tokens ask.
"""

from __future__ import annotations

from depthpass.ir.definitions import OpDef
from depthpass.ir.structural_ops import STRUCTURAL_OPS

_BLOCK = next(d for d in STRUCTURAL_OPS if d.kind == "block").attrs

GATE = ("gate", "window", "gate_input", "update")
"""What makes one of the two slots that ``attend`` reads."""

_ELSEWHERE = ("index", "slot", "keys", "past", "memory", "gate_init", "lora_rank", "untied", *GATE)
OPERANDS = tuple(key for key in _BLOCK if key not in _ELSEWHERE)
"""What changes a visit's weights or branches, on all of its parts: everything of a block but its slots, its gate and what only
says how new parameters begin."""


def _part(kind: str, args: tuple[int, int], gate: tuple[str, ...] = ()) -> OpDef:
    return OpDef(kind, "index", args, {key: _BLOCK[key] for key in ("index", *gate, *OPERANDS)}, token_local=kind != "attend")


PARTS: dict[str, OpDef] = {
    "keys": _part("keys", (1, 1)), "attend": _part("attend", (1, 2), GATE), "finish": _part("finish", (2, 3)),
}
"""The parts by kind, in the order in which they run. They stand in lowered programs alone."""
