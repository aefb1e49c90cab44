"""TAIL, enumeration: counting letters, a Diophantine equation, searching a prime (arXiv 2507.13332). Readings are ours."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.simulation import TAIL
from depthpass.tasks.tape import Tape
from depthpass.tasks.task import Task


def zero() -> int:
    return 0


def count(before: int, letter: str, asked: str) -> int:
    return before + (letter == asked)


@dataclass(frozen=True)
class CountLetters(Task):
    """How often a letter stands in a word of n letters."""

    name: ClassVar[str] = "count_letters"
    family: ClassVar[str] = "enumeration"
    unit: ClassVar[str] = "letters"
    ranges: ClassVar[dict] = {"S": (2, 6), "M": (7, 10), "L": (11, 20)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz", min(length + 1, 5))
        return rng.choice(letters), "".join(rng.choices(letters, k=length))

    def show(self, problem: tuple[str, str]) -> str:
        return "count {} in {}".format(*problem)

    def parse(self, prompt: str) -> tuple[str, str]:
        word, letter, where, text = prompt.split()
        if (word, where) != ("count", "in") or len(letter) != 1:
            raise ValueError(prompt)
        return letter, text

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        asked, total = tape.read("x", problem[0]), tape.step("c", zero)
        for i, letter in enumerate(tape.row("w", problem[1])):
            total = tape.step(f"c{i}", count, total, letter, asked)
        return str(total.value)


def minus(rest: int, a: int) -> int:
    return rest - a


def divides(before: int, rest: int, b: int) -> int:
    return before + (rest % b == 0)


def keep(x):
    return x


@dataclass(frozen=True)
class Diophantine(Task):
    """Solutions x, y >= 0 of a x + b y = n, counted by trying every x."""

    name: ClassVar[str] = "diophantine"
    family: ClassVar[str] = "enumeration"
    unit: ClassVar[str] = "right-hand side"
    ranges: ClassVar[dict] = {"S": (10, 50), "M": (51, 100), "L": (101, 200)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, int, int]:
        return rng.randint(2, 9), rng.randint(2, 9), length

    def show(self, problem: tuple[int, int, int]) -> str:
        return "solutions of {}x + {}y = {}".format(*problem)

    def parse(self, prompt: str) -> tuple[int, int, int]:
        words = prompt.split()
        a, plus, b, equal, c = words[2:]
        fixed = (*words[:2], plus, equal, a[-1], b[-1])
        if fixed != ("solutions", "of", "+", "=", "x", "y") or min(int(a[:-1]), int(b[:-1])) < 1:
            raise ValueError(prompt)
        return int(a[:-1]), int(b[:-1]), int(c)

    def run(self, problem: tuple[int, int, int], tape: Tape) -> str:
        a, b, c = (tape.read(k, v) for k, v in zip("abc", problem))
        rest = tape.step("r0", keep, c)
        total = tape.step("n0", divides, tape.step("n", zero), rest, b)
        for x in range(1, problem[2] // problem[0] + 1):
            rest = tape.step(f"r{x}", minus, rest, a)
            total = tape.step(f"n{x}", divides, total, rest, b)
        return str(total.value)


def next_number(before: int, has_divisor: int) -> int:
    """The next candidate, once the one before has a divisor."""
    return before + 1 if has_divisor else before


def divisor(candidate: int, d: int, before: int) -> int:
    return int(before or (candidate % d == 0 and candidate != d))


def at_most_one(candidate: int) -> int:
    return int(candidate < 2)


@dataclass(frozen=True)
class PrimeSearch(Task):
    """Smallest prime that is at least n, by trial division with every d up to the root of a candidate."""

    name: ClassVar[str] = "prime_search"
    family: ClassVar[str] = "enumeration"
    unit: ClassVar[str] = "start of the search"
    ranges: ClassVar[dict] = {"S": (5, 100), "M": (101, 200), "L": (201, 300)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> int:
        return length

    def show(self, problem: int) -> str:
        return f"prime from {problem}"

    def parse(self, prompt: str) -> int:
        word, start, n = prompt.split()
        if (word, start) != ("prime", "from") or int(n) < 0:
            raise ValueError(prompt)
        return int(n)

    def run(self, problem: int, tape: Tape) -> str:
        candidate, divisors = tape.step("k0", keep, tape.read("n", problem)), {}
        for turn in range(problem + 3):  # there is a prime below 2 n
            divided = tape.step(f"f{turn}", at_most_one, candidate)
            for d in range(2, math.isqrt(int(candidate.value)) + 1):
                if d not in divisors:
                    divisors[d] = tape.read(f"d{d}", d)
                divided = tape.step(f"f{turn}_{d}", divisor, candidate, divisors[d], divided)
                if divided.value:
                    break
            if not divided.value:
                return str(candidate.value)
            candidate = tape.step(f"k{turn + 1}", next_number, candidate, divided)
        raise AssertionError("no prime found")
