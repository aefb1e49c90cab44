"""State tracking: running parity and the word problems of S3, S5 and A5 from a few generators."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.errors import InputError
from depthpass.tasks.dags import TaskDAG
from depthpass.tasks.tape import Tape
from depthpass.tasks.task import Task


def xor(a: int, b: int) -> int:
    return a ^ b


def keep(x):
    return x


@dataclass(frozen=True)
class Parity(Task):
    """Parity of n bits; the trace is the running parity, a label for every bit."""

    name: ClassVar[str] = "parity"
    family: ClassVar[str] = "state tracking"
    unit: ClassVar[str] = "bits"
    ranges: ClassVar[dict] = {"S": (1, 40), "M": (41, 100), "L": (101, 256)}

    def draw(self, length: int, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randrange(2) for _ in range(length))

    def show(self, problem: tuple[int, ...]) -> str:
        return "".join(map(str, problem)) + " ="

    def parse(self, prompt: str) -> tuple[int, ...]:
        bits, mark = prompt.split()
        if mark != "=" or set(bits) - {"0", "1"}:
            raise ValueError(f"expected bits and ' =', got {prompt!r}")
        return tuple(map(int, bits))

    def run(self, problem: tuple[int, ...], tape: Tape) -> str:
        bits = tape.row("b", problem)
        state = tape.step("s0", keep, bits[0])
        for i, bit in enumerate(bits[1:], 1):
            state = tape.step(f"s{i}", xor, state, bit)
        return str(state.value)

    def shape(self, n: int, form: str = "tree") -> TaskDAG:
        """As a tree of exclusive ors or as a scan."""
        from depthpass.tasks.shapes import parity

        return parity(n, form)


Permutation = tuple[int, ...]


def then(a: Permutation, b: Permutation) -> Permutation:
    """First a, then b."""
    return tuple(b[i] for i in a)


@dataclass(frozen=True)
class WordProblem(Task):
    """Product of n generators of a permutation group, the first one applied first.

    Permutations are written in one line: ``1023`` sends 0 to 1, 1 to 0, 2 to 2, 3 to 3. The prompt defines the generators,
    then gives the word: ``a=10234 b=12340 : abba``.
    """

    family: ClassVar[str] = "state tracking"
    unit: ClassVar[str] = "generators in the word"
    ranges: ClassVar[dict] = {"S": (1, 32), "M": (33, 64), "L": (65, 256)}

    generators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        things = {"".join(sorted(g)) for g in self.generators}
        if not 1 <= len(self.generators) <= 26 or things != {"0123456789"[: len(self.generators[0])]}:
            raise InputError(f"task {self.name!r}: generators: expected permutations in one line such as '10234', all of the "
                             f"same things, got {self.generators!r}.")

    def draw(self, length: int, rng: random.Random) -> str:
        return "".join(rng.choices(self._letters, k=length))

    def show(self, problem: str) -> str:
        return f"{self._head} : {problem}"

    def parse(self, prompt: str) -> str:
        head, _, word = prompt.partition(" : ")
        if head != self._head or not word or set(word) - set(self._letters):
            raise ValueError(f"expected '{self._head} : ' and a word over {self._letters}, got {prompt!r}")
        return word

    @property
    def _letters(self) -> str:
        return "abcdefghijklmnopqrstuvwxyz"[: len(self.generators)]

    @property
    def _head(self) -> str:
        return " ".join(f"{x}={g}" for x, g in zip(self._letters, self.generators))

    def run(self, problem: str, tape: Tape) -> str:
        by_letter = {x: tuple(map(int, g)) for x, g in zip(self._letters, self.generators)}
        word = tape.row("g", (by_letter[x] for x in problem))
        state = tape.step("s0", keep, word[0])
        for i, g in enumerate(word[1:], 1):
            state = tape.step(f"s{i}", then, state, g)
        return "".join(map(str, state.value))

    def shape(self, n: int, form: str = "tree") -> TaskDAG:
        """As a balanced product or as a scan."""
        from depthpass.tasks.shapes import word_problem

        return word_problem(self.name, n, form)


@dataclass(frozen=True)
class S3(WordProblem):
    """Word problem of S3, a solvable group: in TC0 (ACC0 even), unlike that of S5."""

    name: ClassVar[str] = "s3_word_problem"

    generators: tuple[str, ...] = ("102", "120")


@dataclass(frozen=True)
class S5(WordProblem):
    """Word problem of S5 from a transposition and a cycle; complete for NC1."""

    name: ClassVar[str] = "s5_word_problem"

    generators: tuple[str, ...] = ("10234", "12340")


@dataclass(frozen=True)
class A5(WordProblem):
    """Word problem of A5, the smallest group that is not solvable, from a 3-cycle and a 5-cycle; complete for NC1."""

    name: ClassVar[str] = "a5_word_problem"

    generators: tuple[str, ...] = ("12034", "12340")
