"""Visits of a program with what each works on: its tokens, the keys it reads, the part of the model it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy as sp

from depthpass.analysis.cost.stock import ModelCost, PartCost
from depthpass.analysis.cost.symbols import AttentionSite, B, Convention, at_tokens, n, per_token
from depthpass.errors import SpecError, did_you_mean
from depthpass.ir.definitions import Type
from depthpass.ir.program import Op, Program, reads_slots, writes_slot
from depthpass.ir.shares import exact_share
from depthpass.ir.structural_ops import keys_from
from depthpass.schedule.stacking import Stack, steps


@dataclass(frozen=True)
class Tokens:
    """How many tokens of a row a stream holds.

    Attributes:
        total: in n; pads included.
        share: expected share of the tokens, for one token at a time; 1 for a stream over all tokens.
    """

    total: sp.Expr
    share: sp.Expr


@dataclass(frozen=True)
class Read:
    """One attention read of a visit: a slot, its tokens, and the narrower window of a gated read."""

    slot: int
    keys: Tokens
    window: int | None


@dataclass(frozen=True)
class VisitCost:
    """One visit.

    Attributes:
        op: the ``block`` op, or the ``ffn`` of one.
        part: the block it runs.
        tokens: its queries.
        sources: the tokens whose keys and values it computes; more than its queries where only routed tokens ask.
        reads: the slots it attends to.
        writes: whether it computes keys and values of its own.
        ahead: how far its queries see later keys.
    """

    op: Op
    part: PartCost
    tokens: Tokens
    sources: Tokens
    reads: tuple[Read, ...]
    writes: bool
    ahead: int | None = None

    @property
    def keeps(self) -> bool:
        """Whether its keys and values outlive a call."""
        return self.writes and self.op["past"] is None

    def sites(self, read: Read) -> tuple[AttentionSite, ...]:
        """The block's attention calls as this read runs them."""
        if read.window is None:
            return tuple(replace(s, ahead=self.ahead) for s in self.part.count.sites)
        return tuple(
            replace(s, window=min(s.window or read.window, read.window)) for s in self.part.count.sites
        )

    def gemm_flops(self) -> dict[str, sp.Expr]:
        """Matrix multiplies outside attention, by class, in B and n; keys and values nobody reads are left out."""
        asked, keys = self._split()
        flops = {c: at_tokens(e, self.tokens.total) for c, e in asked.items()}
        flops["projection"] = flops.get("projection", sp.Integer(0)) + at_tokens(keys, self.sources.total)
        return flops

    def _split(self) -> tuple[dict[str, sp.Expr], sp.Expr]:
        """FLOPs of what the queries run, by class, and of the keys and values that are computed."""
        asked, keys = dict(self.part.count.gemm_flops), self.part.count.key_value_flops
        asked["projection"] = asked["projection"] - keys
        return asked, keys if self.writes else sp.Integer(0)

    def gemm_flops_per_token(self) -> dict[str, sp.Expr]:
        """The same for one token of the visit, as expected over routes."""
        asked, keys = self._split()
        flops = {c: per_token(e) for c, e in asked.items()}
        share = self.sources.share / self.tokens.share if self.tokens.share else sp.Integer(0)
        flops["projection"] += per_token(keys) * share
        return flops

    def attention_flops(self, convention: Convention) -> sp.Expr:
        return sum(
            (B * s.flops_per_pair * s.pairs(self.tokens.total, read.keys.total, convention)
             for read in self.reads for s in self.sites(read)),
            sp.Integer(0),
        )

    def decode_gemm_flops(self, expected: bool) -> dict[str, sp.Expr]:
        """The same for one token per row: as expected over routes, or when it takes this visit."""
        asked, keys = self._split()
        one = sp.Integer(1)
        flops = {c: at_tokens(e, one) * (self.tokens.share if expected else 1) for c, e in asked.items()}
        flops["projection"] += at_tokens(keys, one) * (self.sources.share if expected else 1)
        return flops

    def decode_attention_flops(self) -> sp.Expr:
        """One query at the end of n tokens."""
        return sum(
            (B * s.flops_per_pair * s.decode_pairs(read.keys.total) for read in self.reads for s in self.sites(read)),
            sp.Integer(0),
        )

    def decode_read_elements(self) -> sp.Expr:
        """KV elements that one query at the end of n tokens reads."""
        return sum(
            (B * s.kv_width * s.decode_pairs(read.keys.total) for read in self.reads for s in self.sites(read)),
            sp.Integer(0),
        )

    def held_elements(self) -> sp.Expr:
        """Elements of the slot this visit writes when every token is kept."""
        return B * self.part.kv_width * self.sources.total if self.keeps else sp.Integer(0)

    def slot_elements(self) -> sp.Expr:
        """Elements of the slot this visit writes that some later token can still see."""
        own = next((r for r in self.reads if r.slot == self.op["slot"]), None)
        if not self.keeps or own is None:
            return sp.Integer(0)
        return sum((B * s.kv_width * s.slot_tokens(self.sources.total) for s in self.sites(own)), sp.Integer(0))


