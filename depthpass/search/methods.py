"""Search methods: which programs are scored next."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.errors import InputError
from depthpass.limits import shown
from depthpass.search.judge import Judge
from depthpass.search.space import AnySpace, listing


@dataclass(frozen=True)
class Method:
    """A way through a space. Its fields are its options."""

    name: ClassVar[str]
    complete: ClassVar[bool] = False

    def run(self, judge: Judge, space: AnySpace, rng: random.Random) -> None:
        """Score programs until the budget is spent or nothing is left."""
        raise NotImplementedError

    def check(self, space: AnySpace, blocks: int, budget: int | None) -> None:
        """Refuse what cannot be searched, before any program runs."""
        if budget is None:
            raise InputError(f"budget: expected how many programs {self.name} may score, got None.")


@dataclass(frozen=True)
class RandomSearch(Method):
    """Random programs of the space: one edit, another with probability 1/2, and so on; all of them where they are few."""

    name: ClassVar[str] = "random"

    def run(self, judge: Judge, space: AnySpace, rng: random.Random) -> None:
        blocks = len(judge.root)
        few, complete = listing(space, blocks, judge.budget + 1)
        if complete:
            judge.run(few)
            return
        drawn: dict = {}
        for _ in range(100 * judge.budget):
            layers = space.draw(blocks, rng)
            if layers not in judge.trials:
                drawn[layers] = None
            if len(drawn) == judge.left:
                break
        judge.run(drawn)


@dataclass(frozen=True)
class Sweep(Method):
    """Every program of one edit, as a scan of repeated ranges does (RYS); a random part of them where the budget is less."""

    name: ClassVar[str] = "sweep"
    complete: ClassVar[bool] = True

    def run(self, judge: Judge, space: AnySpace, rng: random.Random) -> None:
        programs = space.children(judge.root, len(judge.root), 0)
        judge.run(programs if len(programs) <= judge.left else rng.sample(programs, judge.left))

    def check(self, space: AnySpace, blocks: int, budget: int | None) -> None:
        return


@dataclass(frozen=True)
class Exhaustive(Method):
    """Every program of the space."""

    name: ClassVar[str] = "exhaustive"
    complete: ClassVar[bool] = True

    def run(self, judge: Judge, space: AnySpace, rng: random.Random) -> None:
        judge.run(listing(space, len(judge.root))[0])

    def check(self, space: AnySpace, blocks: int, budget: int | None) -> None:
        programs, complete = listing(space, blocks, *(() if budget is None else (budget + 1,)))
        if not complete:
            raise InputError(f"budget: exhaustive scores every program of the space, which has more than {len(programs) - 1} "
                             "besides the stock one. Give a larger budget, a smaller space (edits=, longest=), or "
                             "method='random'.")


@dataclass(frozen=True)
class Beam(Method):
    """Keep the best programs of a round and edit each once more.

    Args:
        width: programs kept.
        rounds: the budget is spread over so many rounds; a round scores a random part of the edits where they are more.
    """

    name: ClassVar[str] = "beam"

    width: int = 5
    rounds: int = 4

    def __post_init__(self):
        for name in ("width", "rounds"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"beam.{name}: expected at least 1, got {shown(value)}.")

    def run(self, judge: Judge, space: AnySpace, rng: random.Random) -> None:
        beam, edits, blocks = [judge.root], 0, len(judge.root)
        rounds = min(self.rounds, space.edits or self.rounds)
        while judge.left > 0:
            programs = dict.fromkeys(c for p in beam for c in space.children(p, blocks, edits) if c not in judge.trials)
            if not programs:
                return
            count = -(-judge.left // max(1, rounds - edits))
            chosen = list(programs) if len(programs) <= count else rng.sample(list(programs), count)
            judge.run(chosen)
            # Programs of fewer edits may stay, unless edits are counted.
            held = {*beam, *chosen} if space.edits is None else chosen
            beam = sorted(held, key=lambda p: (-judge.gain(p), len(p), p))[: self.width]
            edits += 1
