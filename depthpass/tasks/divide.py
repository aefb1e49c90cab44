"""TAIL, divide and conquer: binary search (arXiv 2507.13332). How a problem reads is ours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.dags import TaskDAG
from depthpass.tasks.simulation import TAIL
from depthpass.tasks.tape import Tape
from depthpass.tasks.task import Task


def halve(span: tuple[int, int], item: int, target: int) -> tuple[int, int]:
    """The half of [low, high) that can hold the target, given its middle item: [low, middle) or [middle, high)."""
    middle = (span[0] + span[1]) // 2
    return (span[0], middle) if target < item else (middle, span[1])


def found(span: tuple[int, int], item: int, target: int) -> int:
    return span[0] if item == target else -1


@dataclass(frozen=True)
class BinarySearch(Task):
    """Place of a number among n sorted distinct numbers, -1 if it is not among them."""

    name: ClassVar[str] = "binary_search"
    family: ClassVar[str] = "divide and conquer"
    unit: ClassVar[str] = "items"
    ranges: ClassVar[dict] = {"S": (5, 20), "M": (21, 40), "L": (41, 70)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, tuple[int, ...]]:
        items = tuple(sorted(rng.sample(range(max(100, 3 * length)), length)))
        return rng.choice(items) if rng.random() < 0.7 else rng.randrange(max(100, 3 * length)), items

    def show(self, problem: tuple[int, tuple[int, ...]]) -> str:
        return f"search {problem[0]} in " + " ".join(map(str, problem[1]))

    def parse(self, prompt: str) -> tuple[int, tuple[int, ...]]:
        word, target, where, *items = prompt.split()
        numbers = tuple(map(int, items))
        if (word, where) != ("search", "in") or list(numbers) != sorted(set(numbers)) or not numbers:
            raise ValueError(prompt)
        return int(target), numbers

    def run(self, problem: tuple[int, tuple[int, ...]], tape: Tape) -> str:
        target, items = tape.read("x", problem[0]), tape.row("a", problem[1])
        span, turn = tape.read("s0", (0, len(items))), 0
        while span.value[1] - span.value[0] > 1:  # type: ignore[index]
            turn += 1
            span = tape.step(f"s{turn}", halve, span, items[sum(span.value) // 2], target)  # type: ignore[arg-type]
        return str(tape.step("f", found, span, items[span.value[0]], target).value)  # type: ignore[index]

    def shape(self, n: int) -> TaskDAG:
        """The worst path: ceil(log2 n) halvings and one comparison."""
        from depthpass.tasks.shapes import binary_search

        return binary_search(n)
