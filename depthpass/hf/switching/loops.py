"""Which pass of a spec counts iterations."""

from __future__ import annotations

from collections.abc import Sequence

from depthpass.errors import SpecError, did_you_mean
from depthpass.passes.base import Pass


def loop_of(passes: Sequence[Pass], scope: str | int | None, who: str, scoped: bool = True) -> int:
    """Place of the pass that counts iterations. ``who`` asks, and takes a scope or does not."""
    loops = [i for i, p in enumerate(passes) if p.loop_field is not None]
    spec = ", ".join(p.label for p in passes)
    if not loops:
        raise SpecError(f"{who}: expected a spec with a loop, got {spec}. Call dp.switch(model, spec) with one.")
    if scope is None:
        if len(loops) > 1:
            names = [repr(_names(passes[i])[0]) for i in loops]
            by_name = f"one of {', '.join(names)}, or " if len(set(names)) == len(names) else ""
            which = f" Say which with scope=, {by_name}its index in the spec, one of {', '.join(map(str, loops))}."
            raise SpecError(f"{who}: expected a spec with one loop, got {len(loops)} ({spec}).{which if scoped else ''}")
        return loops[0]
    if isinstance(scope, int) and not isinstance(scope, bool):
        if scope not in loops:
            raise SpecError(f"{who}.scope: expected the place of a loop in the spec, one of {loops}, got {scope}.")
        return scope
    named = [i for i in loops if scope in _names(passes[i])]
    if len(named) != 1:
        known = sorted({n for i in loops for n in _names(passes[i])})
        if named:
            raise SpecError(f"{who}.scope: {scope!r} fits {len(named)} passes; give the place in the spec, one of {named}.")
        raise SpecError(f"{who}.scope: expected one of {', '.join(known)}, got {scope!r}.{did_you_mean(str(scope), known)}")
    return named[0]


def _names(p: Pass) -> tuple[str, ...]:
    return tuple(dict.fromkeys((str(getattr(p, "scope", p.name)), p.name)))
