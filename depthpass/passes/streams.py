"""Questions and edits that several passes share: where a stream goes on, straight stacks, ops with parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from depthpass.errors import PassError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, op
from depthpass.ir.verify import infer
from depthpass.passes.builder import Builder, with_slots

__all__ = ["Builder", "after_bridges", "block_result", "check_scope", "check_whole", "insert_before", "linear", "modulation",
           "straight", "stream_after", "with_slots"]


def after_bridges(program: Program, name: str) -> str:
    """The stream after ``name`` and after every bridge that lands on it.

    A bridge landing is an ``add`` of the stream and of values that each come from one delay through maps of one
    argument; this is what TurboConn inserts, and it is recognised whichever pass inserted it. What lands on the input of
    the visit behind (``lands input``) is no part of the stream after ``name``.
    """
    while True:
        landings = [
            o for o in program.users(name)
            if o.kind == "add" and o["lands"] == "output" and o.args[0] == name
            and all(_comes_from_delay(program, a) for a in o.args[1:])
        ]
        if len(landings) != 1:
            return name
        name = landings[0].name


def block_result(program: Program, visit: Op) -> str:
    """What a visit's whole block makes: its own value, or where its network runs apart, that one's, normed if sums are."""
    if visit["part"] == "whole":
        return visit.name
    mine = {visit.name}
    for o in program.ops[program.index[visit.name] + 1 :]:
        # A delay belongs to an earlier token.
        if o.kind != "delay" and not mine.isdisjoint(o.args):
            mine.add(o.name)
            if o.kind == "ffn" and o["index"] == visit["index"]:
                normed = [u for u in program.users(o.name) if u.kind == "rms" and u["name"]]
                return normed[0].name if len(normed) == 1 else o.name
    raise PassError(f"expected the feed-forward network of %{visit.name} = block {visit['index']} after it, got none.")


def stream_after(program: Program, position: int) -> str:
    """The stream after the block at a position, and after every bridge that lands on it."""
    return after_bridges(program, block_result(program, program.visits[position]))


def _comes_from_delay(program: Program, name: str) -> bool:
    o = program.defs[name]
    while OPS[o.kind].meaning is not None and len(o.args) == 1:
        o = program.defs[o.args[0]]
    return o.kind == "delay"


def insert_before(program: Program, name: str, new: Iterable[Op]) -> Program:
    """Insert ops right before the one that defines ``name``."""
    at = program.index[name]
    return replace(program, ops=(*program.ops[:at], *new, *program.ops[at:]))


def straight(program: Program, who: str) -> tuple[Op, ...]:
    """The visits of a program that is one straight stack: each reads the one before, and nothing else does.

    Raises:
        PassError: naming the op that is in the way.
    """
    visits = program.visits
    if not visits:
        raise PassError(f"{who}: expected a program with visits, got one without a block.")
    for visit, after in zip(visits, (*visits[1:], None)):
        if visit["keys"] is not None or visit["past"] is not None:
            slot = visit["past"] if visit["keys"] is None else visit["keys"]
            raise PassError(f"{who}: expected visits with their own keys, got %{visit.name}, which reads slot "
                            f"{slot}. Put {who} before the pass that shares keys.")
        if len(visit.args) > 1 or visit["part"] != "whole":
            what = ("keys from a memory" if visit["memory"] else "queries of routed tokens only" if len(visit.args) > 1 else
                    "its attention alone")
            raise PassError(f"{who}: expected visits of one stream, got %{visit.name} = block {visit['index']} with {what}. "
                            f"Put {who} before the pass that adds it.")
        others = [o for o in program.users(visit.name) if o is not after] if after else []
        if after is not None and (after.args != (visit.name,) or others):
            other = others[0] if others else program.defs[after.args[0]]
            raise PassError(
                f"{who}: expected a straight stack of visits, got {'%' + other.name + ' = ' if other.name else ''}"
                f"{other.kind}{' of ' + other.note if other.note else ''} between them. "
                f"Put {who} before the passes that add something between visits."
            )
    return visits


def check_scope(who: str, scope: str, program: Program) -> None:
    """Refuse a scope that the program has parameters or taps under already.

    Raises:
        PassError: it has.
    """
    taken = {str(o[k]) for o in program for k in ("name", "lora", "modulate", "clock") if k in dict(o.attrs)}
    if any(name.startswith(f"{scope}.") for name in taken):
        raise PassError(f"{who}.scope: the program already has parameters or taps under {scope!r}. "
                        "Set scope='another_name' on one of the passes.")


def check_whole(who: str, program: Program, positions: Iterable[int]) -> None:
    """Refuse positions of visits that run routed tokens only: nothing can be read from or written to them at the others.

    Raises:
        PassError: naming the visit and the positions that are left.
    """
    types = infer(program)
    routed = [types[v.name].tokens is not None for v in program.visits]
    for position in positions:
        if routed[position]:
            visit = program.visits[position]
            left = [i for i, some in enumerate(routed) if not some]
            raise PassError(
                f"{who}: expected visits that every token takes, got position {position} (%{visit.name} = block "
                f"{visit['index']}), which runs routed tokens only{f' ({visit.note})' if visit.note else ''}. Use positions "
                f"among {left}, or put {who} before the pass that routes."
            )


def modulation(who: str, visit: Op, operands: dict[str, Any]) -> dict[str, Any]:
    """The operands for a copy of a visit, unless they would take the place of scales that the visit has already.

    Raises:
        PassError: they would.
    """
    if "modulate" in operands and visit["modulate"] is not None:
        raise PassError(f"{who}: %{visit.name} is already modulated by {visit['modulate']!r}, and a visit has one set of "
                        "scales. Give timestep or scales to one of the passes only.")
    return operands


def linear(
    parameter: str, out: int, *args: str, name: str, note: str = "", init: float = 0.02, bias: bool = True,
    identity: bool = False,
) -> Op:
    """A learned affine map whose parameters are called ``parameter``."""
    # `name` is both the value and an attribute of the op, so the attribute is set in a second step.
    built = op("linear", *args, name=name, note=note, out=out, init=init, bias=bias, identity=identity)
    return built.with_attrs(name=parameter)
