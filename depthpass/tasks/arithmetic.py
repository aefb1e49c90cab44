"""The field's arithmetic: addition and multiplication (plain and reversed), trees of additions and products, prefix sums."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import ClassVar

from depthpass.errors import InputError
from depthpass.tasks.dags import TaskDAG
from depthpass.tasks.tape import Cell, Tape
from depthpass.tasks.task import Task


def number(digits: int, rng: random.Random) -> str:
    """A number of so many digits, the first not 0."""
    return str(rng.randint(1, 9)) + "".join(str(rng.randrange(10)) for _ in range(digits - 1))


def digits_of(text: str) -> str:
    """The text, if it is a number.

    Raises:
        ValueError: it is not.
    """
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"expected digits, got {text!r}")
    return text


def unit(a: int, b: int, carry: int) -> int:
    return (a + b + carry) % 10


def carry(a: int, b: int, carry: int) -> int:
    return (a + b + carry) // 10


def zero() -> int:
    return 0


def add_on_tape(tape: Tape, a: list[Cell], b: list[Cell], name: str = "") -> list[Cell]:
    """Sum of two numbers given from the lowest digit on: its digits, lowest first, one more than the longer number's."""
    nothing, last, digits = tape.step(f"{name}c", zero), None, []
    last = nothing
    for i in range(max(len(a), len(b))):
        pair = [x[i] if i < len(x) else nothing for x in (a, b)]
        digits.append(tape.step(f"{name}s{i}", unit, *pair, last))
        last = tape.step(f"{name}c{i}", carry, *pair, last)
    return [*digits, last]


def _words(problem: tuple[str, str], sign: str, reverse: bool) -> str:
    a, b = (x[::-1] if reverse else x for x in problem)
    return f"{a}{sign}{b}="


def _parsed(prompt: str, sign: str, reverse: bool) -> tuple[str, str]:
    if not prompt.endswith("="):
        raise ValueError(prompt)
    a, b = map(digits_of, prompt[:-1].split(sign))
    return (a[::-1], b[::-1]) if reverse else (a, b)


@dataclass(frozen=True)
class Addition(Task):
    """``12+99=111``: two numbers of up to n digits; ``reverse`` writes all three from the lowest digit on (``21+99=111``).

    Args:
        reverse: lowest digit first.
    """

    name: ClassVar[str] = "addition"
    family: ClassVar[str] = "arithmetic"
    unit: ClassVar[str] = "digits of the longer number"
    ranges: ClassVar[dict] = {"S": (1, 10), "M": (11, 20), "L": (21, 40)}

    reverse: bool = False

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        pair = [number(length, rng), number(rng.randint(1, length), rng)]
        rng.shuffle(pair)
        return pair[0], pair[1]

    def show(self, problem: tuple[str, str]) -> str:
        return _words(problem, "+", self.reverse)

    def parse(self, prompt: str) -> tuple[str, str]:
        return _parsed(prompt, "+", self.reverse)

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        a, b = (tape.row(name, map(int, reversed(x))) for name, x in zip("ab", problem))
        plain = "".join(str(c.value) for c in reversed(add_on_tape(tape, a, b))).lstrip("0") or "0"
        return plain[::-1] if self.reverse else plain


def low(a: int, b: int, carry: int) -> int:
    return (a * b + carry) % 10


def high(a: int, b: int, carry: int) -> int:
    return (a * b + carry) // 10


