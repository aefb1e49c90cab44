"""What routes make of a program: whether it is causal, and how many visits a token takes."""

from __future__ import annotations

from dataclasses import replace

from depthpass.errors import VerifyError
from depthpass.ir.program import Op, Program
from depthpass.ir.verify import infer, verify


def reads_future(program: Program) -> str | None:
    """The first op of a program that needs later tokens of the row, or None: then decoding equals scoring."""
    return next((f"%{o.name} = route topk" for o in program if o.kind == "route" and o["rule"] == "topk"), None)


def unrouted_visits(program: Program) -> int:
    """Visits that every token takes."""
    types = infer(program)
    return sum(types[o.name].tokens is None for o in program.visits)


def without_routes(program: Program) -> Program | None:
    """The program as it is when no route takes a token; None when some visit reads keys that only routed tokens have."""
    gone: set[str] = set()
    replaced_by: dict[str, str] = {}
    ops: list[Op] = []

    def at(name: str) -> str:
        while name in replaced_by:
            name = replaced_by[name]
        return name

    for o in program.ops:
        if o.kind == "route":
            gone.add(o.name)
        elif o.kind == "scatter":
            replaced_by[o.name] = o.args[0]
        elif any(a in gone for a in o.args):
            gone |= {o.name} - {""}
        else:
            ops.append(o)
    try:
        return verify(replace(program, ops=tuple(replace(o, args=tuple(map(at, o.args))) for o in ops)))
    except VerifyError:
        return None
