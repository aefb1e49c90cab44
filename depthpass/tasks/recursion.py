"""TAIL, recursion: finding a substring, derangements (arXiv 2507.13332). How a problem reads is ours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.simulation import TAIL
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task


def agree(text: str, pattern: str, further: int) -> int:
    """A place fits if its letter does and the rest fits behind it."""
    return int(text == pattern and further == 1)


def always() -> int:
    return 1


def first(here: int, place: int, later: int) -> int:
    return place if here else later


def none() -> int:
    return -1


@dataclass(frozen=True)
class AnySubstring(Task):
    """First place at which a pattern of two or three letters stands in a text of n letters, -1 if it stands nowhere.

    fits(i, j) = text[i + j] == pattern[j] and fits(i, j + 1);  find(i) = i if fits(i, 0) else find(i + 1).
    """

    name: ClassVar[str] = "any_substring"
    family: ClassVar[str] = "recursion"
    unit: ClassVar[str] = "letters of the text"
    ranges: ClassVar[dict] = {"S": (3, 5), "M": (6, 9), "L": (10, 14)}
    least: ClassVar[int] = 3
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        text = "".join(rng.choices("abc", k=length))
        size = rng.randint(2, 3)
        at = rng.randint(0, length - size)
        return text, text[at : at + size] if rng.random() < 0.6 else "".join(rng.choices("abc", k=size))

    def show(self, problem: tuple[str, str]) -> str:
        return "find {1} in {0}".format(*problem)

    def parse(self, prompt: str) -> tuple[str, str]:
        find, pattern, where, text = prompt.split()
        if (find, where) != ("find", "in") or len(pattern) > len(text):
            raise ValueError(prompt)
        return text, pattern

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        text, pattern = tape.row("t", problem[0]), tape.row("p", problem[1])
        places, end = tape.row("i", range(len(text))), tape.step("true", always)
        here: list[Cell] = []
        for i in range(len(text) - len(pattern) + 1):
            fits = end
            for j in reversed(range(len(pattern))):
                fits = tape.step(f"fits{i}_{j}", agree, text[i + j], pattern[j], fits)
            here.append(fits)
        place = tape.step("find", none)
        for i in reversed(range(len(here))):
            place = tape.step(f"find{i}", first, here[i], places[i], place)
        return str(place.value)


def combine(i: int, modulus: int, last: int, before: int) -> int:
    return (i - 1) * (last + before) % modulus


def one(modulus: int) -> int:
    return 1 % modulus


def zero() -> int:
    return 0


@dataclass(frozen=True)
class Derangement(Task):
    """Derangements of n things, D(n) = (n - 1)(D(n - 1) + D(n - 2)), modulo m (which bounds the state of a step)."""

    name: ClassVar[str] = "derangement"
    family: ClassVar[str] = "recursion"
    unit: ClassVar[str] = "things"
    ranges: ClassVar[dict] = {"S": (3, 30), "M": (31, 60), "L": (61, 100)}
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> tuple[int, int]:
        return length, rng.randint(10, 999)

    def show(self, problem: tuple[int, int]) -> str:
        return "derangements {} mod {}".format(*problem)

    def parse(self, prompt: str) -> tuple[int, int]:
        word, n, mod, m = prompt.split()
        if (word, mod) != ("derangements", "mod") or int(n) < 0 or int(m) < 1:
            raise ValueError(prompt)
        return int(n), int(m)

    def run(self, problem: tuple[int, int], tape: Tape) -> str:
        n, modulus = problem[0], tape.read("m", problem[1])
        values = [tape.step("D0", one, modulus), tape.step("D1", zero)]
        for i in range(2, n + 1):
            values.append(tape.step(f"D{i}", combine, tape.read(f"i{i}", i), modulus, values[-1], values[-2]))
        return str(values[n].value)
