"""The max-plus system of a program: what each value waits for, solved in stages.

Two facts make the unrolled graph a small periodic one:

- Shifting a path by one token gives a path, so a longest path never gets shorter towards later tokens, and attention to
  earlier tokens is dominated by attention to the own one. Attention therefore counts as an arc of distance 0.
- A top-k route waits for every token of the row. Its own depth is a number that depends on the row only; what follows
  is the longest path *from* the route, added to it. So every such route begins a stage of its own.

Pads end the row, so what is computed at them, and what the last real token gets from the last of them when they are
trimmed, is read by nothing that comes before. Where pads are tokens like any other they lengthen the row; elsewhere
each one, and the last real token behind a ``trim``, is a node of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import networkx as nx

from depthpass.analysis.dependence import cycles, dependences
from depthpass.analysis.growth import ZERO, Growth, maximum, total
from depthpass.analysis.maxplus import Distance, Held, Node, Recurrence, read_at, solve
from depthpass.errors import PassError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, reads_slots, writes_slot
from depthpass.ir.structural_ops import keys_from
from depthpass.ir.verify import infer


@dataclass(frozen=True)
class PathVisit:
    """One visit on a critical path.

    Attributes:
        visit: value name of the visit, without ``%``.
        block: physical block.
        token: position in the row, from 0; pad tokens follow the real ones.
    """

    visit: str
    block: int
    token: int

    def __str__(self) -> str:
        return f"%{self.visit} (block {self.block}) at token {self.token}"


Key = str | tuple[str, int]
"""A value at token i of a longer row, or (value, k): the value at the k-th pad token after the row's last real token i; with
k = 0, of a value behind a ``trim``, at that token itself."""


class Stages:
    """The dependence system of a program, solved once per stage: from the sources, and from each top-k route.

    Attributes:
        pads_apart: whether pad tokens differ from real ones in what they depend on, or trimmed values are mixed with
            others, so that each pad is a node of its own. Otherwise they simply lengthen the row.
        trimmed: values behind a ``trim``, with the pads that the last real token's one stands behind.

    ``weigh`` says what an op adds to a path.
    With ``calls`` every token is a call of its own (see :func:`~depthpass.analysis.dependence.dependences`).
    """

    def __init__(self, program: Program, weigh: Callable[[Op], int], calls: bool = False) -> None:
        self.program = program
        self.types = infer(program)
        for cycle in cycles(program, calls):
            if late := [v for v in cycle if _waits(program.defs[v])]:
                raise PassError(
                    f"depth: the top-k route %{late[0]} lies on a delay cycle, so it needs tokens that need its own "
                    "result. Use rule threshold or choice, or move the delay."
                )
        self.reads: dict[str, list[tuple[str, Distance]]] = {o.name: [] for o in program.ops if o.name}
        for d in dependences(program, calls):
            group = program.defs[d.target]["group"] if d.kind == "delay" else None
            self.reads[d.target].append((d.source, d.distance if group is None else Held(group)))
        self.routes = tuple(o.name for o in program.ops if _waits(o))
        self.writers = {writes_slot(o): o for o in program.visits}
        self.trimmed, mixed = self._trims()
        self.pads_apart = mixed or any(
            (o.kind == "pad" and (o["feed"] or self._computed(o.args[0]))) or (o.kind == "block" and self._outlives_keys(o))
            for o in program.ops
        )
        self.nodes = self._nodes(weigh)
        self._check_pads()
        self.arcs = {node.name: node for node in self.nodes}
        self.sources = frozenset(
            node.name for node in self.nodes if not node.arcs and node.name not in self.routes
        )
        self._solved: dict[str | None, tuple[dict[object, Growth], tuple[Recurrence, ...]]] = {}
        self._rows: dict[str, Growth] = {}

    def _outlives_keys(self, visit: Op) -> bool:
        """Whether a visit runs on pad tokens that a slot it reads does not have."""
        pads = self.pads(visit.name)
        return any(self.pads(self._source(s)) < pads for s in reads_slots(visit))

    def _computed(self, value: str) -> bool:
        """Whether a value depends on more than its own token's embedding."""
        kinds = {self.program.defs[v].kind for v in self.ancestors(value)}
        return not kinds <= {"embed", "zeros", "noise", "pad"}

    def _trims(self) -> tuple[dict[str, int], bool]:
        """Values behind a trim, and whether any is mixed with values that are not, read at other tokens or padded again."""
        trims: dict[str, int] = {}
        mixed = False
        for o in self.program.ops:
            if not o.name or o.kind == "delay":
                continue
            behind = {trims.get(a, 0) for a in o.args}
            if o.kind == "trim":
                mixed |= behind != {0}
                trims[o.name] = o["tokens"]
            elif any(behind) or (o.kind == "block" and any(self._source(s) in trims for s in reads_slots(o))):
                mixed |= len(behind) > 1 or o.kind in ("block", "pad")
                trims[o.name] = max(*behind, 1)
        return trims, mixed or any(o.args[0] in trims for o in self.program.ops if o.kind == "delay")

    def _check_pads(self) -> None:
        """Refuse a delay over pads that reads what those pads have left at the last real token."""
        graph = nx.DiGraph((u, node.name) for node in self.nodes for u, d in node.arcs if d == 0)
        if not nx.is_directed_acyclic_graph(graph):
            late = next(o.name for o in self.program.ops if o.kind == "delay" and o.args[0] in self.trimmed)
            raise PassError(f"depth: the delay %{late} reads a trimmed value, which waits for the last pad, at pads that come "
                            "before that one. Move the delay in front of the trim.")

    def _source(self, slot: int) -> str:
        """The value that the keys of a slot are computed from."""
        return keys_from(self.writers[slot])

    def ancestors(self, value: str) -> frozenset[str]:
        """Values that a value depends on, itself included."""
        seen, todo = {value}, [value]
        while todo:
            for u, _ in self.reads[todo.pop()]:
                if u not in seen:
                    seen.add(u)
                    todo.append(u)
        return frozenset(seen)

    def pads(self, value: str) -> int:
        return self.types[value].pads

    def _nodes(self, weigh: Callable[[Op], int]) -> tuple[Node, ...]:
        real, later = [], []
        for o in self.program.ops:
            if not o.name:
                continue
            arcs = () if o.name in self.routes else tuple(dict.fromkeys(self.reads[o.name]))
            weight = weigh(o)
            absent = self.types[o.name].absent
            real.append(Node(o.name, arcs, weight, absent))
            if self.pads_apart:
                later += [
                    (k, Node((o.name, k), self._pad_arcs(o, arcs, k), weight, max(absent - k, 0)))
                    for k in range(0 if o.name in self.trimmed else 1, self.pads(o.name) + 1)
                ]
        later.sort(key=lambda pair: pair[0])
        return tuple(real) + tuple(node for _, node in later)

    def _pad_arcs(self, o: Op, arcs: tuple[tuple[str, Distance], ...], k: int) -> tuple[tuple[Key, int], ...]:
        """What a value at the k-th pad token, or at the last real one, reads; distances count back from the latter.

        Where groups end depends on n there: they count as groups of one token, which are at least as deep.
        """
        if o.kind == "trim":
            return (self._at(o.args[0], o["tokens"]),)
        if o.kind == "pad" and o["feed"]:
            return (self._at(self.program.fed, k - 1),)
        if o.kind != "block":
            known = [(u, d if isinstance(d, int) else 1) for u, d in arcs]
            return tuple(self._at(u, k - distance) for u, distance in known if k - distance <= self.pads(u))
        # Pads may break the order of depths along the row, so attention reads every earlier token here.
        keys = [self._at(a, k) for a in o.args]
        for slot in reads_slots(o):
            source = self._source(slot)
            window = o["window"] if slot == o["slot"] else None
            # Of real tokens the last one stands for all before it, unless a trim has given it something else.
            least = -1 if source in self.trimmed else 0
            first = least if window is None else max(least, k + 1 - window)
            keys += [self._at(source, j) for j in range(first, min(k, self.pads(source)) + 1)]
        return tuple(dict.fromkeys(keys))

    def _at(self, value: str, k: int) -> tuple[Key, int]:
        """Arc to a value k tokens after the last real one; to that one or an earlier one for k <= 0."""
        return ((value, k), 0) if k > 0 or (k == 0 and value in self.trimmed) else (value, -k)

    def solved(self, stage: str | None) -> dict[object, Growth]:
        """Longest paths to every node that start at the sources (None), or at a top-k route."""
        if stage not in self._solved:
            starts = self.sources if stage is None else frozenset(self._keys(stage))
            self._solved[stage] = solve(self.nodes, starts)
        return self._solved[stage][0]

    def _keys(self, value: str) -> list[Key]:
        pads = range(0 if value in self.trimmed else 1, self.pads(value) + 1) if self.pads_apart else ()
        return [value, *((value, k) for k in pads)]

    def _ends(self, value: str, stage: str | None) -> list[tuple[Key, int, Growth]]:
        """Where a row's longest path may end: key, tokens after the last real one, growth over n - 1."""
        solved = self.solved(stage)
        if not self.pads_apart:
            later = self.trimmed.get(value, self.pads(value))
            return [(value, later, solved[value].advanced(later))]
        # Behind a trim the last real token has a value of its own, and those before it the plain one.
        back = int(value in self.trimmed)
        return [(k, -back, solved[k].delayed(back)) if k == value else (k, 0, solved[k]) for k in self._keys(value)]

    def _before(self, value: str) -> list[str | None]:
        """Stages whose paths reach a value."""
        return [s for s in (None, *self.routes) if s != value and any(g.reachable for *_, g in self._ends(value, s))]

    def base(self, stage: str | None) -> Growth:
        """Depth at which a stage begins, over n - 1: a top-k route needs all its arguments at all tokens."""
        if stage is None:
            return ZERO
        return maximum(self.row(a) for a in self.program.defs[stage].args)

    def row(self, value: str) -> Growth:
        """Largest depth of a value over the tokens of a row, over n - 1."""
        if value not in self._rows:
            ends = [] if value not in self.routes else [self.base(value)]
            ends += [total(self.base(s), g) for s in self._before(value) for *_, g in self._ends(value, s)]
            self._rows[value] = maximum(ends)
        return self._rows[value]

    def recurrences(self, target: str) -> tuple[Recurrence, ...]:
        """Proofs of all stages that a value needs, for the cycles that it depends on."""
        needed = self.ancestors(target)
        for stage in (None, *self.routes):
            if stage is None or stage in needed:
                self.solved(stage)
        return tuple(dict.fromkeys(r for _, recurrences in self._solved.values() for r in recurrences if set(r.nodes) <= needed))

    def path(self, value: str, n: int) -> Iterator[PathVisit]:
        """Visits of a longest path from its end, found by walking back through values that account for each other."""
        last = n - 1
        while True:
            if value in self.routes:
                value = self._deepest(self.program.defs[value].args, last)
                continue
            stage, key, i = self._end(value, last)
            solved = self.solved(stage)
            node = self.arcs[key]
            while True:
                op = self.program.defs[key if isinstance(key, str) else key[0]]
                if OPS[op.kind].depth(op)[1]:
                    yield PathVisit(op.name, op["index"], i if isinstance(key, str) else i + key[1])
                if op.name == stage or not node.arcs:
                    break
                need = solved[key].at(i) - node.weight
                key, i = next((u, j) for u, d in node.arcs if solved[u].at(j := read_at(i, d)) == need)
                node = self.arcs[key]
            if stage is None:
                return
            value = stage

    def _deepest(self, values: tuple[str, ...], last: int) -> str:
        return max(values, key=lambda v: self.row(v).at(last))

    def _end(self, value: str, last: int) -> tuple[str | None, Key, int]:
        """(stage, key, token) at which a longest path of a row ends."""
        stage, key, later, _ = max(
            ((s, k, later, self.base(s).at(last) + g.at(last)) for s in self._before(value)
             for k, later, g in self._ends(value, s)),
            key=lambda end: end[3],
        )
        return stage, key, last + later


def _waits(o: Op) -> bool:
    """Whether an op needs every token of the row."""
    return OPS[o.kind].waits(o)

