"""What every op of a running model read, and the longest path of it: the check of :mod:`depthpass.analysis.depth`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx as nx

from depthpass.errors import InputError, LoweringError
from depthpass.ir.program import Program

Node = tuple[str, int]
"""(value, column of the row); what is handed out is (``output`` or a tap's name, token) behind a ``>``."""


@dataclass
class Record:
    """What was read in the runs of one row.

    Attributes:
        program: the program that ran.
        reads: nodes that each node was computed from, in any of the runs.
        visits: block of each visit that ran.
        outputs: names of the outputs that were handed out.
    """

    program: Program
    reads: dict[Node, set[Node]] = field(default_factory=dict)
    visits: dict[Node, int] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)

    def graph(self, weights: Mapping[int, int] | None = None) -> nx.DiGraph:
        """The record as a graph; nodes carry ``weight``: 1 for a visit, or its block's own."""
        graph = nx.DiGraph()
        for node, read in self.reads.items():
            block = self.visits.get(node)
            graph.add_node(node, weight=0 if block is None else 1 if weights is None else weights[block])
            graph.add_edges_from((r, node) for r in read)
        return graph

    def depth(self, output: str | None = None, weights: Mapping[int, int] | None = None) -> int:
        """Longest path into any token of an output (None = what goes to the head), in visits or the blocks' weights.

        Raises:
            LoweringError: the record has a cycle (a choice among all tokens of the row waits for itself).
            InputError: nothing of that name was handed out.
        """
        name = output or "output"
        if name not in self.outputs:
            raise InputError(f"output: expected one of {', '.join(sorted(self.outputs))}, got {output!r}.")
        graph = self.graph(weights)
        try:
            order = list(nx.topological_sort(graph))
        except nx.NetworkXUnfeasible:
            raise LoweringError("the record has a cycle: a top-k route waits for its own result.") from None
        longest: dict[Node, int] = {}
        for v in order:
            longest[v] = graph.nodes[v].get("weight", 0) + max((longest[u] for u in graph.predecessors(v)), default=0)
        return max(length for (value, _), length in longest.items() if value == f">{name}")