def stream_tokens(program: Program, types: Mapping[str, Type], capacities: Mapping[str, float]) -> dict[str, Tokens]:
    """Tokens of every value. Routed streams hold the route's share; see :func:`route_share`."""
    tokens = {}
    for o in program.ops:
        if not o.name:
            continue
        kind = types[o.name]
        total = n + kind.pads
        if kind.tokens is None:
            tokens[o.name] = Tokens(total, sp.Integer(1))
            continue
        route = program.defs[kind.tokens]
        share = route_share(route, capacities)
        tokens[o.name] = Tokens(_routed(route, share, total), share)
    return tokens


def _routed(route: Op, share: sp.Expr, total: sp.Expr) -> sp.Expr:
    if share in (0, 1):
        return share * total
    if route["rule"] != "topk":
        return share * total
    rounded = sp.ceiling(share * total) if route["rounding"] == "ceil" else sp.floor(share * total)
    return sp.Max(1, rounded)


def route_share(route: Op, capacities: Mapping[str, float]) -> sp.Expr:
    """Share of a row's tokens that a route takes.

    ``topk`` says it; a threshold or a choice is data-dependent, so the share is what the caller expects, else the
    capacity written on the route, else 1 (an upper bound).
    """
    given = capacities.get(route.name, route["capacity"])
    if given is None:
        return sp.Integer(1)
    exact = exact_share(float(given))
    return sp.Rational(exact.numerator, exact.denominator)


def check_capacities(program: Program, capacities: Mapping[str, float]) -> None:
    """Refuse shares for values that are no routes, or that are no shares."""
    routes = [o.name for o in program.ops if o.kind == "route"]
    for name, value in capacities.items():
        if name not in routes:
            raise SpecError(f"capacities: expected names of routes ({', '.join(routes) or 'the program has none'}), "
                            f"got {name!r}.{did_you_mean(name, routes)}")
        if not 0 <= value <= 1:
            raise SpecError(f"capacities[{name!r}]: expected a share between 0 and 1, got {value!r}.")


def visit_costs(program: Program, model: ModelCost, tokens: Mapping[str, Tokens]) -> tuple[VisitCost, ...]:
    """The visits, and feed-forward networks that run by themselves, in program order."""
    writers = {writes_slot(o): o for o in program.visits}
    costs = []
    for o in program.ops:
        if o.kind == "ffn":
            part = model.blocks[o["index"]].parts()[1]
            costs.append(VisitCost(o, part, tokens[o.name], tokens[o.name], (), False))
        if o.kind != "block":
            continue
        reads = tuple(
            Read(s, tokens[keys_from(writers[s])], o["window"] if o["gate"] is not None and s == o["slot"] else None)
            for s in reads_slots(o)
        )
        writes = writes_slot(o) is not None
        block = model.blocks[o["index"]]
        part = block if o["part"] == "whole" else block.parts()[0]
        costs.append(VisitCost(o, part, tokens[o.name], tokens[o.args[0]], reads, writes, program.ahead))
    return tuple(costs)


def stacks(program: Program) -> tuple[tuple[str, ...], ...]:
    """Visits that one token runs as rows of one call, as the schedule runs them; every visit is in exactly one stack.

    This is what makes loops parallel at decode (cross-loop parallelism): the second loop of a token reads the first
    loop of the *previous* token.
    """
    step = next(iter(steps(program)), None)
    items = [i for i in (program.ops if step is None else step.items) if isinstance(i, Stack) or i.kind in ("block", "ffn")]
    return tuple(i.names if isinstance(i, Stack) else (i.name,) for i in items)
