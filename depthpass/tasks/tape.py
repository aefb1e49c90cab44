"""The tape: a program that runs on it leaves a trace behind, and the trace is a task DAG.

Following TAIL (arXiv 2507.13332) a trace is a *linear transition* (every state is written, in the order of execution) of
*atomic states* (one loop-free local function each) with a *memory fetcher* (a state prints the operands it reads, with their
values, before it uses them)::

    s3: s2=1 b3=0 xor 1           # state s3 reads s2 and b3, applies xor, writes 1

The tape itself applies the local function to what was fetched, so the DAG (a node per state, an edge per fetch of another
state) evaluates to the answer by construction. Control counts as data: a program that branches on a state, or addresses by
it, fetches that state in every step which the choice decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx

from depthpass.prompt import at_prompt

Value = Any
"""What a state holds: an integer, a string, or a tuple of them."""


def show(value: Value) -> str:
    """A value as the trace prints it: one word without spaces."""
    if isinstance(value, tuple):
        return ",".join(show(v) for v in value) or "-"
    return str(int(value)) if isinstance(value, bool) else str(value) or "-"


@dataclass(frozen=True)
class Cell:
    """An input symbol or a state: a name and what it holds."""

    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.name}={show(self.value)}"


@dataclass(frozen=True)
class Step:
    """One atomic state: ``cell.value = function(*fetched values)``."""

    cell: Cell
    function: Callable[..., Value]
    fetched: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The local function's name in the trace."""
        return self.function.__name__.strip("_")

    def __str__(self) -> str:
        return " ".join([f"{self.cell.name}:", *map(str, self.fetched), self.name, show(self.cell.value)])


class Tape:
    """What a task's program runs on."""

    def __init__(self) -> None:
        self.inputs: dict[str, Cell] = {}
        self.steps: list[Step] = []
        self._names: set[str] = set()

    def read(self, name: str, value: Value) -> Cell:
        """Declare an input symbol, which stands in the prompt."""
        cell = self.inputs[self._fresh(name)] = Cell(name, value)
        return cell

    def row(self, name: str, values) -> list[Cell]:
        """Declare input symbols ``name0, name1, ..``."""
        return [self.read(f"{name}{i}", v) for i, v in enumerate(values)]

    def step(self, name: str, function: Callable[..., Value], *fetched: Cell) -> Cell:
        """Fetch cells, apply a local function to their values, write the result as the state ``name``."""
        cell = Cell(self._fresh(name), function(*(c.value for c in fetched)))
        self.steps.append(Step(cell, function, fetched))
        return cell

    def _fresh(self, name: str) -> str:
        if name in self._names:
            raise AssertionError(f"two cells of a tape are called {name!r}")  # a fault of the program, not of its input
        self._names.add(name)
        return name


@at_prompt
@dataclass(frozen=True)
class Trace:
    """What a program left on its tape.

    Attributes:
        inputs: input symbols by name.
        steps: atomic states in the order of execution.
    """

    inputs: dict[str, Cell]
    steps: tuple[Step, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """One line per state."""
        return tuple(map(str, self.steps))

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The DAG of states; inputs are no nodes."""
        graph = nx.DiGraph()
        for step in self.steps:
            graph.add_node(step.cell.name)
            graph.add_edges_from((c.name, step.cell.name) for c in step.fetched if c.name not in self.inputs)
        return graph

    @cached_property
    def levels(self) -> tuple[tuple[Step, ...], ...]:
        """States by level of the DAG: what one round after another can work out, each reading earlier rounds only."""
        at: dict[str, int] = {}
        for step in self.steps:
            at[step.cell.name] = 1 + max((at[c.name] for c in step.fetched if c.name in at), default=-1)
        rounds: list[list[Step]] = [[] for _ in range(1 + max(at.values(), default=-1))]
        for step in self.steps:
            rounds[at[step.cell.name]].append(step)
        return tuple(map(tuple, rounds))

    @property
    def size(self) -> int:
        """States in all."""
        return len(self.steps)

    @property
    def depth(self) -> int:
        """States on the longest path."""
        return len(self.levels)

    @property
    def width(self) -> int:
        """States of the fullest level."""
        return max(map(len, self.levels))

    @property
    def functions(self) -> Counter[str]:
        """How often each local function is used."""
        return Counter(s.name for s in self.steps)
