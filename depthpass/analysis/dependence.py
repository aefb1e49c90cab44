"""Dependences between the ops of a program, over tokens: what schedules, depth and cost are all derived from."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from depthpass.ir.ops import OPS
from depthpass.ir.program import Program, reads_slots, writes_slot
from depthpass.ir.structural_ops import keys_from


@dataclass(frozen=True)
class Dependence:
    """``target`` at token i needs ``source`` at token ``i - distance``.

    Attributes:
        source, target: value names.
        distance: in tokens, at least 0.
        kind: ``flow`` (an argument, the same token), ``delay`` (an argument, ``distance`` tokens earlier),
            ``attention`` (keys of a visit: this token and every earlier one, so distance 0 stands for 0, 1, 2, ...),
            ``past`` (keys of the tokens of earlier calls, from another visit's slot),
            ``future`` (needs *later* tokens as well: sequence-level top-k routing).
    """

    source: str
    target: str
    distance: int
    kind: str


def dependences(program: Program, calls: bool = False) -> tuple[Dependence, ...]:
    """All dependences of a program, in program order of their targets.

    Args:
        calls: every token is a call of its own, so that a visit's ``past`` is read as well; otherwise all tokens are one
            call, which has no past.

    A visit's keys and values are computed from an *input* of the visit that writes the slot, so an attention
    dependence starts at that input and never at the visit's result.
    """
    writers = {writes_slot(o): o for o in program.visits}
    edges = []
    for o in program.ops:
        if not o.name:
            continue
        distance = OPS[o.kind].lag(o)
        edges += [Dependence(a, o.name, distance, "delay" if distance else "flow") for a in o.args]
        edges += [Dependence(keys_from(writers[s]), o.name, 0, "attention") for s in reads_slots(o)]
        if calls and o.kind == "block" and o["past"] is not None:
            edges.append(Dependence(keys_from(writers[o["past"]]), o.name, 1, "past"))
        if OPS[o.kind].waits(o):
            edges.append(Dependence(o.args[0], o.name, 0, "future"))
    return tuple(edges)


def slot_order(program: Program) -> tuple[tuple[str, str], ...]:
    """Pairs of visits (writer, reader) of one slot: what runs them has to run the writer first.

    No dependence of values: the keys follow from the writer's input alone, so depth does not count its result. But the
    writer is what puts them into the slot, even where nothing reads its result.
    """
    writers = {writes_slot(o): o.name for o in program.visits}
    return tuple((writers[s], o.name) for o in program.visits for s in reads_slots(o) if writers[s] != o.name)


def cycles(program: Program, calls: bool = False, slots: bool = False) -> tuple[frozenset[str], ...]:
    """The delay cycles: strongly connected components (with at least one dependence inside), in program order.

    With ``calls`` also the cycles through a past; with ``slots`` what has to stand on a cycle because of the slot order.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(o.name for o in program.ops if o.name)
    graph.add_edges_from((d.source, d.target) for d in dependences(program, calls))
    if slots:
        graph.add_edges_from(slot_order(program))
    components = [
        frozenset(c) for c in nx.strongly_connected_components(graph)
        if len(c) > 1 or any(graph.has_edge(v, v) for v in c)
    ]
    return tuple(sorted(components, key=lambda c: min(program.index[v] for v in c)))


def back_delays(program: Program, cycle: frozenset[str]) -> dict[str, int]:
    """Delays of a cycle that read a value defined later: name to tokens. Their minimum bounds the chunk size."""
    return {
        o.name: OPS[o.kind].lag(o)
        for o in program.ops
        if OPS[o.kind].forward_refs and o.name in cycle and o.args[0] in cycle
        and program.index[o.args[0]] > program.index[o.name]
    }
