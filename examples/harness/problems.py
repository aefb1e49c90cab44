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
from typing import Protocol

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
    """TurboConn's random signed trees (``modular_tree`` of :mod:`depthpass.tasks`), as many nodes as fit into a row.

    Tokens are characters without blanks: ``-(1+(3*-3))=`` behind start tokens that fill the row. The ``=`` has the label of the
    whole tree's value; with ``inner`` every closing bracket has that of what it closes, before its sign.

    Args:
        modulus: of the values.
        inner: label brackets too.
    """

    modulus: int = 3
    inner: bool = True
    characters: str = "^123456789+*-()="

    @property
    def vocabulary(self) -> int:
        return len(self.characters)

    def draw(self, rows: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
        from depthpass import tasks

        task = tasks.get("modular_tree", modulus=self.modulus)
        rng = random.Random(int(torch.randint(1 << 40, (), generator=generator)))
        ids = torch.zeros(rows, length, dtype=torch.long)
        labels, row = torch.full_like(ids, IGNORED), 0
        while row < rows:
            # A node takes three to four characters.
            prompt = task.instance(rng.randint(1, max(1, length // 3)), seed=rng.randrange(1 << 40)).prompt
            text = prompt.partition(" mod ")[0].replace(" ", "") + "="
            if not length // 2 <= len(text) <= length:
                continue
            values = bracket_values(text, self.modulus) if self.inner else {}
            values[len(text) - 1] = value_of(text[:-1]) % self.modulus
            first = length - len(text)
            ids[row, first:] = torch.tensor([self.characters.index(x) for x in text])
            for i, answer in values.items():
                labels[row, first + i] = answer
            row += 1
        return ids, labels


def bracket_values(text: str, modulus: int) -> dict[int, int]:
    """Place of every closing bracket -> value of what it closes."""
    values, opened = {}, []
    for i, x in enumerate(text):
        if x == "(":
            opened.append(i)
        elif x == ")":
            values[i] = value_of(text[opened.pop() : i + 1]) % modulus
    return values


def value_of(text: str) -> int:
    """Of a formula of digits, signs, ``+``, ``*`` and brackets, which bracket whatever an operator joins."""

    def read(i: int) -> tuple[int, int]:
        sign = 1
        if text[i] == "-":
            sign, i = -1, i + 1
        if text[i] != "(":
            return sign * int(text[i]), i + 1
        total, i = read(i + 1)
        while text[i] != ")":
            operator = text[i]
            other, i = read(i + 1)
            total = total + other if operator == "+" else total * other
        return sign * total, i + 1

    return read(0)[0]


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
