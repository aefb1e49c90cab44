"""Depth of a program from a record of who asked whom, while the reference interpreter runs it: its longest path.

For programs that run on no model (pads inside, other widths): :mod:`depthpass_lowering.executors.recording` does the same on the
runtime. Nothing is read off the program here; an edge is a value that was asked for while another one was computed. Routes
take every token, and in one more run per route nobody, and what was asked in any of the runs counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx as nx
import torch

from depthpass.errors import SpecError
from depthpass.ir import Op, Program, infer
from depthpass.ir.interpret import Interpretation

Node = tuple[str, int]


class _Block:
    """Reads the keys that it is given; its numbers do not matter."""

    def __init__(self, read) -> None:
        self.read = read

    def keys(self, x, position):
        return position

    def __call__(self, x, position, keys, own=(), gate=""):
        self.read([*keys, *own])
        return x


class _Recorder(Interpretation):
    def __init__(self, program: Program, n: int, nobody: str | None, reads: dict[Node, set[Node]], calls) -> None:
        pads = any(t.pads for t in infer(program).values())
        super().__init__(
            program, torch.ones(n, 1), [_Block(self.read)] * program.blocks, lambda x: x, calls=None if pads else calls,
            pad=torch.ones(1), prompt=n,
        )
        self.nobody, self.reads, self.asking = nobody, reads, []

    def value(self, name: str, i: int):
        if i >= self.tokens + self.types[name].pads:
            return None  # the row ends before: a slot has no keys at pads that its writer does not run on
        if self.asking and self.asking[-1] is not None:
            self.reads[self.asking[-1]].add((name, i))
        if (name, i) not in self._memo:
            if (name, i) in self.asking:
                raise SpecError("the record has a cycle: a top-k route waits for its own result.")
            self.reads.setdefault((name, i), set())
            self.asking.append((name, i))
            try:
                super().value(name, i)
            finally:
                self.asking.pop()
        return self._memo[name, i]

    def _key(self, slot: int, j: int) -> Node | None:
        # A slot may hold more than a visit is handed: what counts is what its block gets.
        self.asking.append(None)
        try:
            return None if super()._key(slot, j) is None else (self._writers[slot].args[0], j)
        finally:
            self.asking.pop()

    def read(self, keys: Sequence[Node]) -> None:
        self.reads[self.asking[-1]].update(keys)

    def _local(self, o: Op, args, i: int):
        return torch.ones(self.types[o.name].width)

    def _visit(self, o: Op, x, i: int):
        bare = o.with_attrs(lora=None, lora_rank=None, modulate=None, clock=None, step=None, base=None)
        return super()._visit(bare, x, i)

    def _routed(self, o: Op, i: int) -> bool:
        self._best.pop(o.name, None)
        super()._routed(o.with_attrs(bias=None, rate=None), i)
        return o.name != self.nobody and (len(o.args) == 1 or self.value(o.args[1], i))


def unrolled(
    program: Program, n: int, weights: Mapping[int, int] | None = None, calls: Sequence[int] | None = None
) -> nx.DiGraph:
    """What was read in a row of n tokens: nodes (value, token) with ``weight``; absent values have none."""
    types, graph = infer(program), nx.DiGraph()
    for nobody in (None, *(o.name for o in program if o.kind == "route")):
        reads: dict[Node, set[Node]] = {}
        run = _Recorder(program, n, nobody, reads, calls)
        for i in range(n + max(t.pads for t in types.values())):
            for o in program.ops:
                if o.name and i < n + types[o.name].pads:
                    run.value(o.name, i)
        there = {node for node, x in run._memo.items() if x is not None and x is not False}
        there |= {(o.name, i) for o in program if o.kind == "route" for i in range(n + types[o.name].pads)}
        for (name, i), read in reads.items():
            if (name, i) in there:
                o = program.defs[name]
                weight = 0 if o.kind != "block" else 1 if weights is None else weights[o["index"]]
                graph.add_node((name, i), weight=weight)
                graph.add_edges_from((r, (name, i)) for r in read if r in there)
    return graph


def brute_depth(
    program: Program, n: int, output: str | None = None, weights: Mapping[int, int] | None = None,
    calls: Sequence[int] | None = None,
) -> int:
    """Longest path into any token of an output: of a tap, or of what goes to the head.

    Raises:
        SpecError: a top-k route waits for itself.
    """
    target = program.output if output is None else next(o.args[0] for o in program.taps if o["name"] == output)
    graph = unrolled(program, n, weights, calls)
    longest: dict[Node, int] = {}
    for v in nx.topological_sort(graph):
        longest[v] = graph.nodes[v]["weight"] + max((longest[u] for u in graph.predecessors(v)), default=0)
    return max(length for (name, _), length in longest.items() if name == target)
