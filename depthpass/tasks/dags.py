"""Task DAGs: how much serial work one way to solve a problem takes, to be held against the depth a program has.

A task is a DAG of *local* functions (bounded memory each). Following arXiv 2505.19245, chain of thought can evaluate it in
about as many steps as it has nodes, a looped model in about as many loops as it has levels, with one token (input or
pad) per node of the widest level. Those three numbers are ``size``, ``depth`` and ``width``. All are upper bounds: a DAG is
one algorithm, and the problem may have a shallower one (parity is in TC^0, so constant depth and averaging attention decide
it, whatever its tree of exclusive ors says).

Conventions (systems.md, section 1, "CoT vs loop"): ``depth`` counts the *edges* of the longest path. Where the input
symbols are not nodes of the DAG (grids such as edit distance), the first node still has to read its inputs, so the
depth counts the *nodes* of the longest path instead (``inputs_are_nodes=False``): edit distance of n by m has n*m nodes
and depth n + m - 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx

from depthpass.errors import InputError
from depthpass.prompt import at_prompt


@at_prompt
@dataclass(frozen=True)
class TaskDAG:
    """A computation as a DAG of local functions.

    Attributes:
        name: what it computes, with its sizes.
        graph: nodes are local functions, an edge u -> v says that v reads the result of u.
        inputs_are_nodes: whether the input symbols are nodes (then the sources cost nothing).
        note: what one node does, and what the construction assumes.
    """

    name: str
    graph: nx.DiGraph = field(repr=False, compare=False)
    inputs_are_nodes: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.graph, nx.DiGraph) or not self.graph:
            raise InputError(f"task {self.name!r}: expected a non-empty networkx.DiGraph, got {self.graph!r}.")
        if not nx.is_directed_acyclic_graph(self.graph):
            cycle = " -> ".join(str(u) for u, _ in nx.find_cycle(self.graph))
            raise InputError(f"task {self.name!r}: expected an acyclic graph, found the cycle {cycle}.")

    @cached_property
    def levels(self) -> dict[object, int]:
        """Level of each node: edges of the longest path that ends in it."""
        level: dict[object, int] = {}
        for v in nx.topological_sort(self.graph):
            level[v] = 1 + max((level[u] for u in self.graph.pred[v]), default=-1)
        return level

    @property
    def size(self) -> int:
        """Local functions in all: about the chain-of-thought steps a serial evaluation writes down."""
        return self.graph.number_of_nodes()

    @property
    def depth(self) -> int:
        """Serial rounds: edges of the longest path, plus one when the sources read inputs that are not nodes."""
        return max(self.levels.values()) + (0 if self.inputs_are_nodes else 1)

    @property
    def width(self) -> int:
        """Nodes of the fullest level: tokens (inputs and pads together) that must be held at once."""
        return max(Counter(self.levels.values()).values())

    @property
    def fan_in(self) -> int:
        """Largest number of values that one node reads."""
        return max(d for _, d in self.graph.in_degree())

    def rows(self) -> list[tuple[str, int, str]]:
        """(name, number, meaning) for tables."""
        return [
            ("size", self.size, "local functions: about the chain-of-thought steps of a serial evaluation"),
            ("depth", self.depth, "serial rounds: about the loops of a looped model"),
            ("width", self.width, "local functions in the fullest round: tokens needed at once"),
            ("fan_in", self.fan_in, "values one local function reads"),
        ]


@at_prompt
@dataclass(frozen=True)
class Sufficiency:
    """Whether an available depth covers a task's DAG, evaluated level by level. No lower bound of the task itself.

    Attributes:
        task: name of the task.
        needed_depth, available_depth: of the DAG and of the program, in block visits.
        missing_depth: how many are missing, 0 when the depth covers the DAG.
        needed_tokens, available_tokens: width of the DAG and tokens (real and pad) of the sequence; None = not asked.
        sufficient: depth and tokens cover the DAG.
        text: the same in words, with what it rests on.
    """

    task: str
    needed_depth: int
    available_depth: int
    missing_depth: int
    needed_tokens: int
    available_tokens: int | None
    sufficient: bool
    text: str

    def rows(self) -> list[tuple[str, object]]:
        return [
            ("task", self.task), ("depth of its DAG (block visits)", self.needed_depth),
            ("available depth (block visits)", self.available_depth), ("missing depth", self.missing_depth),
            ("widest level of its DAG (tokens)", self.needed_tokens),
            ("available tokens", "not given" if self.available_tokens is None else self.available_tokens),
            ("covers the DAG", self.sufficient),
        ]


def sufficient(
    task: TaskDAG, depth_at_n: int, *, tokens: int | None = None, visits_per_round: int = 1
) -> Sufficiency:
    """Hold the depth of a program at one length against a task's DAG.

    A path of ``depth`` block visits is long enough to evaluate the DAG level by level if each level fits into
    ``visits_per_round`` visits. That says nothing about whether a model learns it; and since the DAG is one algorithm out of
    many, a depth that falls short is no proof that the task is out of reach.

    Args:
        task: the task at this size.
        depth_at_n: block visits on the longest path that ends in the answer's logits.
        tokens: tokens at hand at once (real and pad), checked against the width when given.
        visits_per_round: block visits one round of local functions takes; 1 is the most a program can hope for.

    Raises:
        InputError: a number below its minimum.
    """
    for name, value, least in (
        ("depth_at_n", depth_at_n, 0), ("visits_per_round", visits_per_round, 1), ("tokens", tokens, 1)
    ):
        if value is not None and (isinstance(value, bool) or int(value) != value or value < least):
            raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}.")
    needed = task.depth * visits_per_round
    missing = max(0, needed - int(depth_at_n))
    narrow = tokens is not None and tokens < task.width
    covers = "does not cover" if missing or narrow else "covers"
    parts = [f"{task.name}: the program {covers} this DAG; level by level it is {needed} visits deep"]
    if visits_per_round > 1:
        parts[0] += f" ({task.depth} rounds of {visits_per_round})"
    parts.append(f"the program is {depth_at_n} deep" + (f", {missing} too few" if missing else ""))
    if tokens is not None:
        parts.append(f"its widest level is {task.width} tokens wide, the program has {tokens}"
                     + (f", {task.width - tokens} pads too few" if narrow else ""))
    if missing:
        parts.append(f"or about {task.size} chain-of-thought steps, one per local function")
    text = "; ".join(parts) + (". About this one DAG: another algorithm may take fewer, so this is no lower bound, and it says "
                               "nothing about what training finds (arXiv 2505.19245).")
    enough = not missing and not narrow
    return Sufficiency(task.name, needed, int(depth_at_n), missing, task.width, tokens, enough, text)
