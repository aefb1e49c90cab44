"""Schedules, derived from dependences by loop distribution (Allen and Kennedy).

Ops on a delay cycle run chunk by chunk in a token loop; all others run over every token at once. The chunk may be as
large as the smallest delay that closes the cycle: within such a chunk no token reads another token of the chunk
through a delay, so any chunking up to that size computes the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from depthpass.analysis.dependence import back_delays, cycles, dependences
from depthpass.errors import PassError, SpecError
from depthpass.ir.program import Op, Program


@dataclass(frozen=True)
class Region:
    """Ops with one schedule.

    Attributes:
        ops: in an order that respects every dependence inside one chunk.
        chunk: tokens run together, or None when all tokens run at once (a parallel region).
        limit: the largest legal chunk, or None.
    """

    ops: tuple[Op, ...]
    chunk: int | None = None
    limit: int | None = None

    @property
    def serial(self) -> bool:
        return self.chunk is not None

    @property
    def visits(self) -> tuple[Op, ...]:
        return tuple(o for o in self.ops if o.kind == "block")


@dataclass(frozen=True)
class Schedule:
    """Regions in execution order."""

    program: Program
    regions: tuple[Region, ...]

    @property
    def serial_regions(self) -> tuple[Region, ...]:
        return tuple(r for r in self.regions if r.serial)

    @property
    def serial_visits(self) -> int:
        """Visits that run in a token loop."""
        return sum(len(r.visits) for r in self.serial_regions)

    @property
    def chunk(self) -> int | None:
        """Smallest chunk of any serial region; None when nothing is serial."""
        return min((r.chunk for r in self.serial_regions), default=None)

    def steps(self, tokens: int) -> int:
        """Serial block calls for a sequence: wall-clock depth in visits, all chunks counted."""
        return sum(len(r.visits) * (-(-tokens // r.chunk) if r.serial else 1) for r in self.regions)


def schedule(program: Program, chunk: int | None = None) -> Schedule:
    """Derive the schedule of a program.

    Args:
        program: a verified program.
        chunk: ask for a smaller chunk than the largest legal one (same numbers, less memory at once).

    Raises:
        SpecError: ``chunk`` is below 1 or above the smallest delay of a cycle.
        PassError: a route that needs later tokens lies on a delay cycle.
    """
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise SpecError(f"chunk: expected an integer of at least 1, got {chunk!r}.")
    component_of: dict[str, int] = {}
    loops = cycles(program)
    for c, cycle in enumerate(loops):
        component_of |= dict.fromkeys(cycle, c)
    graph = nx.DiGraph()
    order: dict[object, int] = {}
    nodes: dict[object, list[Op]] = {}
    for i, o in enumerate(program.ops):
        key = ("loop", component_of[o.name]) if o.name in component_of else ("op", i)
        nodes.setdefault(key, []).append(o)
        order.setdefault(key, i)
    key_of = {o.name: k for k, ops in nodes.items() for o in ops if o.name}
    graph.add_nodes_from(nodes)
    for d in dependences(program):
        if key_of[d.source] != key_of[d.target]:
            graph.add_edge(key_of[d.source], key_of[d.target])
        elif d.kind == "future" and key_of[d.source][0] == "loop":
            raise PassError("a sequence-level top-k route lies on a delay cycle: it needs tokens that do not exist yet. "
                            "Use rule threshold or choice, or move the delay.")
    for k, ops in nodes.items():
        for o in ops:
            if not o.name:
                graph.add_edges_from((key_of[a], k) for a in o.args)
    regions: list[Region] = []
    parallel: list[Op] = []
    ready = nx.lexicographical_topological_sort(graph, key=lambda k: (k[0] == "loop", order[k]))
    for key in ready:
        if key[0] == "op":
            parallel += nodes[key]
            continue
        if parallel:
            regions.append(Region(tuple(parallel)))
            parallel = []
        limit = min(back_delays(program, loops[key[1]]).values())
        if chunk is not None and chunk > limit:
            raise SpecError(
                f"chunk: expected at most {limit}, the smallest delay on the cycle, got {chunk}. "
                "A larger chunk would read values that are not computed yet."
            )
        regions.append(Region(tuple(nodes[key]), chunk or limit, limit))
    if parallel:
        regions.append(Region(tuple(parallel)))
    return Schedule(program, tuple(regions))
