"""Spaces of layer programs: what may be skipped and repeated, and how long a program may become."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from depthpass.errors import InputError, did_you_mean
from depthpass.limits import VISITS, shown
from depthpass.search.damped import DampedLoops

Layers = tuple[int, ...]
"""A layer program: blocks in the order of their visits."""

Lengths = tuple[int, ...] | Literal["any"]

MOST = 1 << 17
"""Most programs that are listed."""


@dataclass(frozen=True)
class Space:
    """Programs that edits make of the stock list ``0..L-1``: each edit skips a span of visits, or repeats one in a row.

    An edit acts on the program that the edits before it have made. Every program on the way has a legal length.

    Args:
        skip: lengths of spans that may be left out; ``"any"`` = all lengths.
        repeat: lengths of spans that may be repeated (contiguous loops); ``"any"`` = all lengths.
        times: how many times *more* a repeated span runs.
        shortest: least visits of a program, at most L.
        longest: most visits as a multiple of L, at least 1.
        edits: most edits of a program; None = any number.
        once: a visit may be edited only once: spans hold no block that is visited twice.

    Raises:
        InputError: a field is out of range.
    """

    skip: Lengths = (1, 2, 3, 4)
    repeat: Lengths = (1, 2, 3, 4)
    times: tuple[int, ...] = (1, 2, 3, 4)
    shortest: int = 1
    longest: float = 2.0
    edits: int | None = None
    once: bool = False

    def __post_init__(self):
        for name in ("skip", "repeat", "times"):
            value: Any = getattr(self, name)
            if value == "any" and name != "times":
                continue
            if isinstance(value, int) and not isinstance(value, bool):
                value = (value,)
            good = isinstance(value, list | tuple | range) and all(type(v) is int and 1 <= v <= VISITS for v in value)
            if not good:
                raise InputError(f"space.{name}: expected integers of at least 1, got {shown(value)}.")
            chosen: Any = value
            object.__setattr__(self, name, tuple(sorted(set(chosen))))
        if not isinstance(self.once, bool):
            raise InputError(f"space.once: expected True or False, got {shown(self.once)}.")
        if type(self.shortest) is not int or self.shortest < 1:
            raise InputError(f"space.shortest: expected a number of visits of at least 1, got {shown(self.shortest)}.")
        number = isinstance(self.longest, int | float) and not isinstance(self.longest, bool)
        if not number or not 1 <= self.longest <= VISITS:
            raise InputError(f"space.longest: expected a multiple of the stock length of at least 1, got {shown(self.longest)}.")
        if self.edits is not None and (type(self.edits) is not int or self.edits < 1):
            raise InputError(f"space.edits: expected at least 1 or None, got {shown(self.edits)}.")

    def check(self, blocks: int) -> None:
        """Refuse a space that holds nothing but the stock program of ``blocks`` blocks."""
        if self.shortest > blocks:
            raise InputError(f"space.shortest: expected at most the model's {blocks} visits, where a search starts, got "
                             f"{self.shortest}.")
        if not self.children(stock(blocks), blocks, 0):
            raise InputError(f"space: it contains no program besides the stock one of {blocks} blocks: no span of "
                             f"{_lengths(self.skip)} may be skipped and none of {_lengths(self.repeat)} repeated within "
                             f"{self.shortest} to {int(self.longest * blocks)} visits. Allow other spans or lengths.")

    def children(self, layers: Layers, blocks: int, edits: int) -> list[Layers]:
        """Programs that one more edit makes of a program of so many edits, each once."""
        if self.edits is not None and edits >= self.edits:
            return []
        most, n, programs = int(self.longest * blocks), len(layers), {}
        double = {b for b in layers if layers.count(b) > 1} if self.once else set()
        for length in _spans(self.skip, n - self.shortest):
            for start in range(n - length + 1):
                if double.isdisjoint(layers[start : start + length]):
                    programs[layers[:start] + layers[start + length :]] = None
        for length in _spans(self.repeat, min(n, most - n)):
            for start in range(n - length + 1):
                span = layers[start : start + length]
                if not double.isdisjoint(span):
                    continue
                for times in self.times:
                    if n + times * length <= most:
                        programs[layers[:start] + span * (times + 1) + layers[start + length :]] = None
        programs.pop(layers, None)
        return list(programs)

    def programs(self, blocks: int) -> Iterator[Layers]:
        """Every program, each once, those of fewer edits first; the stock program leads."""
        seen = front = {stock(blocks): None}
        yield from front
        edits = 0
        while front:
            following: dict[Layers, None] = {}
            for layers in front:
                for child in self.children(layers, blocks, edits):
                    if child not in seen and child not in following:
                        following[child] = None
                        yield child
            seen, front, edits = seen | following, following, edits + 1

    def draw(self, blocks: int, rng: random.Random) -> Layers:
        """A random program: one edit, and another one with probability 1/2, and so on; each uniform over what is legal."""
        layers, edits = stock(blocks), 0
        while edits == 0 or rng.random() < 0.5:
            programs = self.children(layers, blocks, edits)
            if not programs:
                break
            layers, edits = rng.choice(programs), edits + 1
        return layers

    def to_dict(self) -> dict[str, Any]:
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}


@dataclass(frozen=True)
class Listed:
    """Programs that are listed one by one.

    Raises:
        InputError: there are none, or one is not a list of block numbers.
    """

    listed: tuple[Layers, ...]
    edits: int | None = field(default=1, init=False)

    def __post_init__(self):
        programs = []
        for i, layers in enumerate(self.listed):
            layers = getattr(layers, "layers", layers)
            good = isinstance(layers, list | tuple) and layers and all(type(b) is int and b >= 0 for b in layers)
            if not good:
                raise InputError(f"space[{i}]: expected a layer program, a list of block numbers of at least 0, got "
                                 f"{shown(layers)}.")
            programs.append(tuple(layers))
        object.__setattr__(self, "listed", tuple(dict.fromkeys(programs)))

    def check(self, blocks: int) -> None:
        for i, layers in enumerate(self.listed):
            if max(layers) >= blocks:
                raise InputError(f"space[{i}]: expected blocks in 0..{blocks - 1}, got {max(layers)}.")
        if not self.children(stock(blocks), blocks, 0):
            raise InputError("space: expected layer programs besides the stock one, got none.")

    def children(self, layers: Layers, blocks: int, edits: int) -> list[Layers]:
        """All of them, from the stock program."""
        return [p for p in self.listed if p != layers] if edits == 0 else []

    def programs(self, blocks: int) -> Iterator[Layers]:
        yield stock(blocks)
        yield from self.children(stock(blocks), blocks, 0)

    def draw(self, blocks: int, rng: random.Random) -> Layers:
        return rng.choice(self.children(stock(blocks), blocks, 0))

    def to_dict(self) -> dict[str, Any]:
        return {"programs": [list(p) for p in self.listed]}


PRESETS: dict[str, Space | DampedLoops] = {
    "cola": Space(),
    "dr_llm": Space(skip=(1, 2), repeat=(1,), times=(1,)),
    "polar": Space(skip=(1,), repeat=(1,), times=(1,), once=True),
    "rys": Space(skip=(), repeat="any", times=(1,), edits=1),
    "training_free": DampedLoops(),
}
"""Published spaces."""
ABOUT = {
    "cola": "CoLa (arXiv 2507.07996): skip or repeat 1 to 4 blocks in a row, at most twice as many visits as blocks",
    "dr_llm": "Dr.LLM: skip 1 or 2 blocks in a row, repeat one block",
    "polar": "PoLar (arXiv 2606.06574): each block skipped, kept or visited twice",
    "rys": "RYS: one range of blocks twice",
    "training_free": "arXiv 2605.23872: one range of the middle in damped sub-steps, without training",
}

AnySpace = Space | Listed | DampedLoops
SpaceLike = str | AnySpace | Mapping[str, Any] | Sequence[Any]


def load_space(space: SpaceLike) -> AnySpace:
    """A space from its name, its fields, or a list of programs.

    Raises:
        InputError: naming what is wrong.
    """
    if isinstance(space, Space | Listed | DampedLoops):
        return space
    if isinstance(space, str):
        if space not in PRESETS:
            raise InputError(f"space: expected one of {', '.join(PRESETS)}, got {shown(space)}.{did_you_mean(space, PRESETS)}")
        return PRESETS[space]
    if isinstance(space, Mapping):
        damped = space.get("damped")
        if isinstance(damped, Mapping) and len(space) == 1:
            return DampedLoops(**_known(DampedLoops, damped))
        return Space(**_known(Space, space))
    if isinstance(space, Iterable) and getattr(space, "ndim", 1):  # a tensor without dimensions says it is iterable
        return Listed(tuple(space))
    raise InputError(f"space: expected a name ({', '.join(PRESETS)}), a Space, its fields or a list of layer programs, got "
                     f"{shown(space)}.")


def _known(kind: type[Space] | type[DampedLoops], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a space, each of them one that it has."""
    known = [f.name for f in fields(kind) if f.init]
    for name in given:
        if name not in known:
            raise InputError(f"space.{name}: no such field; expected {', '.join(known)}.{did_you_mean(str(name), known)}")
    return dict(given)


def stock(blocks: int) -> Layers:
    return tuple(range(blocks))


def listing(space: AnySpace, blocks: int, most: int = MOST) -> tuple[list[Layers], bool]:
    """At most so many programs of a space, and whether that is all of them."""
    programs: list[Layers] = []
    for layers in space.programs(blocks):
        if len(programs) == most:
            return programs, False
        programs.append(layers)
    return programs, True


def _spans(lengths: Lengths, most: int) -> Iterable[int]:
    return range(1, most + 1) if isinstance(lengths, str) else [n for n in lengths if n <= most]


def _lengths(lengths: Lengths) -> str:
    return "any length" if isinstance(lengths, str) else f"length {', '.join(map(str, lengths))}" if lengths else "no length"
