"""RELAY's three tasks, one supervision target per loop (arXiv 2502.08482): arithmetic, edit distance, increasing subsequence.

Iteration t of a looped model is supervised with round t of the chain. A round never has more symbols than the prompt, so
that it can be right-aligned to it. The number of rounds follows the paper: operators; letters of the shorter string; tenths
of the sequence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from depthpass.tasks.arithmetic import _at_least
from depthpass.tasks.dynamic import edit_grid, zero
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task

RELAY = "arXiv 2502.08482"


def plus(modulus: int, a: int, b: int) -> int:
    return (a + b) % modulus


def minus(modulus: int, a: int, b: int) -> int:
    return (a - b) % modulus


def times(modulus: int, a: int, b: int) -> int:
    return a * b % modulus


OPERATORS = {"+": plus, "-": minus, "*": times}


@dataclass(frozen=True)
class RelayArithmetic(Task):
    """Value of an expression with n operators modulo m: round t is the expression after t reductions, leftmost first.

    ``(3+4)*2=`` has the rounds ``7*2`` and ``3`` modulo 11, the last one being the answer. Every operation but the last one
    stands in brackets of its own.

    Args:
        modulus: values are taken modulo this; a value is one symbol.
    """

    name: ClassVar[str] = "relay_arithmetic"
    family: ClassVar[str] = "relay"
    unit: ClassVar[str] = "operators"
    ranges: ClassVar[dict] = {"S": (1, 15), "M": (16, 20), "L": (21, 25)}
    source: ClassVar[str] = RELAY

    modulus: int = 11

    def __post_init__(self) -> None:
        _at_least(self.name, "modulus", self.modulus, 2)

    def draw(self, length: int, rng: random.Random) -> tuple[str, ...]:
        tokens = [str(rng.randrange(self.modulus))]
        for _ in range(length):  # a random number becomes an operation
            at = rng.choice([i for i, x in enumerate(tokens) if x.isdigit()])
            a, b = (str(rng.randrange(self.modulus)) for _ in range(2))
            tokens[at : at + 1] = ["(", a, rng.choice("+-*"), b, ")"]
        return tuple(tokens[1:-1])

    def show(self, problem: tuple[str, ...]) -> str:
        return " ".join([*problem, "="])

    def parse(self, prompt: str) -> tuple[str, ...]:
        *tokens, mark = prompt.split()
        if mark != "=" or any(x not in "()+-*" and not 0 <= int(x) < self.modulus for x in tokens):
            raise ValueError(f"expected symbols with spaces between them and '=', got {prompt!r}")
        self._reduce(tuple(tokens), Tape())
        return tuple(tokens)

    def run(self, problem: tuple[str, ...], tape: Tape) -> str:
        return self._reduce(problem, tape)[-1][0]

    def rounds(self, problem: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(" ".join(r) for r in self._reduce(problem, Tape()))

    def _reduce(self, problem: tuple[str, ...], tape: Tape) -> list[list[str]]:
        """The expression after each reduction."""
        modulus = tape.read("m", self.modulus)
        line: list[str | Cell] = [tape.read(f"x{i}", int(x)) if x.isdigit() else x for i, x in enumerate(problem)]
        lines: list[list[str]] = []
        while len(line) > 1:
            at = next((i for i in range(1, len(line) - 1) if isinstance(line[i], str) and line[i] in OPERATORS
                       and isinstance(line[i - 1], Cell) and isinstance(line[i + 1], Cell)), None)
            if at is None:
                raise ValueError("expected an expression whose operations stand in brackets")
            a, operator, b = line[at - 1 : at + 2]
            value = tape.step(f"s{len(lines)}", OPERATORS[operator], modulus, a, b)  # type: ignore[arg-type, index]
            left, right = at - 1, at + 2
            if left and line[left - 1] == "(" and line[right : right + 1] == [")"]:
                left, right = left - 1, right + 1
            line[left:right] = [value]
            lines.append([str(x.value) if isinstance(x, Cell) else x for x in line])
        return lines or [[str(line[0].value)]]  # type: ignore[union-attr]


@dataclass(frozen=True)
class RelayEditDistance(Task):
    """Edit distance of two strings: round t is row t of the grid, one row per letter of the shorter string.

    Args:
        alphabet: so many letters.
    """

    name: ClassVar[str] = "relay_edit_distance"
    family: ClassVar[str] = "relay"
    unit: ClassVar[str] = "letters of the shorter string"
    ranges: ClassVar[dict] = {"S": (1, 30), "M": (31, 35), "L": (36, 40)}
    source: ClassVar[str] = RELAY

    alphabet: int = 4

    def __post_init__(self) -> None:
        _at_least(self.name, "alphabet", self.alphabet, 2)

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        letters = "abcdefghijklmnopqrstuvwxyz"[: self.alphabet]
        a, b = ("".join(rng.choices(letters, k=k)) for k in (length, rng.randint(length, length + 3)))
        return a, b

    def show(self, problem: tuple[str, str]) -> str:
        return " ".join([*problem[0], "|", *problem[1], "="])

    def parse(self, prompt: str) -> tuple[str, str]:
        *tokens, mark = prompt.split()
        a, b = "".join(tokens).split("|")
        if mark != "=" or not 0 < len(a) <= len(b):
            raise ValueError(f"expected two strings, the shorter one first, got {prompt!r}")
        return a, b

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        return str(edit_grid(tape.row("a", problem[0]), tape.row("b", problem[1]), tape)[-1][-1].value)

    def rounds(self, problem: tuple[str, str]) -> tuple[str, ...]:
        tape = Tape()
        rows = edit_grid(tape.row("a", problem[0]), tape.row("b", problem[1]), tape)
        return tuple(" ".join(str(c.value) for c in row[1:]) for row in rows[1:])


def longer(a: int, b: int, here: int, best: int) -> int:
    """Length of an increasing subsequence that ends here, with what stands in front of it."""
    return max(best, here + 1) if a < b else best


def one() -> int:
    return 1


def most(a: int, b: int) -> int:
    return max(a, b)


@dataclass(frozen=True)
class RelaySubsequence(Task):
    """Length of a longest strictly increasing subsequence of n numbers; round t knows the lengths at the first 10 t places.

    Args:
        values: numbers are below this; a number is one symbol.
        block: places per round.
    """

    name: ClassVar[str] = "relay_subsequence"
    family: ClassVar[str] = "relay"
    unit: ClassVar[str] = "numbers"
    ranges: ClassVar[dict] = {"S": (1, 100), "M": (101, 110), "L": (111, 120)}
    source: ClassVar[str] = RELAY

    values: int = 150
    block: int = 10

    def __post_init__(self) -> None:
        _at_least(self.name, "values", self.values, 2)
        _at_least(self.name, "block", self.block, 1)

    def draw(self, length: int, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randrange(self.values) for _ in range(length))

    def show(self, problem: tuple[int, ...]) -> str:
        return " ".join([*map(str, problem), "="])

    def parse(self, prompt: str) -> tuple[int, ...]:
        *numbers, mark = prompt.split()
        if mark != "=" or not numbers:
            raise ValueError(f"expected numbers and '=', got {prompt!r}")
        return tuple(map(int, numbers))

    def run(self, problem: tuple[int, ...], tape: Tape) -> str:
        top = tape.step("most", zero)
        for i, ends in enumerate(self._ends(problem, tape)):
            top = tape.step(f"most{i}", most, top, ends)
        return str(top.value)

    def rounds(self, problem: tuple[int, ...]) -> tuple[str, ...]:
        ends = [str(c.value) for c in self._ends(problem, Tape())]
        return tuple(" ".join(ends[: i + self.block]) for i in range(0, len(ends), self.block))

    def _ends(self, problem: tuple[int, ...], tape: Tape) -> list[Cell]:
        """Lengths of the longest increasing subsequences that end at each place."""
        numbers, lengths = tape.row("x", problem), []
        for i, x in enumerate(numbers):
            ends = tape.step(f"e{i}", one)
            for j in range(i):
                ends = tape.step(f"e{i}_{j}", longer, numbers[j], x, lengths[j], ends)
            lengths.append(ends)
        return lengths


def aligned(task: Any) -> bool:
    """Whether a task's rounds are RELAY's own, not merely the levels of its DAG."""
    return type(task).rounds is not Task.rounds
