"""Named inner streams, returned with the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from depthpass.errors import PassError
from depthpass.ir.program import Program, op
from depthpass.passes.base import Context, Numerics, Pass, require
from depthpass.passes.streams import check_whole, stream_after


@dataclass(frozen=True)
class Taps(Pass):
    """Return the stream after given visits (and after bridges that land there) with the outputs.

    rewrite:
        taps(at=[1])
        `%2 = block 1 (%1) slot 1`  ->  `%2 = block 1 (%1) slot 1` `tap taps.v1 (%2)`

    Args:
        at: positions in the program's list of visits.
        head: return logits (the stock final norm and head applied) instead of the stream.
        scope: first part of the tap names ``{scope}.v{position}``.
    """

    name: ClassVar[str] = "taps"
    numerics: ClassVar[Numerics] = "exact"

    at: Sequence[int]
    head: bool = False
    scope: str = "taps"

    def validate(self) -> None:
        require(len(self.at) > 0, "taps.at", "at least one position", list(self.at))
        require(len(set(self.at)) == len(self.at), "taps.at", "positions that differ", list(self.at))
        require(min(self.at) >= 0, "taps.at", "positions of at least 0", min(self.at))
        require(self.scope.isidentifier(), "taps.scope", "a plain name of letters, digits and _", self.scope)

    def apply(self, program: Program, ctx: Context) -> Program:
        visits = program.visits
        if max(self.at) >= len(visits):
            raise PassError(f"taps.at: expected positions in 0..{len(visits) - 1}, got {max(self.at)}.")
        check_whole(self.name, program, self.at)
        taken = {o["name"] for o in program.taps}
        for position in self.at:
            if f"{self.scope}.v{position}" in taken:
                raise PassError(f"taps.at: the program already has a tap {self.scope}.v{position}. Set scope='another_name' on "
                                "one of the passes.")
        for position in self.at:
            stream = value = stream_after(program, position)
            new = []
            if self.head:
                (value,) = program.fresh()
                new.append(op("norm", stream, name=value))
            new.append(op("tap", value, head=self.head).with_attrs(name=f"{self.scope}.v{position}"))
            program = program.insert_after(stream, new)
        return program
