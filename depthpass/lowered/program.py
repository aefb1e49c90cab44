"""Lowered programs: regions of ops in the order in which they run, with every access to state written out.

A *region* is run by one level of the lowering: all new tokens at once, chunk by chunk, or as one small step. What an op reads
and writes besides its arguments stands on it: KV slots, and the delay line that a ``delay`` reads. A line takes its source in
at the end of every chunk. So order, liveness and chunk legality can be read from the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from depthpass.ir.program import Op
from depthpass.lowered.ops import LoweredOp, items_of
from depthpass.prompt import at_prompt
from depthpass.schedule.regions import Region
from depthpass.schedule.stacking import Stack

Kind = Literal["parallel", "chunks", "step"]


@dataclass(frozen=True)
class Line:
    """A delay line: the last tokens of a stream.

    Attributes:
        name: the delay that reads it.
        source: the stream it takes in at the end of every chunk.
        tokens: how many tokens back the delay reads.
    """

    name: str
    source: str
    tokens: int


@dataclass(frozen=True)
class LoweredRegion:
    """Ops that one level runs.

    Attributes:
        kind: ``parallel`` (all new tokens at once), ``chunks`` (a token loop), ``step`` (a few tokens, in one order).
        ops: in execution order.
        chunk: tokens run together in a token loop; the most that a step may have; None = all.
        level: what runs it.
        reason: why not a higher level, where one was asked for.
        inputs: values of earlier regions that it reads.
        outputs: values that later regions read.
        last: inputs and own values that nothing reads afterwards: they are let go of.
        lines: its delay lines.
        source: the schedule's region, where there is one; executors keep what they make of it by this key.
    """

    kind: Kind
    ops: tuple[LoweredOp, ...]
    chunk: int | None = None
    level: str = "eager"
    reason: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    source: Region | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Tokens of a chunk, or the most of a step."""
        if self.chunk is None:
            raise TypeError("a parallel region has no chunks")
        return self.chunk

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups whose last tokens its delays read: chunks end where a group of some row does."""
        return tuple(sorted({o.op["group"] for o in self.ops if o.line is not None and o.op["group"] is not None}))

    @property
    def scheduled(self) -> Region:
        """The schedule's region: the key of what executors make once for it."""
        if self.source is None:
            raise TypeError("a region that was read from a text has no schedule behind it")
        return self.source

    @property
    def serial(self) -> bool:
        return self.kind == "chunks"

    @cached_property
    def items(self) -> tuple[Op | Stack, ...]:
        """What executors run one after another."""
        return items_of(self.ops)

    @cached_property
    def program_ops(self) -> tuple[Op, ...]:
        """The ops as a program has them, in order; a visit is one ``block``."""
        return tuple(o for item in self.items for o in (item.visits if isinstance(item, Stack) else (item,)))

    @cached_property
    def visits(self) -> tuple[Op, ...]:
        return tuple(o for o in self.program_ops if o.kind == "block")

    @cached_property
    def calls(self) -> tuple[Op, ...]:
        """Its visits, and the feed-forward networks that it runs by themselves."""
        return tuple(o for o in self.program_ops if o.kind in ("block", "ffn"))


@at_prompt
@dataclass(frozen=True)
class LoweredProgram:
    """What one kind of call runs.

    Attributes:
        model: class of the stock model.
        call: a key of :data:`depthpass.lowered.build.CALLS`.
        level: the level that was asked for.
        blocks, width: of the stock model.
        regions: in execution order.
    """

    model: str
    call: str
    level: str
    blocks: int
    width: int
    regions: tuple[LoweredRegion, ...]

    def __str__(self) -> str:
        from depthpass.lowered.text import format_lowered

        return format_lowered(self)

    def __iter__(self) -> Iterator[LoweredRegion]:
        return iter(self.regions)
