"""Problems drawn as tensors: token ids, and a label for every token that has one.

``draw(rows, length, generator)`` gives ``ids`` and ``labels``, ``[rows, length]`` each; label i is what the model should say at
token i, -100 where nothing is asked. A row of n tokens with a label at each holds all shorter problems too. The tests hold every
problem against the task of the same name in :mod:`depthpass.tasks`, which works answers out one instance at a time.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

IGNORED = -100


class Problem(Protocol):
    """What is trained on and measured."""

    @property
    def vocabulary(self) -> int: ...

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Parity:
    """A start token, then bits; the label of a token is the parity of all bits up to it, or of the last ``last``.

    Without the start token a model whose tokens see themselves and the one before cannot tell the first bit from two equal ones.
    """

    last: int | None = None
    vocabulary: int = 3

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (rows, length), generator=generator)
        bits[:, 0] = 0
        total = bits.cumsum(-1)
        if self.last is not None and self.last < length:
            total = total - torch.nn.functional.pad(total, (self.last, 0))[:, :length]
        ids = bits.clone()
        ids[:, 0] = self.vocabulary - 1
        return ids, total % 2


@dataclass(frozen=True)
class Words:
    """The word problem of a permutation group: a start token, then generators; labels are their products so far, first one first.

    Args:
        generators: permutations in one line, as ``("102", "120")`` for S3; they are the tokens.
        last: product of the last so many only.
    """

    generators: tuple[str, ...]
    last: int | None = None
    elements: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        elements = {tuple(range(len(self.generators[0])))}
        steps = [tuple(map(int, g)) for g in self.generators]
        while more := {tuple(e[i] for i in g) for e in elements for g in steps} - elements:
            elements |= more
        object.__setattr__(self, "elements", tuple(sorted(elements)))

    @property
    def vocabulary(self) -> int:
        return max(len(self.elements), len(self.generators) + 1)

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        number = {e: i for i, e in enumerate(self.elements)}
        steps = [tuple(map(int, g)) for g in self.generators]
        # As depthpass.tasks: first e, then g. The identity sorts first.
        table = torch.tensor([[number[tuple(g[i] for i in e)] for g in steps] for e in self.elements])
        ids = torch.randint(len(steps), (rows, length), generator=generator)
        labels = torch.zeros_like(ids)
        for i in range(1, length):
            first = 1 if self.last is None else max(1, i + 1 - self.last)
            state, todo = (labels[:, i - 1], (i,)) if self.last is None else (labels[:, 0], range(first, i + 1))
            for j in todo:
                state = table[state, ids[:, j]]
            labels[:, i] = state
        ids[:, 0] = len(steps)
        return ids, labels


@dataclass(frozen=True)
class PHop:
    """p-hop induction (arXiv 2402.09268): p times from a token to the one behind its latest earlier occurrence.

    A label stands at every token all of whose hops exist.

    Args:
        hops: p.
        alphabet: symbols.
    """

    hops: int
    alphabet: int = 4

    @property
    def vocabulary(self) -> int:
        return self.alphabet

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        ids = torch.randint(self.alphabet, (rows, length), generator=generator)
        return ids, hop_labels(ids, self.hops)


def hop_labels(ids: Tensor, hops: int) -> Tensor:
    """Where p hops lead from every token, -100 where they do not exist; ``[rows, length]``."""
    length = ids.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril(-1)
    same = (ids[:, :, None] == ids[:, None, :]) & before  # [rows, i, j]: j < i and equal
    places = torch.arange(length)
    latest = torch.where(same, places, -1).amax(-1)  # -1: there is none
    jump = torch.where(latest < 0, -1, latest + 1)
    at = places.expand_as(ids)
    for _ in range(hops):
        at = torch.where(at < 0, -1, jump.gather(1, at.clamp(min=0)))
    return torch.where(at < 0, IGNORED, ids.gather(1, at.clamp(min=0)))


@dataclass(frozen=True)
class Addition:
    """A start token, then two numbers, least digits first: a token is a pair of digits, its label the digit of the sum.

    Without the start token a model that attends to equal tokens alone cannot tell 1 + 1 from 11 + 11 in base 2.
    """

    base: int = 2

    @property
    def vocabulary(self) -> int:
        return self.base**2 + 1

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        pairs = torch.randint(self.base, (rows, length, 2), generator=generator)
        pairs[:, 0] = 0
        labels, carry = torch.empty(rows, length, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for i in range(length):
            total = pairs[:, i].sum(-1) + carry
            labels[:, i], carry = total % self.base, total // self.base
        ids = pairs[..., 0] * self.base + pairs[..., 1]
        ids[:, 0] = self.base**2
        return ids, labels


@dataclass(frozen=True)
class Formula:
    """A chain of sums and products modulo ``modulus``, worked out left to right: a start token, then operators with a digit each.

    A label is the value so far, from 0 on: TurboConn's arithmetic on a tree that is a path. Digits begin at 1, as there: a factor
    of 0 would make what came before it forgotten.

    Args:
        last: the value after the last so many tokens alone.
    """

    modulus: int = 5
    last: int | None = None

    @property
    def vocabulary(self) -> int:
        return 2 * self.modulus + 1

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        digits = torch.randint(1, self.modulus, (rows, length), generator=generator)
        times = torch.randint(2, (rows, length), generator=generator)
        ids = times * self.modulus + digits
        ids[:, 0] = 2 * self.modulus
        labels = torch.zeros_like(digits)
        for i in range(1, length):
            first = i if self.last is None else max(1, i + 1 - self.last)
            value = labels[:, i - 1] if self.last is None else labels[:, 0]
            for j in range(first, i + 1):
                value = torch.where(times[:, j] == 1, value * digits[:, j], value + digits[:, j]) % self.modulus
            labels[:, i] = value
        return ids, labels


@dataclass(frozen=True)
class Trees:
    """TurboConn's random signed trees (``modular_tree`` of :mod:`depthpass.tasks`) as code for a machine with few registers.

    As a compiler orders it, the largest operand of a node comes first, so that few results wait at a time: at most ``registers``,
    a to ..; other trees are drawn again. ``a2`` loads a number; ``+2`` and ``*2`` join one to the value so far, ``+b`` and ``*b``
    what stands in b to what stood in a before b was loaded; ``-`` changes a sign. So ``-((2*-3)+(1+4))`` modulo 5 is
    ``a2 *2 b1 +4 +b -``. The label of a token is the value so far, at the last one the tree's. A row has about as many nodes as
    fit, behind start tokens. Numbers are 1 to ``modulus`` - 1: a factor of 0 would make what came before it forgotten.
    """

    modulus: int = 3
    registers: int = 5

    @property
    def symbols(self) -> tuple[str, ...]:
        digits, letters = [str(d) for d in range(1, self.modulus)], LETTERS[: self.registers]
        loads = [r + d for r in letters for d in digits]
        return ("^", "-", *loads, *(o + x for o in "+*" for x in (*digits, *letters[1:])))

    @property
    def vocabulary(self) -> int:
        return len(self.symbols)

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        from depthpass import tasks

        task, number = tasks.get("modular_tree"), {symbol: i for i, symbol in enumerate(self.symbols)}
        rng = random.Random(int(torch.randint(1 << 40, (), generator=generator)))
        ids, labels = torch.zeros(rows, length, dtype=torch.long), torch.full((rows, length), IGNORED)
        row, nodes = 0, max(1, round(0.62 * length))  # a node takes one and a half tokens
        while row < rows:
            symbols = code(task.draw(nodes, rng), self.modulus)
            if len(symbols) >= length or not number.keys() >= set(symbols):
                continue
            first = length - len(symbols)
            ids[row, first:] = torch.tensor([number[x] for x in symbols])
            labels[row, first:] = torch.tensor(values(symbols, self.modulus))
            row += 1
        return ids, labels


LETTERS = "abcdefghij"


def code(tree: Any, modulus: int) -> list[str]:
    """Symbols of a tree of ``modular_tree``, whose value comes to stand in register a."""
    sign, inside = tree
    if isinstance(inside, int):
        digit = 1 + (inside - 1) % (modulus - 1)
        return [f"a{-digit % modulus if sign else digit}"]
    operator, children = inside
    symbols, *others = sorted((code(child, modulus) for child in children), key=len, reverse=True)
    for other in others:
        symbols += [operator + other[0][1:]] if len(other) == 1 else [*map(_shifted, other), f"{operator}b"]
    return [*symbols, "-"] if sign else symbols


def _shifted(symbol: str) -> str:
    """The same in the next registers."""
    return "".join(LETTERS[LETTERS.index(x) + 1] if x in LETTERS else x for x in symbol)


def values(symbols: list[str], modulus: int) -> list[int]:
    """At every symbol, the value so far."""
    held, at, tops = {}, "a", []
    for symbol in symbols:
        first, operand = symbol[0], symbol[1:]
        if first == "-":
            held[at] = -held[at] % modulus
        elif first in "+*":
            right = held[at] if operand in held else int(operand)
            at = LETTERS[LETTERS.index(operand) - 1] if operand in held else at
            held[at] = (held[at] + right if first == "+" else held[at] * right) % modulus
        else:
            at, held[first] = first, int(operand)
        tops.append(held[at])
    return tops


@dataclass(frozen=True)
class Text:
    """Characters of the language reference that ships with Python; label i is the next one.

    Args:
        held_out: windows of every tenth topic, which training never sees, instead of the others.
    """

    held_out: bool = False
    vocabulary: int = 128

    @property
    def characters(self) -> Tensor:
        """All of them; the few that are not ASCII are question marks."""
        return _characters(self.held_out)

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        text = self.characters
        starts = torch.randint(len(text) - length, (rows,), generator=generator)
        windows = torch.stack([text[s : s + length + 1] for s in starts.tolist()])
        return windows[:, :-1], windows[:, 1:]


_READ: dict[bool, Tensor] = {}


def _characters(held_out: bool) -> Tensor:
    if held_out not in _READ:
        names = sorted(topics)
        chosen = itertools.compress(names, ((i % 10 == 0) == held_out for i in range(len(names))))
        _READ[held_out] = torch.tensor(list("\n".join(topics[n] for n in chosen).encode("ascii", "replace")))
    return _READ[held_out]
