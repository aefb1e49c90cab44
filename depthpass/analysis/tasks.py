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

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx

from depthpass.errors import InputError, did_you_mean
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
        missing_depth: how many are missing, 0 when it suffices.
        needed_tokens, available_tokens: width of the task and tokens (real and pad) of the sequence; None = not asked.
        sufficient: both suffice.
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
            ("sufficient", self.sufficient),
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
    parts = [f"{task.name}: this DAG, level by level, takes {needed} visits in a row"]
    if visits_per_round > 1:
        parts[0] += f" ({task.depth} rounds of {visits_per_round})"
    parts.append(f"the program has {depth_at_n}" + (f", {missing} too few" if missing else ", enough"))
    if tokens is not None:
        parts.append(f"its widest level takes {task.width} tokens at once, the program has {tokens}"
                     + (f", {task.width - tokens} pads too few" if narrow else ", enough"))
    if missing:
        parts.append(f"or about {task.size} chain-of-thought steps, one per local function")
    text = "; ".join(parts) + (". About this one DAG: another algorithm may take fewer, so this is no lower bound, and it says "
                               "nothing about what training finds (arXiv 2505.19245).")
    enough = not missing and not narrow
    return Sufficiency(task.name, needed, int(depth_at_n), missing, task.width, tokens, enough, text)


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}.")


def _tree(n: int) -> nx.DiGraph:
    """Balanced binary reduction of n leaves; an odd node of a level moves up without work."""
    graph = nx.DiGraph()
    level = [("in", i) for i in range(n)]
    graph.add_nodes_from(level)
    height = 0
    while len(level) > 1:
        height += 1
        above = []
        for i in range(0, len(level) - 1, 2):
            node = (height, i // 2)
            graph.add_edges_from([(level[i], node), (level[i + 1], node)])
            above.append(node)
        level = above + level[len(level) - len(level) % 2 :]
    return graph


def _chain(n: int) -> nx.DiGraph:
    """Left-to-right scan of n inputs: state i reads state i-1 and input i."""
    graph = nx.DiGraph()
    for i in range(n):
        graph.add_edge(("in", i), ("state", i))
        if i:
            graph.add_edge(("state", i - 1), ("state", i))
    return graph


def _scan(name: str, n: int, form: str, note: str) -> TaskDAG:
    _positive(n=n)
    if form not in ("tree", "chain"):
        hint = did_you_mean(form, ("tree", "chain"))
        raise InputError(f"{name}: form must be 'tree' or 'chain', got {form!r}.{hint}")
    return TaskDAG(f"{name}({n}, {form})", _tree(n) if form == "tree" else _chain(n), note=note)


def parity(n: int, form: str = "tree") -> TaskDAG:
    """Parity of n bits: depth ceil(log2 n) as a tree, n as a left-to-right scan.

    The problem itself is in TC^0 (constant depth with O(log n) bits per number): neither DAG is a lower bound.
    """
    return _scan("parity", n, form, "one node is an exclusive or of two bits")


def s5_word_problem(n: int, form: str = "tree") -> TaskDAG:
    """Product of n permutations of five things: depth ceil(log2 n) as a tree, n as a left-to-right scan.

    The word problem of S5 is complete for NC1, so constant-depth threshold circuits do not solve it unless TC0 = NC1.
    """
    return _scan("s5_word_problem", n, form, "one node multiplies two permutations of five elements; NC1-complete")


def arithmetic_formula(operators: int, form: str = "balanced") -> TaskDAG:
    """A formula with so many binary operators: depth ceil(log2(operators + 1)) balanced, ``operators`` when nested.

    ``balanced`` is the tree as given when it is balanced; an unbalanced one can be rebalanced to logarithmic depth
    (with larger nodes), ``nested`` evaluates it as written in the worst case.
    """
    _positive(operators=operators)
    if form not in ("balanced", "nested"):
        raise InputError(f"arithmetic_formula: form must be 'balanced' or 'nested', got {form!r}."
                         f"{did_you_mean(form, ('balanced', 'nested'))}")
    if form == "balanced":
        return TaskDAG(f"arithmetic_formula({operators}, balanced)", _tree(operators + 1),
                       note="one node applies a binary operator")
    graph = nx.DiGraph([(("in", 0), ("op", 0))])
    for i in range(operators):
        graph.add_edge(("in", i + 1), ("op", i))
        if i:
            graph.add_edge(("op", i - 1), ("op", i))
    return TaskDAG(f"arithmetic_formula({operators}, nested)", graph, note="one node applies a binary operator")


def edit_distance(n: int, m: int | None = None) -> TaskDAG:
    """Edit distance of strings of length n and m: n*m cells, depth n + m - 1 (cells of the longest path)."""
    m = n if m is None else m
    _positive(n=n, m=m)
    graph = nx.DiGraph()
    graph.add_nodes_from((i, j) for i in range(n) for j in range(m))
    for i in range(n):
        for j in range(m):
            graph.add_edges_from(((a, b), (i, j)) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1))
                                 if a >= 0 and b >= 0)
    return TaskDAG(f"edit_distance({n}, {m})", graph, inputs_are_nodes=False,
                   note="one node is a cell of the dynamic programme; the strings are not nodes")


