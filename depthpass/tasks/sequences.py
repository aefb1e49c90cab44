"""Sequences: copy, associative recall, p-hop induction, Dyck words."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from depthpass.errors import InputError
from depthpass.limits import INTEGER
from depthpass.tasks.arithmetic import _at_least
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task

LETTERS = string.ascii_lowercase


def keep(x):
    return x


@dataclass(frozen=True)
class Copy(Task):
    """Write a string of n letters again: one fetch per letter.

    Args:
        alphabet: so many letters.
    """

    name: ClassVar[str] = "copy"
    family: ClassVar[str] = "sequences"
    unit: ClassVar[str] = "letters"
    ranges: ClassVar[dict] = {"S": (1, 30), "M": (31, 60), "L": (61, 120)}

    alphabet: int = 26

    def __post_init__(self) -> None:
        _letters(self.name, self.alphabet)

    def draw(self, length: int, rng: random.Random) -> str:
        return "".join(rng.choices(LETTERS[: self.alphabet], k=length))

    def show(self, problem: str) -> str:
        return f"copy {problem}"

    def parse(self, prompt: str) -> str:
        word, text = prompt.split()
        if word != "copy":
            raise ValueError(prompt)
        return text

    def run(self, problem: str, tape: Tape) -> str:
        return "".join(str(tape.step(f"o{i}", keep, x).value) for i, x in enumerate(tape.row("x", problem)))


def match(query: str, key: str, value: int, earlier):
    return value if query == key else earlier


def nothing() -> str:
    return "-"


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Of n pairs of a key and a value (``a3 k7 ... ? k``) the value of one key; keys are distinct.

    Args:
        values: values are numbers below this.
    """

    name: ClassVar[str] = "associative_recall"
    family: ClassVar[str] = "sequences"
    unit: ClassVar[str] = "pairs"
    ranges: ClassVar[dict] = {"S": (2, 8), "M": (9, 20), "L": (21, 52)}
    most: ClassVar[int] = 52

    values: int = 10

    def __post_init__(self) -> None:
        _at_least(self.name, "values", self.values, 2)

    def draw(self, length: int, rng: random.Random) -> tuple[tuple[tuple[str, int], ...], str]:
        keys = rng.sample(string.ascii_letters, length)
        return tuple((k, rng.randrange(self.values)) for k in keys), rng.choice(keys)

    def show(self, problem: tuple[tuple[tuple[str, int], ...], str]) -> str:
        pairs, query = problem
        return " ".join(f"{k}{v}" for k, v in pairs) + f" ? {query}"

    def parse(self, prompt: str) -> tuple[tuple[tuple[str, int], ...], str]:
        pairs, _, query = prompt.partition(" ? ")
        items = tuple((p[0], int(p[1:])) for p in pairs.split())
        if query not in dict(items):
            raise ValueError(f"{query!r} is not among the keys")
        return items, query

    def run(self, problem: tuple[tuple[tuple[str, int], ...], str], tape: Tape) -> str:
        pairs, query = problem
        asked, value = tape.read("q", query), tape.step("f", nothing)
        for i, (k, v) in enumerate(pairs):
            value = tape.step(f"f{i}", match, asked, tape.read(f"k{i}", k), tape.read(f"v{i}", v), value)
        return str(value.value)


def before(at: int, symbol: str, i: int, other: str, place: int) -> int:
    """Right to left: the first place before ``at`` that holds its symbol, one further."""
    return i + 1 if place < 0 and i < at and other == symbol else place


def at(position: int, symbol: str) -> str:
    return symbol


def none() -> int:
    return -1


