"""What a program would give if its loop ended earlier, as taps."""

from __future__ import annotations

from dataclasses import replace

from depthpass.ir.program import Op, Program, op
from depthpass.limits import check_program
from depthpass.passes.streams import with_slots


def tapped(scope: str, program: Program, states: list[str], end: str) -> Program:
    """Tap what the program would give if it ended after each iteration: its tail is copied for all but the last."""
    at = program.index[end] + 1
    tail = [o for o in program.ops[at:-1] if o.kind != "tap"]
    new: list[Op] = []
    visits = len(program.visits) + len(states) * sum(o.kind == "block" for o in tail)
    check_program(visits, len(program.ops) + len(states) * len(tail), "loop.taps")
    names = iter(program.fresh(len(states) * len(tail)))
    slot = 1 + max(o["slot"] for o in program.visits)
    for t, state in enumerate(states, 1):
        copied = {end: state}
        value = program.output
        if state != end:
            for o in tail:
                copied[o.name] = next(names)
                copy = replace(o, name=copied[o.name], args=tuple(copied.get(a, a) for a in o.args), note="")
                if o.kind == "block":
                    copy, slot = copy.with_attrs(slot=slot), slot + 1
                new.append(copy)
            value = copied[value]
        new.append(op("tap", value, head=True).with_attrs(name=f"{scope}.t{t}"))
    return with_slots(replace(program, ops=(*program.ops[:-1], *new, program.ops[-1])))
