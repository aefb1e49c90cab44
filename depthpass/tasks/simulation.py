"""TAIL, simulation: long addition and division, bubble sort, flipping words, comparing numbers (arXiv 2507.13332).

The paper gives names and sizes; how a problem reads is ours.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.arithmetic import add_on_tape, digits_of, number, zero
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task

TAIL = "arXiv 2507.13332"


@dataclass(frozen=True)
class LargeAdd(Task):
    """Add two numbers of n digits, digit by digit from the right with a carry."""

    name: ClassVar[str] = "large_add"
    family: ClassVar[str] = "simulation"
    unit: ClassVar[str] = "digits"
    ranges: ClassVar[dict] = {"S": (10, 30), "M": (31, 40), "L": (41, 50)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        return number(length, rng), number(length, rng)

    def show(self, problem: tuple[str, str]) -> str:
        return "add {} + {}".format(*problem)

    def parse(self, prompt: str) -> tuple[str, str]:
        word, a, plus, b = prompt.split()
        if (word, plus) != ("add", "+"):
            raise ValueError(prompt)
        return digits_of(a), digits_of(b)

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        a, b = (list(map(int, reversed(x))) for x in problem)
        digits = add_on_tape(tape, tape.row("a", a), tape.row("b", b))
        return "".join(str(c.value) for c in reversed(digits)).lstrip("0") or "0"


def bring(remainder: int, digit: int) -> int:
    return 10 * remainder + digit


def quotient(dividend: int, divisor: int) -> int:
    return dividend // divisor


def rest(dividend: int, divisor: int, digit: int) -> int:
    return dividend - digit * divisor


@dataclass(frozen=True)
class LargeDiv(Task):
    """Divide a number of n digits by one of at most two digits, as long division: quotient and remainder.

    The divisor is bounded so that the state of every step is.
    """

    name: ClassVar[str] = "large_div"
    family: ClassVar[str] = "simulation"
    unit: ClassVar[str] = "digits of the dividend"
    ranges: ClassVar[dict] = {"S": (2, 5), "M": (6, 10), "L": (11, 20)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[str, int]:
        return number(length, rng), rng.randint(2, 99)

    def show(self, problem: tuple[str, int]) -> str:
        return "divide {} by {}".format(*problem)

    def parse(self, prompt: str) -> tuple[str, int]:
        word, a, by, b = prompt.split()
        if (word, by) != ("divide", "by") or int(b) < 1:
            raise ValueError(prompt)
        return digits_of(a), int(b)

    def run(self, problem: tuple[str, int], tape: Tape) -> str:
        digits, divisor = tape.row("a", map(int, problem[0])), tape.read("b", problem[1])
        left, quotients = tape.step("r", zero), []
        for i, digit in enumerate(digits):
            now = tape.step(f"d{i}", bring, left, digit)
            quotients.append(tape.step(f"q{i}", quotient, now, divisor))
            left = tape.step(f"r{i}", rest, now, divisor, quotients[-1])
        return f"{int(''.join(str(q.value) for q in quotients))} rest {left.value}"


def lower(a: int, b: int) -> int:
    return min(a, b)


def upper(a: int, b: int) -> int:
    return max(a, b)


@dataclass(frozen=True)
class BubbleSort(Task):
    """Sort n numbers by n - 1 sweeps of neighbours that swap: n (n - 1) states, two for every comparison."""

    name: ClassVar[str] = "bubble_sort"
    family: ClassVar[str] = "simulation"
    unit: ClassVar[str] = "numbers"
    ranges: ClassVar[dict] = {"S": (2, 4), "M": (5, 6), "L": (7, 8)}
    least: ClassVar[int] = 2
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randrange(100) for _ in range(length))

    def show(self, problem: tuple[int, ...]) -> str:
        return "sort " + " ".join(map(str, problem))

    def parse(self, prompt: str) -> tuple[int, ...]:
        word, *numbers = prompt.split()
        if word != "sort" or len(numbers) < 2:
            raise ValueError(prompt)
        return tuple(map(int, numbers))

    def run(self, problem: tuple[int, ...], tape: Tape) -> str:
        now = tape.row("a", problem)
        for sweep in range(len(now) - 1):
            for i in range(len(now) - 1 - sweep):
                pair = now[i : i + 2]
                now[i] = tape.step(f"s{sweep}_{i}l", lower, *pair)
                now[i + 1] = tape.step(f"s{sweep}_{i}u", upper, *pair)
        return " ".join(str(c.value) for c in now)


def copy(x):
    return x


@dataclass(frozen=True)
class WordFlip(Task):
    """Write n words in the opposite order: every output word is one fetch, so the DAG has depth 1."""

    name: ClassVar[str] = "word_flip"
    family: ClassVar[str] = "simulation"
    unit: ClassVar[str] = "words"
    ranges: ClassVar[dict] = {"S": (10, 20), "M": (21, 50), "L": (51, 100)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[str, ...]:
        return tuple("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 5))) for _ in range(length))

    def show(self, problem: tuple[str, ...]) -> str:
        return "flip " + " ".join(problem)

    def parse(self, prompt: str) -> tuple[str, ...]:
        word, *words = prompt.split()
        if word != "flip" or not words:
            raise ValueError(prompt)
        return tuple(words)

    def run(self, problem: tuple[str, ...], tape: Tape) -> str:
        words = tape.row("w", problem)
        return " ".join(str(tape.step(f"o{i}", copy, w).value) for i, w in enumerate(reversed(words)))


def sign(before: str, a: int, b: int) -> str:
    return before if before != "=" else "<" if a < b else ">" if a > b else "="


def same() -> str:
    return "="


@dataclass(frozen=True)
class CompareNumbers(Task):
    """Compare two decimal numbers of up to n digits, from the most significant digit on; a missing digit counts as 0.

    They agree up to a random digit, and their fractions need not be of one length.
    """

    name: ClassVar[str] = "compare_numbers"
    family: ClassVar[str] = "simulation"
    unit: ClassVar[str] = "digits"
    ranges: ClassVar[dict] = {"S": (5, 10), "M": (11, 20), "L": (21, 50)}
    least: ClassVar[int] = 2
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        whole = rng.randint(1, length - 1)
        a, same_for = number(length, rng), rng.randint(0, length)
        b = a[:same_for] + "".join(rng.choices(string.digits, k=length - same_for))
        b = (b if b[0] != "0" else "1" + b[1:])[: rng.randint(whole + 1, length)]
        pair = [f"{x[:whole]}.{x[whole:]}" for x in (a, b)]
        rng.shuffle(pair)
        return pair[0], pair[1]

    def show(self, problem: tuple[str, str]) -> str:
        return "compare {} ? {}".format(*problem)

    def parse(self, prompt: str) -> tuple[str, str]:
        word, a, mark, b = prompt.split()
        if (word, mark) != ("compare", "?") or not all(digits_of(x.replace(".", "", 1)) for x in (a, b)):
            raise ValueError(prompt)
        return a, b

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        parts = [x.partition(".")[::2] for x in problem]
        whole, after = (max(len(p[i]) for p in parts) for i in (0, 1))
        a, b = (tape.row(name, map(int, p[0].rjust(whole, "0") + p[1].ljust(after, "0"))) for name, p in zip("ab", parts))
        order: Cell = tape.step("c", same)
        for i, pair in enumerate(zip(a, b)):
            order = tape.step(f"c{i}", sign, order, *pair)
        return str(order.value)