@dataclass(frozen=True)
class PHop(Task):
    """p-hop induction (arXiv 2402.09268): from the last symbol, p times to the symbol behind its latest earlier occurrence.

    One hop from place i goes to the largest j <= i with x[j - 1] = x[i] (so that j - 1 < i). A row of n = p * spread symbols
    is drawn again until all p hops exist. The trace looks for each hop right to left; as a DAG of pointer fetches alone the
    depth is p (``form="hops"``), by doubling pointers ceil(log2 p) + 1 (``form="doubling"``).

    Args:
        spread: symbols per hop.
        alphabet: so many letters.
    """

    name: ClassVar[str] = "p_hop"
    family: ClassVar[str] = "sequences"
    unit: ClassVar[str] = "hops"
    ranges: ClassVar[dict] = {"S": (1, 4), "M": (5, 8), "L": (9, 16)}
    source: ClassVar[str] = "arXiv 2402.09268"

    spread: int = 8
    alphabet: int = 4

    def __post_init__(self) -> None:
        _letters(self.name, self.alphabet)
        _at_least(self.name, "spread", self.spread, 3)
        if self.spread > INTEGER:
            raise InputError(f"task {self.name!r}: spread: expected at most {INTEGER} symbols, got {self.spread}.")

    def draw(self, length: int, rng: random.Random) -> tuple[int, str]:
        while True:
            text = "".join(rng.choices(LETTERS[: self.alphabet], k=length * self.spread))
            place = len(text) - 1
            for _ in range(length):
                place = 1 + text.rfind(text[place], 0, place) if place > 0 else 0
                if not place:
                    break
            else:
                return length, text

    def show(self, problem: tuple[int, str]) -> str:
        return "{} hops {}".format(*problem)

    def parse(self, prompt: str) -> tuple[int, str]:
        hops, word, text = prompt.split()
        if word != "hops":
            raise ValueError(prompt)
        return int(hops), text

    def run(self, problem: tuple[int, str], tape: Tape) -> str:
        hops, text = problem
        cells, places = tape.row("x", text), tape.row("i", range(len(text)))
        place: Cell = places[-1]
        symbol = tape.step("h0", at, place, cells[-1])
        for hop in range(1, hops + 1):
            target = tape.step(f"p{hop}", none)
            for i in range(int(place.value) - 1, -1, -1):
                target = tape.step(f"p{hop}_{i}", before, place, symbol, places[i], cells[i], target)
                if int(target.value) >= 0:
                    break
            if int(target.value) < 0:
                raise ValueError(f"there is no hop {hop} in {text}")
            place = target
            symbol = tape.step(f"h{hop}", at, place, cells[int(place.value)])
        return str(symbol.value)

    def shape(self, hops: int, form: str = "hops"):
        """Hop after hop, or by doubling pointers."""
        from depthpass.tasks.shapes import pointer_jumps

        return pointer_jumps(hops, form)


OPEN, CLOSE = "([{<", ")]}>"


def push(stack: str, bracket: str) -> str:
    """Push an opening bracket, pop for the closing one that fits; ``x`` once it does not."""
    if stack == "x":
        return "x"
    if bracket in OPEN:
        return stack + bracket
    return stack[:-1] if stack and OPEN[CLOSE.index(bracket)] == stack[-1] else "x"


def valid(stack: str) -> str:
    return "no" if stack else "yes"


def empty() -> str:
    return ""


@dataclass(frozen=True)
class Dyck(Task):
    """Whether n brackets of k kinds are balanced, with nesting bounded by ``depth``; half of the words are spoilt.

    The state is the stack, of at most ``depth`` brackets.

    Args:
        kinds: kinds of brackets, 1 to 4.
        depth: deepest nesting.
    """

    name: ClassVar[str] = "dyck"
    family: ClassVar[str] = "sequences"
    unit: ClassVar[str] = "pairs of brackets"
    ranges: ClassVar[dict] = {"S": (1, 10), "M": (11, 20), "L": (21, 64)}

    kinds: int = 2
    depth: int = 8

    def __post_init__(self) -> None:
        _at_least(self.name, "kinds", self.kinds, 1)
        _at_least(self.name, "depth", self.depth, 1)
        if self.kinds > len(OPEN):
            raise InputError(f"task 'dyck': kinds: expected at most {len(OPEN)}, got {self.kinds}.")

    def draw(self, length: int, rng: random.Random) -> str:
        word, stack = [], []
        while len(word) < 2 * length:
            left = 2 * length - len(word)
            if not stack or (len(stack) < min(self.depth, left) and rng.random() < 0.5):
                stack.append(rng.randrange(self.kinds))
                word.append(OPEN[stack[-1]])
            else:
                word.append(CLOSE[stack.pop()])
        if rng.random() < 0.5:
            spot = rng.randrange(len(word))
            word[spot] = rng.choice([c for c in OPEN[: self.kinds] + CLOSE[: self.kinds] if c != word[spot]])
        return "".join(word)

    def show(self, problem: str) -> str:
        return f"balanced {problem} ?"

    def parse(self, prompt: str) -> str:
        word, text, mark = prompt.split()
        if (word, mark) != ("balanced", "?") or set(text) - set(OPEN + CLOSE):
            raise ValueError(prompt)
        return text

    def run(self, problem: str, tape: Tape) -> str:
        stack = tape.step("s", empty)
        for i, bracket in enumerate(tape.row("b", problem)):
            stack = tape.step(f"s{i}", push, stack, bracket)
        return str(tape.step("v", valid, stack).value)


def _letters(task: str, alphabet: int) -> None:
    _at_least(task, "alphabet", alphabet, 2)
    if alphabet > 26:
        raise InputError(f"task {task!r}: alphabet: expected at most 26 letters, got {alphabet}.")
