"""Depth by brute force: the unrolled graph, written out token by token from the meaning of each op; its longest path.

Independent of :mod:`depthpass.analysis.dependence` on purpose, as a check of everything that is derived from it. Every
key that a visit attends to is a node of its own, and every pair of tokens is an edge, so it is meant for a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

import networkx as nx

from depthpass.errors import SpecError
from depthpass.ir.program import Op, Program

Node = tuple[str, str, int]
"""(``value``, name, token) or (``key``, slot, token)."""


def unrolled(
    program: Program, n: int, weights: Mapping[int, int] | None = None, calls: Sequence[int] | None = None
) -> nx.DiGraph:
    """Graph of all values at all tokens of a row of ``n`` real tokens and the program's pads.

    Nodes carry ``weight`` (1 for a visit, or the block's own from ``weights``); values that are absent have no node.
    ``calls`` are the sizes of the calls that the tokens came in; None = all in one.

    Raises:
        SpecError: n below 1.
    """
    if n < 1:
        raise SpecError(f"n: expected at least 1 token, got {n}.")
    graph = nx.DiGraph()
    row = _Row(program, n, calls)
    for token in range(n + max(row.pads.values())):
        for o in program.ops:
            if not o.name or token >= n + row.pads[o.name]:
                continue
            reads = row.reads(o, token)
            if reads is None:
                continue
            node = ("value", o.name, token)
            row.present.add(node)
            weight = 0 if o.kind != "block" else 1 if weights is None else weights[o["index"]]
            graph.add_node(node, weight=weight)
            graph.add_edges_from((u, node) for u in reads)
    # Keys exist where their visit's input does; a top-k route may read scores of tokens added after it.
    missing = [v for v in graph if "weight" not in graph.nodes[v]]
    for v in missing:
        graph.nodes[v]["weight"] = 0
    for kind, name, token in list(graph):
        if kind == "key":
            graph.add_edge(("value", row.key_input[name], token), (kind, name, token))
    return graph


class _Row:
    """What each op of one row reads."""

    def __init__(self, program: Program, n: int, calls: Sequence[int] | None) -> None:
        self.program, self.n = program, n
        ends = list(accumulate(calls or (n,)))
        self.call_start = [max((e for e in ends if e <= t), default=0) for t in range(n)]
        self.present: set[Node] = set()
        self.pads = dict.fromkeys(program.defs, 0)
        self.key_input: dict[str, str] = {}
        # Delays may read later values, so repeat until nothing changes; a cycle that pads also trims.
        while (pads := {o.name: self._pads(o) for o in program.ops if o.name}) != self.pads:
            self.pads = pads
        for o in program.visits:
            if o["keys"] is None or o["gate"] is not None:
                self.key_input[f"slot {o['slot']}"] = o.args[0]

    def _pads(self, o: Op) -> int:
        if o.kind == "trim" or not o.args:
            return 0
        return max(self.pads[a] for a in o.args) + (o["tokens"] if o.kind == "pad" else 0)

    def reads(self, o: Op, token: int) -> list[Node] | None:
        """Nodes that an op reads at a token, or None when it has no value there."""
        rule: Callable[[Op, int], Iterator[Node] | None] = getattr(self, f"_{o.kind}", self._pointwise)
        found = rule(o, token)
        return None if found is None else list(found)

    def _pointwise(self, o: Op, token: int) -> Iterator[Node] | None:
        args = [("value", a, token) for a in o.args]
        return iter(args) if all(a in self.present for a in args) else None

    def _add(self, o: Op, token: int) -> Iterator[Node] | None:
        args = [a for a in (("value", a, token) for a in o.args) if a in self.present]
        return iter(args) if args else None

    def _delay(self, o: Op, token: int) -> Iterator[Node] | None:
        source = ("value", o.args[0], token - o["tokens"])
        return iter([source]) if source in self.present else None

    def _pad(self, o: Op, token: int) -> Iterator[Node] | None:
        return self._pointwise(o, token) if token < self.n + self.pads[o.args[0]] else iter(())

    def _route(self, o: Op, token: int) -> Iterator[Node]:
        tokens = range(self.n + self.pads[o.name]) if o["rule"] == "topk" else (token,)
        return (("value", a, t) for a in o.args for t in tokens)

    def _block(self, o: Op, token: int) -> Iterator[Node]:
        yield ("value", o.args[0], token)
        shared = o["keys"] is not None
        if shared:
            yield from self._keys(f"slot {o['keys']}", 0, token)
        if not shared or o["gate"] is not None:
            first = 0 if o["window"] is None else max(0, token + 1 - o["window"])
            if o["past"] is not None:
                first = self.call_start[min(token, self.n - 1)]
                yield from self._keys(f"slot {o['past']}", 0, first - 1)
            yield from self._keys(f"slot {o['slot']}", first, token)

    def _keys(self, slot: str, first: int, last: int) -> Iterator[Node]:
        """Keys of a slot from one token to another; a slot has none at pads that its writer does not run on."""
        end = self.n + self.pads[self.key_input[slot]]
        return (("key", slot, t) for t in range(first, min(last + 1, end)))


def brute_depth(
    program: Program, n: int, output: str | None = None, weights: Mapping[int, int] | None = None,
    calls: Sequence[int] | None = None,
) -> int:
    """Longest path into any token of an output, by walking the unrolled graph.

    Args:
        program: a verified program.
        n: real tokens of the row.
        output: name of a tap, or None for the final stream.
        weights: what a visit counts, by physical block; 1 when None.
        calls: sizes of the calls that the tokens came in; None = all in one.

    Raises:
        SpecError: n below 1, or a top-k route that waits for itself.
    """
    target = program.output if output is None else next(o.args[0] for o in program.taps if o["name"] == output)
    graph = unrolled(program, n, weights, calls)
    if not nx.is_directed_acyclic_graph(graph):
        raise SpecError("the unrolled graph has a cycle: a top-k route waits for its own result.")
    longest: dict[Node, int] = {}
    for v in nx.topological_sort(graph):
        longest[v] = graph.nodes[v]["weight"] + max((longest[u] for u in graph.predecessors(v)), default=0)
    return max(length for (kind, name, _), length in longest.items() if kind == "value" and name == target)
