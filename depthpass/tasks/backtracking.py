"""TAIL, backtracking: permutations of letters that are palindromes (arXiv 2507.13332). How a problem reads is ours."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from depthpass.tasks.simulation import TAIL
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task


def root() -> str:
    return ""


def put(prefix: str, letter: str) -> str:
    return prefix + letter


def mirror(prefix: str, middle: str) -> str:
    return prefix + middle.strip("-") + prefix[::-1]


@dataclass(frozen=True)
class PalindromePermutations(Task):
    """All distinct palindromes that n letters can be ordered to, in alphabetical order; at least one exists.

    The search chooses the first half letter by letter and goes back when no letter is left: a state per prefix, a leaf per
    palindrome.
    """

    name: ClassVar[str] = "palindrome_permutations"
    family: ClassVar[str] = "backtracking"
    unit: ClassVar[str] = "letters"
    ranges: ClassVar[dict] = {"S": (2, 4), "M": (5, 6), "L": (7, 8)}
    most: ClassVar[int] = 10
    source: ClassVar[str] = TAIL

    def draw(self, length: int, rng: random.Random) -> str:
        half = rng.choices("abcd", k=length // 2)
        letters = half + half + rng.choices("abcd", k=length % 2)
        rng.shuffle(letters)
        return "".join(letters)

    def show(self, problem: str) -> str:
        return f"palindromes of {problem}"

    def parse(self, prompt: str) -> str:
        word, of, letters = prompt.split()
        odd = sum(n % 2 for n in Counter(letters).values())
        if (word, of) != ("palindromes", "of") or odd != len(letters) % 2:
            raise ValueError(f"expected letters with a palindrome, got {prompt!r}")
        return letters

    def run(self, problem: str, tape: Tape) -> str:
        counts = Counter(problem)
        letters = {x: tape.read(f"x{x}", x) for x in sorted(counts)}
        middle = tape.read("mid", next((x for x, n in counts.items() if n % 2), "-"))
        left, leaves = Counter({x: n // 2 for x, n in counts.items()}), []

        def search(prefix: Cell) -> None:
            if not +left:
                leaves.append(tape.step(f"leaf{len(leaves)}", mirror, prefix, middle))
                return
            for x in sorted(+left):
                left[x] -= 1
                search(tape.step(f"p_{prefix.value}{x}", put, prefix, letters[x]))
                left[x] += 1

        search(tape.step("p_", root))
        return " ".join(str(c.value) for c in leaves)
