"""Which programs run on models; the rest can be reported only."""

from __future__ import annotations

from depthpass.errors import LoweringError
from depthpass.ir.program import Program


def unsupported_ops(program: Program) -> list[str]:
    """What of a program cannot run on a model, one line each; empty when all of it can.

    Pads stand in the row itself, so every stream has them from the embedding to what is handed out, or none has.
    """
    pads = [o for o in program if o.kind == "pad"]
    if not pads:
        return []
    misplaced = [f"%{o.name} = pad of another stream than embed" for o in pads if program.defs[o.args[0]].kind != "embed"]
    misplaced += [f"%{o.name} = a second pad" for o in pads if (o["tokens"], o["token"]) != (pads[0]["tokens"], pads[0]["token"])]
    misplaced += [
        f"{'%' + u.name + ' = ' if u.name else ''}{u.kind} of {o.kind}" for o in program if o.kind in ("embed", "trim")
        for u in program.users(o.name) if u.kind not in {"embed": ("pad",), "trim": ("tap", "output")}[o.kind]
    ]
    return misplaced


def check_program(program: Program) -> None:
    """Refuse a program that cannot run on a model.

    Raises:
        LoweringError: naming the ops.
    """
    if unsupported := unsupported_ops(program):
        raise LoweringError(
            f"this program can be reported but not run on a model yet: {'; '.join(unsupported[:3])}"
            f"{f' and {len(unsupported) - 3} more' if len(unsupported) > 3 else ''}. Leave out what adds it."
        )
