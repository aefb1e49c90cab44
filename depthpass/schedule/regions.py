"""Schedules, derived from dependences by loop distribution (Allen and Kennedy).

Ops on a delay cycle run chunk by chunk in a token loop; all others run over every token at once. The chunk may be as
large as the smallest delay that closes the cycle: within such a chunk no token reads another token of the chunk
through a delay, so any chunking up to that size computes the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx

from depthpass.analysis.dependence import back_delays, cycles, dependences, slot_order
from depthpass.errors import PassError, SpecError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program
from depthpass.ir.verify import infer
from depthpass.prompt import at_prompt
from depthpass.schedule.stacking import StepOrder, steps


@at_prompt
@dataclass(frozen=True, eq=False)
class Region:
    """Ops with one schedule.

    A region is equal to itself alone: what is made for it (graphs, compiled chunks) lives as long as its own model, not as long
    as the first model with equal ops.

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
    def size(self) -> int:
        """Tokens of a chunk."""
        if self.chunk is None:
            raise TypeError("a parallel region has no chunks")
        return self.chunk

    @property
    def visits(self) -> tuple[Op, ...]:
        return tuple(o for o in self.ops if o.kind == "block")

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the groups that its delays read the last token of: its chunks end where a group of some row does."""
        return tuple(sorted({o["group"] for o in self.ops if o.kind == "delay" and o["group"] is not None}))

    @property
    def counted(self) -> tuple[Op, ...]:
        """What a path counts as visits of blocks: whole ones, and of those that are split the feed-forward networks."""
        return tuple(o for o in self.ops if OPS[o.kind].depth(o)[1])

    @property
    def calls(self) -> tuple[Op, ...]:
        """Its visits, and the feed-forward networks that it runs by themselves."""
        return tuple(o for o in self.ops if o.kind in ("block", "ffn"))


@at_prompt
@dataclass(frozen=True)
class Schedule:
    """Regions in execution order.

    Attributes:
        stacked: orders of small steps in which visits of one block run as one call, smallest step first; empty when
            there is nothing to stack.
    """

    program: Program
    regions: tuple[Region, ...]
    stacked: tuple[StepOrder, ...] = ()

    @property
    def serial_regions(self) -> tuple[Region, ...]:
        return tuple(r for r in self.regions if r.serial)

    @property
    def serial_visits(self) -> int:
        """Visits that run in a token loop."""
        return sum(OPS[o.kind].depth(o)[1] for r in self.serial_regions for o in r.ops)

    @property
    def chunk(self) -> int | None:
        """Smallest chunk of any serial region; None when nothing is serial."""
        return min((r.chunk for r in self.regions if r.chunk is not None), default=None)

    def step(self, tokens: int) -> StepOrder | None:
        """The order with stacked visits for a step of so many new tokens, or None: region by region."""
        return next((s for s in self.stacked if tokens <= s.tokens), None)

    @cached_property
    def reads(self) -> tuple[tuple[str, ...], ...]:
        """Per region, the values its ops read, with the routes that say which tokens they hold."""
        types = infer(self.program)
        reads = []
        for region in self.regions:
            names = {a for o in region.ops for a in o.args}
            # The cross-entropy of a router is taken over the tokens that its route chose from.
            names |= {a for o in region.ops if o.kind == "loss" for r in o.args[1:] for a in self.program.defs[r].args[1:]}
            reads.append(tuple(sorted(names | {t for a in names if (t := types[a].tokens)})))
        return tuple(reads)

    @cached_property
    def results(self) -> tuple[frozenset[str], ...]:
        """Per region, the values that later regions read."""
        results: list[frozenset[str]] = []
        later: frozenset[str] = frozenset()
        for region, read in zip(reversed(self.regions), reversed(self.reads)):
            results.append(later & {o.name for o in region.ops if o.name})
            later |= frozenset(read)
        return tuple(reversed(results))

    @cached_property
    def lowered(self) -> dict[tuple, Any]:
        """Lowered programs of this schedule by what they were made for; filled by what runs them."""
        return {}

    def __reduce__(self):
        # What was lowered belongs to captures of this process, and to the model that ran them.
        return Schedule, (self.program, self.regions, self.stacked)

    def steps(self, tokens: int) -> int:
        """Serial block calls for a sequence: wall-clock depth in visits, all chunks counted."""
        latents = self.program.latents
        return sum(len(r.calls) * (latents + (1 if r.chunk is None else -(-tokens // r.chunk))) for r in self.regions)


def schedule(program: Program, chunk: int | None = None, stack: bool = True) -> Schedule:
    """Derive the schedule of a program.

    Args:
        program: a verified program.
        chunk: ask for a smaller chunk than the largest legal one (same numbers, less memory at once).
        stack: stack visits in small steps where that is legal (same numbers, fewer block calls).

    Raises:
        SpecError: ``chunk`` is below 1 or above the smallest delay of a cycle.
        PassError: a route that needs later tokens lies on a delay cycle.
    """
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise SpecError(f"chunk: expected an integer of at least 1, got {chunk!r}.")
    component_of: dict[str, int] = {}
    loops = cycles(program, slots=True)
    for c, cycle in enumerate(loops):
        component_of |= dict.fromkeys(cycle, c)
    graph = nx.DiGraph()
    order: dict[tuple[str, int], int] = {}
    nodes: dict[tuple[str, int], list[Op]] = {}
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
    graph.add_edges_from((key_of[w], key_of[r]) for w, r in slot_order(program) if key_of[w] != key_of[r])
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
    return Schedule(program, tuple(regions), steps(program) if stack else ())