@dataclass(frozen=True)
class Multiplication(Task):
    """``12*34=408`` by schoolbook: one shifted row per digit of the second number, added up one after another.

    Args:
        reverse: lowest digit first, in numbers and product.
    """

    name: ClassVar[str] = "multiplication"
    family: ClassVar[str] = "arithmetic"
    unit: ClassVar[str] = "digits of each number"
    ranges: ClassVar[dict] = {"S": (1, 4), "M": (5, 7), "L": (8, 12)}

    reverse: bool = False

    def draw(self, length: int, rng: random.Random) -> tuple[str, str]:
        return number(length, rng), number(length, rng)

    def show(self, problem: tuple[str, str]) -> str:
        return _words(problem, "*", self.reverse)

    def parse(self, prompt: str) -> tuple[str, str]:
        return _parsed(prompt, "*", self.reverse)

    def run(self, problem: tuple[str, str], tape: Tape) -> str:
        a, b = (tape.row(name, map(int, reversed(x))) for name, x in zip("ab", problem))
        total: list[Cell] = []
        for j, digit in enumerate(b):
            row, last = [], tape.step(f"m{j}c", zero)
            for i, x in enumerate(a):
                row.append(tape.step(f"m{j}_{i}", low, x, digit, last))
                last = tape.step(f"m{j}c{i}", high, x, digit, last)
            row.append(last)
            # The lowest j digits are final: what is added reaches from digit j on.
            total = total[:j] + add_on_tape(tape, total[j:], row, f"t{j}") if j else row
        plain = "".join(str(c.value) for c in reversed(total)).lstrip("0") or "0"
        return plain[::-1] if self.reverse else plain


def add(modulus: int, *values: int) -> int:
    return sum(values) % modulus


def multiply(modulus: int, a: int, b: int) -> int:
    return a * b % modulus


def negate(modulus: int, value: int) -> int:
    return -value % modulus


def residue(modulus: int, value: int) -> int:
    return value % modulus


Tree = tuple[str, "int | tuple[str, tuple]"]
"""(sign, number) or (sign, (operator, subtrees))."""


def _read_tree(text: str) -> Tree:
    """Recursive descent over ``-(3 + -5 + (2 * 7))``."""
    tokens = text.replace("(", " ( ").replace(")", " ) ").replace("-", " - ").split()
    tree, end = _subtree(tokens, 0)
    if end != len(tokens):
        raise ValueError(f"unexpected {' '.join(tokens[end:])!r}")
    return tree


def _subtree(tokens: list[str], at: int) -> tuple[Tree, int]:
    sign = ""
    if tokens[at] == "-":
        sign, at = "-", at + 1
    if tokens[at] != "(":
        return (sign, int(digits_of(tokens[at]))), at + 1
    first, at = _subtree(tokens, at + 1)
    children, operator = [first], tokens[at]
    while tokens[at] == operator and operator in "+*":
        child, at = _subtree(tokens, at + 1)
        children.append(child)
    if tokens[at] != ")":
        raise ValueError(f"expected ')', got {tokens[at]!r}")
    return (sign, (operator, tuple(children))), at + 1


def _tree_text(tree: Tree) -> str:
    sign, inside = tree
    if isinstance(inside, int):
        return f"{sign}{inside}"
    operator, children = inside
    return f"{sign}({f' {operator} '.join(map(_tree_text, children))})"


