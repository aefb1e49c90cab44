"""Training-free loops: a range in the middle of a frozen stack as damped sub-steps (arXiv 2605.23872)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from depthpass.errors import InputError
from depthpass.limits import VISITS, shown
from depthpass.passes.base import Pass
from depthpass.passes.layer_program import LayerProgram
from depthpass.passes.loop import Loop

Visits = tuple[int, ...]


class Damped(tuple[int, ...]):
    """The visits of a damped loop: those of the repeated range, whose passes each add a part of their change only.

    Attributes:
        start, end: the range.
        times: passes.
        step: part of the change; None = 1 / times.
    """

    start: int
    end: int
    times: int
    step: float | None

    def __new__(cls, blocks: int, start: int, end: int, times: int, step: float | None = None) -> Damped:
        stack = tuple(range(blocks))
        program = super().__new__(cls, stack[:start] + stack[start:end] * times + stack[end:])
        program.start, program.end, program.times, program.step = start, end, times, step
        return program

    @property
    def _key(self) -> tuple[Any, ...]:
        return Damped, tuple(self), self.start, self.end, self.times, self.step

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Damped) and self._key == other._key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._key)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return len(self) - (self.times - 1) * (self.end - self.start), self.start, self.end, self.times, self.step

    def __str__(self) -> str:
        part = f"1/{self.times}" if self.step is None else f"{self.step:g}"
        return f"{' '.join(map(str, tuple(self)))} (blocks {self.start}..{self.end - 1} in {self.times} steps of {part})"

    @property
    def spec(self) -> Loop:
        return Loop(self.start, self.end, times=self.times, damped=True if self.step is None else self.step)


def spec_of(layers: Visits) -> Pass:
    """What ``dp.transform`` takes."""
    return layers.spec if isinstance(layers, Damped) else LayerProgram(layers)


def text_of(layers: Visits) -> str:
    return str(layers) if isinstance(layers, Damped) else " ".join(map(str, layers))


def data_of(layers: Visits) -> dict[str, Any]:
    """Its visits, and of a damped loop what is damped, as plain data."""
    if not isinstance(layers, Damped):
        return {"layers": list(layers)}
    return {"layers": list(layers), "damped": {n: getattr(layers, n) for n in ("start", "end", "times", "step")}}


@dataclass(frozen=True)
class DampedLoops:
    """Programs that run one range of blocks in K damped sub-steps: K times h + (f(h) - h) / K, or another part of the change.

    Naive repetition (the same ranges and counts, undamped) is run beside them as a control of its own.

    Args:
        lengths: of the range; ``"any"`` = all.
        times: K, each at least 2.
        steps: parts of the change; None = 1 / K.
        within: shares of the stack between which the range lies; the published gains are of ranges around its middle.

    Raises:
        InputError: a field is out of range.
    """

    lengths: tuple[int, ...] | str = (2, 3, 4, 6)
    times: tuple[int, ...] = (2, 3, 4)
    steps: tuple[float | None, ...] = (None,)
    within: tuple[float, float] = (0.25, 0.85)
    edits: int | None = field(default=1, init=False)

    def __post_init__(self):
        for name, least in (("lengths", 1), ("times", 2)):
            value: Any = getattr(self, name)
            if name == "lengths" and value == "any":
                continue
            value = (value,) if type(value) is int else value
            if not isinstance(value, list | tuple | range) or not value or any(
                type(v) is not int or not least <= v <= VISITS for v in value
            ):
                raise InputError(f"space.{name}: expected integers of at least {least}, got {shown(value)}.")
            object.__setattr__(self, name, tuple(sorted(set(value))))
        steps = self.steps if isinstance(self.steps, list | tuple) else (self.steps,)
        if not steps or not all(map(_is_part, steps)):
            raise InputError("space.steps: expected parts of the change in (0, 2], or None for 1 / times, got "
                             f"{shown(self.steps)}.")
        object.__setattr__(self, "steps", tuple(dict.fromkeys(None if s is None else float(s) for s in steps)))
        within: Any = self.within
        if not isinstance(within, list | tuple) or len(within) != 2 or not 0 <= within[0] < within[1] <= 1:
            raise InputError(f"space.within: expected two shares 0 <= low < high <= 1, got {shown(within)}.")
        object.__setattr__(self, "within", tuple(map(float, within)))

    def check(self, blocks: int) -> None:
        if not self.children(tuple(range(blocks)), blocks, 0):
            raise InputError(f"space: it contains no range of {self.lengths} blocks between {self.within[0]:g} and "
                             f"{self.within[1]:g} of {blocks}. Allow other lengths, or a wider within.")

    def children(self, layers: Visits, blocks: int, edits: int) -> list[Visits]:
        """All of them, from the stock program."""
        if edits:
            return []
        low, high = (round(share * blocks) for share in self.within)
        lengths = range(1, high - low + 1) if isinstance(self.lengths, str) else self.lengths
        return [
            Damped(blocks, start, start + length, times, step)
            for length in lengths for start in range(low, high - length + 1) for times in self.times for step in self.steps
        ]

    def programs(self, blocks: int) -> Iterator[Visits]:
        stack = tuple(range(blocks))
        yield stack
        yield from self.children(stack, blocks, 0)

    def draw(self, blocks: int, rng: random.Random) -> Visits:
        return rng.choice(self.children(tuple(range(blocks)), blocks, 0))

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {"damped": {n: list(v) if isinstance(v, tuple) else v for n, v in data.items()}}


def _is_part(step: object) -> bool:
    return step is None or (isinstance(step, int | float) and not isinstance(step, bool) and 0 < step <= 2)
