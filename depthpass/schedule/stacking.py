"""Visit stacking: visits of one block that an incremental step may run as rows of one call.

In a step of m new tokens a delay of at least m tokens reads what earlier steps left, so it orders nothing. Visits of one
physical block without a path between them then only differ in their rows, and a call with all their rows reads the
block's weights once. A visit that reads another one's keys may stand in the same call, behind it: the call writes the
keys before it reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from depthpass.ir.program import Op, Program, writes_slot
from depthpass.ir.verify import infer

MAX_TOKENS = 8
"""Largest step that is stacked. Up to about 8 rows a matrix product costs what its weights cost to read; beyond, rows
are paid for one by one and a larger call saves nothing."""


@dataclass(frozen=True)
class Stack:
    """Visits of one block that run as one call, the writer of a slot before its readers."""

    visits: tuple[Op, ...]

    @property
    def index(self) -> int:
        """The physical block."""
        return self.visits[0]["index"]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.visits)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        return tuple(o.args[0] for o in self.visits)

    @cached_property
    def writers(self) -> dict[int, int]:
        """Slots written in the call, with the place of their writer."""
        return {slot: i for i, o in enumerate(self.visits) if (slot := writes_slot(o)) is not None}

    @cached_property
    def readers(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Slots read in full, with the places of their readers."""
        readers: dict[int, tuple[int, ...]] = {}
        for i, o in enumerate(self.visits):
            slot = o["slot"] if o["keys"] is None else o["keys"]
            readers[slot] = (*readers.get(slot, ()), i)
        return tuple(readers.items())

    @cached_property
    def gated(self) -> tuple[tuple[int, ...], ...]:
        """Places of the visits that also read a window of their own keys, those with one gate together."""
        gated: dict[str, tuple[int, ...]] = {}
        for i, o in enumerate(self.visits):
            if o["gate"] is not None:
                gated[o["gate"]] = (*gated.get(o["gate"], ()), i)
        return tuple(gated.values())


@dataclass(frozen=True)
class StepOrder:
    """How a step of at most ``tokens`` new tokens runs.

    Attributes:
        tokens: largest number of new tokens the order is legal for.
        items: ops and stacks in execution order.
    """

    tokens: int
    items: tuple[Op | Stack, ...]

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The sets of visits that run as one call."""
        return tuple(item for item in self.items if isinstance(item, Stack))

    @property
    def calls(self) -> int:
        """Block calls of the step, one after another."""
        return sum(isinstance(item, Stack) or item.kind in ("block", "ffn") for item in self.items)


def steps(program: Program) -> tuple[StepOrder, ...]:
    """The steps of a program in which something is stacked, smallest first; empty when there is nothing to stack.

    Args:
        program: a verified program.
    """
    if any(o.kind in ("pad", "trim") for o in program.ops):
        return ()
    blocks = [o["index"] for o in program.ops if o.kind == "block"]
    if len(set(blocks)) == len(blocks):  # only visits of one block share a call
        return ()
    delays = {min(o["tokens"], MAX_TOKENS) for o in program.ops if o.kind == "delay"}
    planned = [step for m in sorted(delays | {MAX_TOKENS}) if (step := _Planner(program, m).step()) and step.stacks]
    # Where a larger step allows the same sets, one order serves both.
    return tuple(
        s for i, s in enumerate(planned) if i + 1 == len(planned) or _names(s) != _names(planned[i + 1])
    )


def _names(step: StepOrder) -> set[frozenset[str]]:
    return {frozenset(stack.names) for stack in step.stacks}


class _Planner:
    """List scheduling of one step: of the visits that are ready, run the block that no later visit could still join."""

    def __init__(self, program: Program, tokens: int):
        self.ops, self.tokens = program.ops, tokens
        types, index = infer(program), program.index
        writers = {writes_slot(o): index[o.name] for o in program.visits}
        self.before: list[set[int]] = []
        self.keys: dict[int, int] = {}
        self.group: dict[int, object] = {}
        for i, o in enumerate(self.ops):
            ignored = o.kind == "delay" and o["tokens"] >= tokens
            self.before.append(set() if ignored else {index[a] for a in o.args})
            if o.kind == "ffn":
                self.group[i] = i
            if o.kind == "block":
                if o["keys"] is not None:
                    self.keys[i] = writers[o["keys"]]
                # Routed tokens, and streams that keys come from, differ from visit to visit.
                routed = types[o.name].tokens is not None or o["memory"]
                self.group[i] = i if routed else (
                    o["index"], *(o[key] for key in ("lora", "modulate", "clock", "step", "base", "part"))
                )

    def step(self) -> StepOrder | None:
        """The order, or None when the step cannot run in one piece: some cycle has a delay below its tokens."""
        done: set[int] = set()
        items: list[Op | Stack] = []
        while len(done) < len(self.ops):
            ready = [i for i in range(len(self.ops)) if i not in done and self.before[i] <= done]
            simple = [i for i in ready if i not in self.group]
            if simple:
                items += [self.ops[i] for i in simple]
                done.update(simple)
                continue
            sets = self._sets(ready, done)
            if not sets:
                return None
            best = min(sets, key=lambda s: (self._missed(s, done), min(s)))
            items.append(Stack(tuple(self.ops[i] for i in best)) if len(best) > 1 else self.ops[best[0]])
            done.update(best)
        return StepOrder(self.tokens, tuple(items))

    def _sets(self, ready: Sequence[int], done: set[int]) -> list[list[int]]:
        """The ready visits by block; readers of keys that are not there yet only together with their writer."""
        sets: dict[object, list[int]] = {}
        for i in ready:
            members = sets.setdefault(self.group[i], [])
            writer = self.keys.get(i)
            if writer is None or writer in done or writer in members:
                members.append(i)
        return [members for members in sets.values() if members]

    def _missed(self, chosen: list[int], done: set[int]) -> int:
        """Visits of the same block that could stand in one call with the chosen ones if those waited."""
        behind = set(chosen)
        for i in range(len(self.ops)):
            if i in done or i in behind:
                continue
            if self.before[i] & behind:
                behind.add(i)
        group = self.group[chosen[0]]
        return sum(g == group and i not in done and i not in behind for i, g in self.group.items())
