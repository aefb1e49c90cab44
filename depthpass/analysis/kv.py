"""Bytes of keys and values per token, by how a cache keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from depthpass.ir.program import Program, reads_slots, writes_slot

BITS = (4, 2)
"""Bits that residuals can be kept in."""
GROUP = 32
"""Numbers of a residual that share a scale and a least value, at most."""


def later_slots(program: Program) -> dict[int, int]:
    """Slots of visits that run a block again, with the slot of its first visit: their keys resemble those.

    Slots that only some tokens write, that hand keys on to calls of other visits, or that a gate cuts to a window are left out.
    """
    first: dict[int, int] = {}
    later: dict[int, int] = {}
    routed = any(o.kind == "route" for o in program)
    handed = {o["past"] for o in program.visits}
    for o in program.visits:
        slot = writes_slot(o)
        if slot is None or o["past"] is not None or slot in handed or o["gate"] is not None or routed:
            continue
        if o["index"] in first and slot not in first.values():
            later[slot] = first[o["index"]]
        first.setdefault(o["index"], slot)
    return later


def residual_bytes(width: int, bits: int, itemsize: int) -> int:
    """Bytes of a residual of so many numbers per head: packed, with a scale and a least value for each group."""
    group = group_of(width)
    return width * bits // 8 + width // group * 2 * itemsize


def group_of(width: int) -> int:
    """Numbers that share a scale: the largest divisor up to :data:`GROUP` that packs into whole bytes, else all."""
    return next((g for g in range(min(GROUP, width), 3, -1) if width % g == 0 and g % 4 == 0), width)


def bytes_per_token(program: Program, heads: Sequence[Sequence[int]], itemsize: int, bits: int | None = None) -> int:
    """Bytes that one more token of a row takes in all slots; where routes choose it, one that takes every visit.

    Slots that a gate cuts to its window have their size and are left out.

    Args:
        heads: by block, the width of every head's keys and values that are kept, one entry for each.
        bits: of the residuals of later visits; None = as they are.
    """
    later: Mapping[int, int] = later_slots(program) if bits is not None else {}
    writers = {writes_slot(o): o for o in program.visits}
    read = {s for o in program.visits for s in reads_slots(o)}
    total = 0
    for slot in program.slots:
        if slot not in read or writers[slot]["gate"] is not None:
            continue
        for width in heads[writers[slot]["index"]]:
            total += residual_bytes(width, bits or 0, itemsize) if slot in later else width * itemsize
    return total
