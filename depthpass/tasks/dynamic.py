"""Dynamic programmes: TAIL's knapsack, longest common subsequence and Levenshtein distance (arXiv 2507.13332), edit distance.

Each state is one cell of a grid. How a problem reads is ours.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.dags import TaskDAG
from depthpass.tasks.simulation import TAIL
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task


def zero() -> int:
    return 0


def leave(without: int) -> int:
    return without


def take(without: int, before: int, value: int) -> int:
    return max(without, before + value)


@dataclass(frozen=True)
class Knapsack(Task):
    """Most value of n items of given weight and value, each used at most once, within a capacity."""

    name: ClassVar[str] = "knapsack"
    family: ClassVar[str] = "dynamic programming"
    unit: ClassVar[str] = "items"
    ranges: ClassVar[dict] = {"S": (2, 3), "M": (4, 5), "L": (6, 8)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, tuple[tuple[int, int], ...]]:
        items = tuple((rng.randint(1, 6), rng.randint(1, 20)) for _ in range(length))
        return max(3, sum(w for w, _ in items) // 2), items

    def show(self, problem: tuple[int, tuple[tuple[int, int], ...]]) -> str:
        return f"knapsack {problem[0]} items " + " ".join(f"{w}:{v}" for w, v in problem[1])

    def parse(self, prompt: str) -> tuple[int, tuple[tuple[int, int], ...]]:
        word, capacity, items_word, *items = prompt.split()
        pairs = tuple(tuple(map(int, i.split(":"))) for i in items)
        if (word, items_word) != ("knapsack", "items") or any(len(p) != 2 or p[0] < 1 for p in pairs):
            raise ValueError(prompt)
        return int(capacity), pairs  # type: ignore[return-value]

    def run(self, problem: tuple[int, tuple[tuple[int, int], ...]], tape: Tape) -> str:
        capacity, items = problem
        best = [tape.step(f"t_{c}", zero) for c in range(capacity + 1)]
        for i, (weight, value) in enumerate(items):
            gain, old = tape.read(f"v{i}", value), best
            best = [tape.step(f"t{i}_{c}", take, old[c], old[c - weight], gain) if c >= weight
                    else tape.step(f"t{i}_{c}", leave, old[c]) for c in range(capacity + 1)]
        return str(best[capacity].value)


class Pair(Task):
    """Two strings over four letters, the first of n letters."""

    letters: ClassVar[str] = "abcd"
    word: ClassVar[str]

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        sizes = length, rng.randint(max(1, length - 2), length)
        return tuple("".join(rng.choices(self.letters, k=k)) for k in sizes)  # type: ignore[return-value]

    def show(self, problem: tuple[str, str]) -> str:
        return f"{self.word} {problem[0]} {problem[1]}"

    def parse(self, prompt: str) -> tuple[str, str]:
        word, a, b = prompt.split()
        if word != self.word:
            raise ValueError(f"expected '{self.word} ...', got {prompt!r}")
        return a, b


def common(a: str, b: str, above: int, left: int, corner: int) -> int:
    return corner + 1 if a == b else max(above, left)


@dataclass(frozen=True)
class LongestCommonSubsequence(Pair):
    """Length of a longest common subsequence of two strings of up to n letters."""

    name: ClassVar[str] = "lcs"
    family: ClassVar[str] = "dynamic programming"
    unit: ClassVar[str] = "letters of the longer string"
    ranges: ClassVar[dict] = {"S": (2, 6), "M": (7, 9), "L": (10, 12)}
    source: ClassVar[str] = TAIL
    word: ClassVar[str] = "lcs"

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        a, b = tape.row("a", problem[0]), tape.row("b", problem[1])
        edge = tape.step("t", zero)
        row = [edge] * (len(b) + 1)
        for i, x in enumerate(a):
            new: list[Cell] = [edge]
            for j, y in enumerate(b):
                new.append(tape.step(f"t{i}_{j}", common, x, y, row[j + 1], new[j], row[j]))
            row = new
        return str(row[-1].value)


def edit(a: str, b: str, above: int, left: int, corner: int) -> int:
    return min(above + 1, left + 1, corner + (a != b))


def edit_grid(a: list[Cell], b: list[Cell], tape: Tape) -> list[list[Cell]]:
    """Rows of the grid of distances; row and column 0 are inputs (the lengths of prefixes), not states."""
    down, right = ([tape.read(f"{n}{i}", i) for i in range(len(x) + 1)] for n, x in (("i", a), ("j", b)))
    rows = [right]
    for i, x in enumerate(a):
        row = [down[i + 1]]
        for j, y in enumerate(b):
            row.append(tape.step(f"t{i}_{j}", edit, x, y, rows[-1][j + 1], row[j], rows[-1][j]))
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Levenshtein(Pair):
    """Levenshtein distance of two strings of up to n letters."""

    name: ClassVar[str] = "levenshtein"
    family: ClassVar[str] = "dynamic programming"
    unit: ClassVar[str] = "letters of the longer string"
    ranges: ClassVar[dict] = {"S": (2, 4), "M": (5, 7), "L": (8, 9)}
    source: ClassVar[str] = TAIL
    word: ClassVar[str] = "levenshtein"

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        return str(edit_grid(tape.row("a", problem[0]), tape.row("b", problem[1]), tape)[-1][-1].value)


@dataclass(frozen=True)
class EditDistance(Levenshtein):
    """Edit distance of two strings of n letters, at the sizes of loops (systems of 30, 40, 60 letters in arXiv 2505.19245)."""

    name: ClassVar[str] = "edit_distance"
    ranges: ClassVar[dict] = {"S": (4, 30), "M": (31, 40), "L": (41, 60)}
    source: ClassVar[str] = "arXiv 2505.19245"
    word: ClassVar[str] = "edit"

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        return tuple("".join(rng.choices(self.letters, k=length)) for _ in range(2))  # type: ignore[return-value]

    def shape(self, n: int, m: int | None = None) -> TaskDAG:
        """n m cells, depth n + m - 1."""
        from depthpass.tasks.shapes import edit_distance

        return edit_distance(n, m)
