"""Runs the passes of a spec over a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from depthpass.errors import PassError, SpecError
from depthpass.ir.program import Op, Program
from depthpass.ir.verify import verify
from depthpass.passes.base import Context, Pass

OnPass = Callable[[Pass, Program, Program], None]


def apply_spec(
    program: Program, spec: Pass | Sequence[Pass], ctx: Context, on_pass: OnPass | None = None
) -> Program:
    """Apply the passes of a spec in order; the program is verified before the first and after each.

    Args:
        program: the program to start from, usually :func:`depthpass.ir.plain`.
        spec: one pass or a sequence of passes; :func:`depthpass.spec.load_spec` reads every other form.
        ctx: facts of the stock model.
        on_pass: called as ``on_pass(pass, before, after)`` after each pass, for printing and timing.

    Returns:
        The rewritten program, renumbered, with the provenance of new ops in their notes.

    Raises:
        SpecError: the spec is not made of passes, or is empty.
        PassError: a pass cannot be applied, or broke the program.
        VerifyError: the program was not valid to begin with.
    """
    passes = as_passes(spec)
    if (ctx.blocks, ctx.width) != (program.blocks, program.width):
        raise PassError(
            f"context: expected {program.blocks} blocks of width {program.width} as in the program, "
            f"got {ctx.blocks} blocks of width {ctx.width}."
        )
    current = verify(program).renumbered()
    for p in passes:
        after = p.apply(current, ctx)
        try:
            verify(after)
        except ValueError as error:
            error.add_note(f"after the pass {p.label}; applied to:\n{current}")
            raise
        after = _with_provenance(current, after, p.label).renumbered()
        if on_pass is not None:
            on_pass(p, current, after)
        current = after
    return current


def as_passes(spec: Pass | Sequence[Pass]) -> tuple[Pass, ...]:
    """A spec as a non-empty tuple of passes."""
    passes = (spec,) if isinstance(spec, Pass) else tuple(spec) if isinstance(spec, list | tuple) else None
    if passes is None or any(not isinstance(p, Pass) for p in passes):
        raise SpecError(f"spec: expected a pass or a sequence of passes, got {spec!r}. Use load_spec for other forms.")
    if not passes:
        raise SpecError("spec: expected at least one pass, got an empty spec. Use Identity() to change nothing.")
    return passes


def _with_provenance(before: Program, after: Program, label: str) -> Program:
    """Note the pass on ops that are new, or that do something else than before; new arguments or slots do not count."""
    old = before.defs

    def meaning(o: Op) -> tuple[object, ...]:
        return (o.kind, *((k, v) for k, v in o.attrs if k not in ("slot", "keys", "past")))

    def note(o: Op) -> Op:
        was = old.get(o.name) if o.name else o if o in before.ops else None
        if was is None:
            return o if o.note or o.kind == "output" else replace(o, note=label)
        if meaning(was) == meaning(o):
            return o
        return replace(o, note=label if not was.note or was.note == label else f"{was.note}; {label}")

    return after.map_ops(note)
