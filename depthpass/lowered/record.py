"""What ran in a call: the lowered programs, and how each of their serial regions was run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from depthpass.prompt import at_prompt

if TYPE_CHECKING:
    from depthpass.lowered.program import LoweredProgram


@at_prompt
@dataclass(frozen=True)
class Lowered:
    """How one serial region was run in one call.

    Attributes:
        blocks: physical blocks of the region's visits.
        tokens, chunk: new columns of the call, and how many ran at once.
        level: level of the lowering that ran it: ``eager``, ``scheduled``, ``inductor`` or ``cudagraph``.
        reason: why it was not a higher level, where the model asks for one; None = it is what was asked for.
        padded: columns of nobody that the level put behind the rows, so that rows of similar length share one recording.
        recomputed: whether activations are computed again in the backward pass (gradient checkpointing).
    """

    blocks: tuple[int, ...]
    tokens: int
    chunk: int
    level: str
    reason: str | None = None
    padded: int = 0
    recomputed: bool = False

    def __str__(self) -> str:
        text = f"blocks {', '.join(map(str, self.blocks))}: {self.tokens} tokens in chunks of {self.chunk}, level {self.level!r}"
        text += f", {self.padded} columns of padding" if self.padded else ""
        text += ", activations recomputed" if self.recomputed else ""
        return text + (f" ({self.reason})" if self.reason else "")


@at_prompt
class LoweredCall(tuple[Lowered, ...]):
    """The serial regions of a call, in the order they ran; prints as the lowered programs that ran.

    Attributes:
        programs: one for each set of rows with a program of their own, without repetition.
    """

    programs: tuple[LoweredProgram, ...]

    def __new__(cls, regions: Iterable[Lowered] = (), programs: Iterable[LoweredProgram] = ()) -> LoweredCall:
        call = super().__new__(cls, regions)
        call.programs = tuple(dict.fromkeys(programs))
        return call

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.programs, *(f"# {region}" for region in self))))


class Ran(Protocol):
    """What a run returns, as far as it is recorded."""

    @property
    def record(self) -> Sequence[Lowered]: ...

    @property
    def lowered(self) -> LoweredProgram: ...


class Recorder:
    """Collects what the runs of one call do."""

    def __init__(self) -> None:
        self.regions: list[Lowered] = []
        self.programs: dict[int, LoweredProgram] = {}

    def add(self, result: Ran) -> None:
        """Take the record of a run."""
        self.regions += result.record
        self.ran(result.lowered)

    def ran(self, lowered: LoweredProgram) -> None:
        """Take a program without serial regions of its own."""
        self.programs[id(lowered)] = lowered

    def done(self) -> LoweredCall:
        return LoweredCall(self.regions, self.programs.values())