def reachability(nodes: int, diameter: int | None = None) -> TaskDAG:
    """All-pairs reachability by repeated squaring: depth ceil(log2 d) for paths of up to d edges.

    A node of the DAG is one (i, j) entry of one squaring. It reads whole rows and columns, which uniform attention does
    in one visit (arXiv 2505.18948 keeps n^3 + n^2 pads for it); with bounded fan-in each level costs a further
    ceil(log2 n) rounds.
    """
    _positive(nodes=nodes)
    diameter = max(1, nodes - 1) if diameter is None else diameter
    _positive(diameter=diameter)
    graph = nx.DiGraph()
    squarings = math.ceil(math.log2(max(2, diameter)))
    every = [(i, j) for i in range(nodes) for j in range(nodes)]
    graph.add_nodes_from((0, *e) for e in every)
    for t in range(1, squarings + 1):
        for i, j in every:
            graph.add_edges_from(((t - 1, i, k), (t, i, j)) for k in range(nodes))
            graph.add_edges_from(((t - 1, k, j), (t, i, j)) for k in range(nodes))
    return TaskDAG(f"reachability({nodes}, diameter {diameter})", graph,
                   note="one node is an OR over k of (i,k) and (k,j): unbounded fan-in, one uniform attention read")


def binary_search(n: int) -> TaskDAG:
    """Search among n sorted items: ceil(log2 n) halvings and one final comparison, one after the other.

    This is the worst path: which item a step reads depends on the step before, so nothing runs in parallel.
    """
    _positive(n=n)
    graph = nx.DiGraph()
    steps = math.ceil(math.log2(n)) + 1
    graph.add_node(("compare", 0))
    nx.add_path(graph, [("compare", i) for i in range(steps)])
    return TaskDAG(f"binary_search({n})", graph, inputs_are_nodes=False,
                   note="one node fetches an item and compares it; the items are not nodes")


TASKS: dict[str, Callable[..., TaskDAG]] = {
    "parity": parity,
    "s5_word_problem": s5_word_problem,
    "reachability": reachability,
    "edit_distance": edit_distance,
    "arithmetic_formula": arithmetic_formula,
    "binary_search": binary_search,
}
"""Built-in tasks by name."""


def task(name: str, *sizes: int, **options: object) -> TaskDAG:
    """A built-in task by name, as the command line asks for it.

    >>> task("edit_distance", 30, 30).rows()[:2]  # doctest: +ELLIPSIS
    [('size', 900, ...), ('depth', 59, ...)]

    Raises:
        InputError: an unknown name, or sizes that the task does not take.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}.{did_you_mean(name, TASKS)} Known: {', '.join(TASKS)}; "
                         "or build a TaskDAG from a networkx.DiGraph.")
    try:
        return TASKS[name](*sizes, **options)
    except TypeError as error:
        raise InputError(f"task {name!r}: {error}. Its sizes are documented in depthpass.analysis.tasks.") from None
