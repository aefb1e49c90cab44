"""The ops of TurboConn's bridges: down-maps, delays, up-maps and where they land."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from depthpass.errors import PassError
from depthpass.ir.program import Op, Program, op
from depthpass.passes.streams import after_bridges, block_result, check_whole, insert_before, linear, stream_after
from depthpass.passes.turboconn_layout import feeds, resolve

if TYPE_CHECKING:
    from depthpass.passes.turboconn import TurboConn


def bridged(spec: TurboConn, program: Program) -> Program:
    """The program with the bridges of a spec.

    Raises:
        PassError: it does not have the positions, or has parameters of these names.
    """
    visits = program.visits
    bridges = resolve(spec, len(visits))
    _check_names(spec, program, bridges)
    check_whole(spec.name, program, sorted({p for bridge in bridges for p in bridge}))
    names = iter(program.fresh(5 * len(bridges)))
    rank, fed = spec.rank, feeds(spec, bridges)
    maps = dict.fromkeys(fed[b] for b in bridges)
    low = {b: next(names) for b in maps} if rank is not None else {}
    streams: dict[int | str, str] = {}
    for d in sorted({d for _, d in bridges}):
        arriving = [b for b in bridges if b[1] == d]
        ops: list[Op] = []
        for bridge in arriving:
            ops += _arrive(spec, program, bridge, low.get(fed[bridge]), streams, names)
        ups = [o.name for o in ops if o.kind == "linear"]
        program = _land(spec, program, visits[d], ops, ups, next(names))
    if rank is None:
        return program
    for s in sorted({s for s, _ in low}):
        # After every landing, so that h_s includes what arrives on block s.
        stream = stream_after(program, s)
        program = program.insert_after(stream, [
            linear(_parameter(spec, b, "down"), rank, stream, name=name, note=_note(spec, b), init=spec.init_std)
            for b, name in low.items() if b[0] == s
        ])
    return program


def _arrive(
    spec: TurboConn, program: Program, bridge: tuple[int, int], low: str | None, streams: dict[int | str, str],
    names: Iterator[str],
) -> list[Op]:
    """Ops that bring one bridge's value to its destination; the last one is the linear map to the width."""
    s, note = bridge[0], _note(spec, bridge)
    shared = note if low else f"{spec.label}: bridges from {bridge[0]}"
    source, key = low or stream_after(program, s), low or s
    value = streams.get(key)
    ops = []
    if value is None:
        ops.append(op("delay", source, name=(value := next(names)), note=shared, tokens=spec.group))
        if spec.multiplier != 1.0:
            ops.append(op("scale", value, name=(value := next(names)), note=shared, by=spec.multiplier))
        # Without Down all bridges of one source read one delayed stream: one delay line of the full width.
        streams[key] = value
    kind = "full" if low is None else "up"
    ops.append(linear(_parameter(spec, bridge, kind), program.width, value, name=next(names), note=note, init=0.0))
    return ops


def _land(spec: TurboConn, program: Program, visit: Op, ops: list[Op], ups: list[str], name: str) -> Program:
    """Add the arriving values on the block's output, or on its input."""
    if spec.write == "input":
        stream = program.defs[visit.name].args[0]
        ops = [*ops, op("add", stream, *ups, name=name, lands="input")]

        def landed(o: Op) -> Op:
            """The visit, and what its network reads where that is its input."""
            mine = o.name == visit.name or (o.kind == "point" and o.args[1] == visit.name)
            return replace(o, args=(name, *o.args[1:])) if mine else o

        return insert_before(program, visit.name, ops).map_ops(landed)
    stream = after_bridges(program, block_result(program, visit))
    ops = [*ops, op("add", stream, *ups, name=name)]
    return program.insert_after(stream, ops).replace_uses(stream, name)


def _check_names(spec: TurboConn, program: Program, bridges: tuple[tuple[int, int], ...]) -> None:
    taken = {o["name"] for o in program if o.kind == "linear"}
    for bridge in bridges:
        for kind in ("down", "up", "full"):
            if (name := _parameter(spec, bridge, kind)) in taken:
                raise PassError(f"turboconn.scope: the program already has a parameter {name!r}. Join both passes "
                                "in one, or set scope='another_name' on one of them.")


def _parameter(spec: TurboConn, bridge: tuple[int, int], kind: str) -> str:
    return f"{spec.scope}.s{bridge[0]}_d{bridge[1]}.{kind}"


def _note(spec: TurboConn, bridge: tuple[int, int]) -> str:
    return f"{spec.label}: bridge {bridge[0]} -> {bridge[1]}"
