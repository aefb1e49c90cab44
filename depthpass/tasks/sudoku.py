"""Sudoku, 4 by 4 and 9 by 9, with a single solution that naked singles find."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task


@cache
def peers(box: int) -> tuple[tuple[int, ...], ...]:
    """Cells that share row, column or box with each cell of a grid of boxes of so many cells a side."""
    side = box * box
    groups = [{(r, c) for c in range(side)} for r in range(side)] + [{(r, c) for r in range(side)} for c in range(side)]
    groups += [{(box * i + r, box * j + c) for r in range(box) for c in range(box)} for i in range(box) for j in range(box)]
    return tuple(tuple(sorted({p * side + q for g in groups if (r, c) in g for p, q in g} - {r * side + c}))
                 for r in range(side) for c in range(side))


def only(side: int, *seen: int) -> int:
    """The one number from 1 to ``side`` that none of the peers holds."""
    left = set(range(1, side + 1)) - set(seen)
    if len(left) != 1:
        raise ValueError(f"expected one number to be left, got {sorted(left)}")
    return left.pop()


def singles(grid: list[int], box: int) -> list[list[int]]:
    """Rounds of empty cells whose peers leave one number; each round sees earlier rounds only. Fills the grid in."""
    side, rounds = box * box, []
    while True:
        ready = {i: set(range(1, side + 1)) - {grid[p] for p in peers(box)[i]} for i, v in enumerate(grid) if not v}
        now = {i: left for i, left in ready.items() if len(left) == 1}
        if not now:
            return rounds
        for i, left in now.items():
            grid[i] = left.pop()
        rounds.append(list(now))


@dataclass(frozen=True)
class Sudoku(Task):
    """Fill in n empty cells. A puzzle is kept only if naked singles alone solve it, so that its solution is the only one.

    A state per empty cell, which fetches all its peers known by then: the levels are the rounds of singles.
    """

    family: ClassVar[str] = "sudoku"
    unit: ClassVar[str] = "empty cells"
    box: ClassVar[int]

    def draw(self, length: int, rng: random.Random) -> tuple[int, ...]:
        while True:
            solution = self._solution(rng)
            puzzle, empty = list(solution), 0
            for i in rng.sample(range(len(puzzle)), len(puzzle)):
                trial = [*puzzle]
                trial[i] = 0
                left = [*trial]
                singles(left, self.box)
                if left == solution:
                    puzzle, empty = trial, empty + 1
                if empty == length:
                    return tuple(puzzle)

    def _solution(self, rng: random.Random) -> list[int]:
        """A pattern with rows, columns and numbers shuffled within what keeps it valid."""
        box, side = self.box, self.box**2

        def shuffled() -> list[int]:
            return [g * box + i for g in rng.sample(range(box), box) for i in rng.sample(range(box), box)]

        rows, columns, numbers = shuffled(), shuffled(), rng.sample(range(1, side + 1), side)
        return [numbers[(box * (r % box) + r // box + c) % side] for r in rows for c in columns]

    def show(self, problem: tuple[int, ...]) -> str:
        side = self.box**2
        text = "".join(map(str, problem)).replace("0", ".")
        return "sudoku\n" + "\n".join(text[i : i + side] for i in range(0, len(text), side))

    def parse(self, prompt: str) -> tuple[int, ...]:
        word, *rows = prompt.split()
        side = self.box**2
        grid = tuple(int(x) for x in "".join(rows).replace(".", "0"))
        if word != "sudoku" or len(grid) != side**2 or max(grid) > side:
            raise ValueError(f"expected 'sudoku' and {side} rows of {side} cells")
        return grid

    def run(self, problem: tuple[int, ...], tape: Tape) -> str:
        side = self.box**2
        most, known = tape.read("n", side), {}
        for i, v in enumerate(problem):
            if v:
                known[i] = tape.read(f"r{i // side}c{i % side}", v)
        for ready in singles(list(problem), self.box):
            new: dict[int, Cell] = {}
            for i in ready:
                near = [known[p] for p in peers(self.box)[i] if p in known]
                new[i] = tape.step(f"r{i // side}c{i % side}", only, most, *near)
            known |= new
        if len(known) < len(problem):
            raise ValueError("naked singles do not solve this puzzle")
        text = "".join(str(known[i].value) for i in range(len(problem)))
        return " ".join(text[i : i + side] for i in range(0, len(text), side))


@dataclass(frozen=True)
class Sudoku4(Sudoku):
    """Sudoku of 4 by 4 cells."""

    name: ClassVar[str] = "sudoku_4"
    ranges: ClassVar[dict] = {"S": (1, 5), "M": (6, 8), "L": (9, 10)}
    most: ClassVar[int] = 10
    box: ClassVar[int] = 2


@dataclass(frozen=True)
class Sudoku9(Sudoku):
    """Sudoku of 9 by 9 cells."""

    name: ClassVar[str] = "sudoku_9"
    ranges: ClassVar[dict] = {"S": (1, 20), "M": (21, 35), "L": (36, 45)}
    most: ClassVar[int] = 48
    box: ClassVar[int] = 3