@dataclass(frozen=True)
class ModularTree(Task):
    """Value of a random signed tree of n nodes modulo 10, as TurboConn's arithmetic task (arXiv 2602.17993).

    A uniform labelled tree (from a Pruefer code) is rooted at node 0; every node carries a number from 1 to 9, a sign and an
    operator; an inner node is the sum or product of its children and its own number, in random order, worked out left to right.

    Args:
        modulus: values are taken modulo this.
    """

    name: ClassVar[str] = "modular_tree"
    family: ClassVar[str] = "arithmetic"
    unit: ClassVar[str] = "nodes"
    ranges: ClassVar[dict] = {"S": (1, 10), "M": (11, 20), "L": (21, 30)}
    source: ClassVar[str] = "arXiv 2602.17993"

    modulus: int = 10

    def __post_init__(self) -> None:
        _at_least(self.name, "modulus", self.modulus, 2)

    def draw(self, length: int, rng: random.Random) -> Tree:
        near: list[list[int]] = [[] for _ in range(length)]
        for a, b in _random_tree(length, rng):
            near[a].append(b)
            near[b].append(a)

        def build(node: int, parent: int | None) -> Tree:
            sign, own = rng.choice(["", "-"]), rng.randint(1, 9)
            parts: list[Tree] = [build(child, node) for child in near[node] if child != parent]
            if not parts:
                return sign, own
            parts.append(("", own))
            rng.shuffle(parts)
            return sign, (rng.choice("+*"), tuple(parts))

        return build(0, None)

    def show(self, problem: Tree) -> str:
        return f"{_tree_text(problem)} mod {self.modulus} ="

    def parse(self, prompt: str) -> Tree:
        text, mod, rest = prompt.partition(" mod ")
        if not mod or rest.split() != [str(self.modulus), "="]:
            raise ValueError(f"expected '... mod {self.modulus} =', got {prompt!r}")
        return _read_tree(text)

    def run(self, problem: Tree, tape: Tape) -> str:
        modulus = tape.read("m", self.modulus)

        def value(tree: Tree, name: str) -> Cell:
            sign, inside = tree
            if isinstance(inside, int):
                result = tape.step(name, residue, modulus, tape.read(f"x{name[1:]}", inside))
            else:
                operator, children = inside
                result, *others = [value(child, f"{name}_{i}") for i, child in enumerate(children)]
                for i, other in enumerate(others):
                    result = tape.step(f"{name}{'abcdefghij'[i % 10] * (i // 10 + 1)}", add if operator == "+" else multiply,
                                       modulus, result, other)
            return tape.step(name + "s", negate, modulus, result) if sign else result

        return str(value(problem, "v").value)


def _random_tree(nodes: int, rng: random.Random) -> list[tuple[int, int]]:
    """Edges of a uniformly drawn labelled tree, decoded from a Pruefer code."""
    if nodes == 1:
        return []
    code = [rng.randrange(nodes) for _ in range(nodes - 2)]
    missing = [code.count(v) for v in range(nodes)]
    leaves = [v for v in range(nodes) if not missing[v]]
    heapq.heapify(leaves)
    edges = []
    for v in code:
        edges.append((heapq.heappop(leaves), v))
        missing[v] -= 1
        if not missing[v]:
            heapq.heappush(leaves, v)
    return [*edges, (heapq.heappop(leaves), heapq.heappop(leaves))]


@dataclass(frozen=True)
class PrefixSums(Task):
    """All prefix sums of n numbers modulo m, left to right; the DAG of a prefix sum tree is logarithmic (``form="tree"``).

    Args:
        modulus: sums are taken modulo this; numbers are below it.
    """

    name: ClassVar[str] = "prefix_sums"
    family: ClassVar[str] = "arithmetic"
    unit: ClassVar[str] = "numbers"
    ranges: ClassVar[dict] = {"S": (4, 20), "M": (21, 40), "L": (41, 80)}

    modulus: int = 10

    def __post_init__(self) -> None:
        _at_least(self.name, "modulus", self.modulus, 2)

    def draw(self, length: int, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randrange(self.modulus) for _ in range(length))

    def show(self, problem: tuple[int, ...]) -> str:
        return f"sums mod {self.modulus}: " + " ".join(map(str, problem))

    def parse(self, prompt: str) -> tuple[int, ...]:
        head, colon, numbers = prompt.partition(":")
        if not colon or head != f"sums mod {self.modulus}" or not numbers.split():
            raise ValueError(f"expected 'sums mod {self.modulus}: ...', got {prompt!r}")
        return tuple(map(int, numbers.split()))

    def run(self, problem: tuple[int, ...], tape: Tape) -> str:
        modulus, sums = tape.read("m", self.modulus), []
        for i, x in enumerate(tape.row("x", problem)):
            sums.append(tape.step(f"s{i}", add, modulus, *sums[-1:], x))
        return " ".join(str(c.value) for c in sums)

    def shape(self, n: int, form: str = "chain") -> TaskDAG:
        """Left to right, or by doubling strides (Hillis and Steele): depth ceil(log2 n)."""
        from depthpass.tasks.shapes import prefix_scan

        return prefix_scan(n, form)


def _at_least(task: str, option: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"task {task!r}: {option}: expected an integer of at least {least}, got {value!r}.")
