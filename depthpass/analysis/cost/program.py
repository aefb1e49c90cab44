"""Cost of a program on a model: FLOPs, bytes, parameters, steps; symbolic in rows, tokens and group, and in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import sympy as sp

from depthpass.analysis.cost.flops import CLASSES
from depthpass.analysis.cost.model import ModelCost
from depthpass.analysis.cost.newops import NewOps, new_ops
from depthpass.analysis.cost.symbols import CONVENTIONS, B, Convention, g, n
from depthpass.analysis.cost.visits import (
    Tokens,
    VisitCost,
    check_capacities,
    stacks,
    stream_tokens,
    visit_costs,
)
from depthpass.analysis.dependence import dependences
from depthpass.analysis.roofline import Ceilings, Floor, Work, floor
from depthpass.errors import InputError, SpecError, did_you_mean
from depthpass.ir.program import Program, plain
from depthpass.ir.verify import infer, verify
from depthpass.schedule import Schedule, schedule

Trainable = Literal["all", "new", "none"]
TRAINABLE: dict[str, str] = {
    "all": "every parameter trains",
    "new": "the stock parameters are frozen, new ones train",
    "none": "no backward pass",
}


@dataclass(frozen=True)
class Quantity:
    """One number of a cost table.

    Attributes:
        name, unit: e.g. ``FLOPs forward`` in ``FLOP``.
        expr: in the positive integer symbols B, n and g.
        note: what it counts.
    """

    name: str
    unit: str
    expr: sp.Expr
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table: a quantity at numbers, beside the stock model.

    Attributes:
        value, stock: numbers in ``unit``; stock None = the stock model has no such thing.
        ratio: value over stock; None when stock is 0 or None.
    """

    name: str
    unit: str
    value: float
    stock: float | None
    ratio: float | None
    note: str = ""


@dataclass(frozen=True)
class RegionCost:
    """One region of the schedule.

    Attributes:
        index: in execution order.
        serial: whether it runs chunk by chunk.
        visits: block visits inside.
        chunk: tokens per step; None = all tokens at once. ``g`` in a serial region with the program's own group.
        steps: how often it runs for one sequence.
        flops: forward, all steps.
        weight_bytes_per_step: weights that one step reads.
        intensity: forward FLOPs per byte of weights read; in FLOP/byte.
    """

    index: int
    serial: bool
    visits: int
    chunk: sp.Expr | None
    steps: sp.Expr
    flops: sp.Expr
    weight_bytes_per_step: sp.Expr
    intensity: sp.Expr


@dataclass(frozen=True)
class Cost:
    """Cost of a program.

    Attributes:
        program, model, schedule: what it is the cost of.
        attention: convention of attention FLOPs, a key of :data:`CONVENTIONS`.
        trainable: a key of :data:`TRAINABLE`.
        flops, backward_flops, decode_flops: by class; decode is one token per row after n - 1 others, as expected
            over routes.
        decode_flops_deepest: the same for a token that takes every route.
        parameters_unique: distinct parameters that the program uses, tied ones once.
        parameters_visited: with repetition, once per visit.
        parameters_new: added by passes.
        quantities: every number in symbols.
        regions: see :class:`RegionCost`.
        notes: conventions, and what is not counted.
        stock: cost of the stock model's own program; None for that program itself.
    """

    program: Program
    model: ModelCost
    schedule: Schedule
    attention: Convention
    trainable: Trainable
    flops: Mapping[str, sp.Expr]
    backward_flops: Mapping[str, sp.Expr]
    decode_flops: Mapping[str, sp.Expr]
    decode_flops_deepest: Mapping[str, sp.Expr]
    parameters_unique: int
    parameters_visited: int
    parameters_new: int
    quantities: tuple[Quantity, ...]
    regions: tuple[RegionCost, ...]
    notes: tuple[str, ...]
    stock: Cost | None = None
    visits: tuple[VisitCost, ...] = field(default=(), repr=False)
    new: NewOps = field(default=NewOps(), repr=False)

    def __getitem__(self, name: str) -> sp.Expr:
        """A quantity in symbols by name."""
        for q in self.quantities:
            if q.name == name:
                return q.expr
        names = [q.name for q in self.quantities]
        raise SpecError(f"cost: no quantity {name!r}.{did_you_mean(name, names)} Known: {', '.join(names)}.")

    @cached_property
    def group(self) -> int | None:
        """Chunk of the serial region that ``g`` stands for; None when nothing is serial."""
        return self.schedule.chunk

    def evaluate(self, expr: sp.Expr, tokens: int, batch: int, group: int | None = None) -> float:
        """A symbolic number at tokens, batch and group (default: the program's own)."""
        _check_sizes(tokens, batch, group)
        value = expr.subs({B: batch, n: tokens, g: group or self.group or tokens})
        return int(value) if value.is_Integer else float(value)

    def at(self, name: str, tokens: int, batch: int = 1, group: int | None = None) -> float:
        """A quantity in numbers.

        Args:
            name: of a quantity, e.g. ``KV bytes``.
            tokens: n.
            batch: B.
            group: another chunk of the serial region, instead of the program's own.
        """
        return self.evaluate(self[name], tokens, batch, group)

    def rows(self, tokens: int, batch: int = 1, group: int | None = None) -> list[Row]:
        """Every quantity in numbers, beside the stock model and as a ratio to it."""
        found = []
        for q in self.quantities:
            value = self.evaluate(q.expr, tokens, batch, group)
            stock = self.stock.at(q.name, tokens, batch) if self.stock else value
            found.append(Row(q.name, q.unit, value, stock, value / stock if stock else None, q.note))
        return found

    def flop_rows(self, tokens: int, batch: int = 1) -> list[Row]:
        """Forward FLOPs by class."""
        found = []
        for c in CLASSES:
            value = self.evaluate(self.flops.get(c, sp.Integer(0)), tokens, batch)
            stock = (self.stock or self).flops.get(c, sp.Integer(0))
            stock = self.evaluate(stock, tokens, batch)
            if value or stock:
                found.append(Row(f"FLOPs forward: {c}", "FLOP", value, stock, value / stock if stock else None))
        return found

    def region_rows(self, tokens: int, batch: int = 1, group: int | None = None) -> list[dict[str, object]]:
        """Regions in numbers."""
        def at(expr: sp.Expr | None) -> float | None:
            return None if expr is None else self.evaluate(expr, tokens, batch, group)

        return [
            {"region": r.index, "schedule": "serial" if r.serial else "parallel", "visits": r.visits,
             "chunk (tokens)": at(r.chunk), "steps": at(r.steps), "FLOPs": at(r.flops),
             "weight bytes per step": at(r.weight_bytes_per_step), "FLOP/byte": at(r.intensity)}
            for r in self.regions
        ]

    def floor(self, ceilings: Ceilings, tokens: int, batch: int = 1, *, sink: bool = True) -> Floor:
        """Roofline seconds of one forward pass, training step and decoded token; see :mod:`depthpass.analysis.roofline`."""
        _check_sizes(tokens, batch, None)
        return floor(self.work(), ceilings, tokens=tokens, batch=batch, trainable=self.trainable, sink=sink,
                     itemsize=self.model.itemsize)

    def work(self) -> tuple[Work, ...]:
        """The matrix multiplies of the program as roofline work, in execution order."""
        return _work(self)


def cost(
    program: Program,
    model: ModelCost,
    *,
    chunk: int | None = None,
    attention: Convention = "visible",
    trainable: Trainable = "all",
    capacities: Mapping[str, float] | None = None,
) -> Cost:
    """Cost of a program on a model.

    Args:
        program: a verified program.
        model: cost of the stock model's parts, from :func:`depthpass.analysis.cost.model_cost`.
        chunk: a smaller chunk of the serial regions than the largest legal one.
        attention: convention of attention FLOPs.
        trainable: which parameters train; decides the backward FLOPs.
        capacities: expected share of tokens by route name, for routes whose share depends on the data.

    Raises:
        SpecError: an unknown convention, a chunk that is not legal, a program that does not fit the model.
    """
    for name, value, known in (("attention", attention, CONVENTIONS), ("trainable", trainable, TRAINABLE)):
        if value not in known:
            raise SpecError(f"{name}: expected one of {', '.join(known)}, got {value!r}.{did_you_mean(str(value), known)}")
    if program.blocks != len(model.blocks) or program.width != model.width:
        raise SpecError(
            f"cost: the program is for {program.blocks} blocks of width {program.width}, the model has "
            f"{len(model.blocks)} of width {model.width}. Build the program for this model."
        )
    stock_program = plain(program.model, program.blocks, program.width)
    is_stock = program.without_notes().renumbered() == stock_program
    stock = None if is_stock else cost(stock_program, model, attention=attention, trainable=trainable)
    return _Builder(verify(program), model, chunk, attention, trainable, capacities or {}).build(stock)


def visit_equivalents(program: Program, capacities: Mapping[str, float] | None = None) -> sp.Rational:
    """Visits per token, each weighted with the expected share of tokens that take it.

    Over the number of blocks this is the relative cost most papers print: |P|/L for layer programs, sum(r)/L for
    intra-layer recurrence, (P + T*C + K)/L for loops, 1 + share*sum(rho) for Inner Thinking.
    """
    check_capacities(program, capacities or {})
    tokens = stream_tokens(program, infer(program), capacities or {})
    return sum((tokens[o.name].share for o in program.visits), sp.Integer(0))


def _check_sizes(tokens: int, batch: int, group: int | None) -> None:
    for name, value in (("tokens", tokens), ("batch", batch), ("group", group)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}.")


def _add(where: dict[str, sp.Expr], new: Mapping[str, sp.Expr], times: sp.Expr = sp.Integer(1)) -> None:
    for c, e in new.items():
        where[c] = where.get(c, sp.Integer(0)) + times * e


def _sum(values) -> sp.Expr:
    return sum(values, sp.Integer(0))


class _Builder:
    def __init__(self, program, model, chunk, attention, trainable, capacities):
        check_capacities(program, capacities)
        self.program, self.model, self.attention, self.trainable = program, model, attention, trainable
        self.types = infer(program)
        self.tokens = stream_tokens(program, self.types, capacities)
        self.visits = visit_costs(program, model, self.tokens)
        self.by_name = {v.op.name: v for v in self.visits}
        self.new = new_ops(program, model, self.types, self.tokens)
        self.schedule = schedule(program, chunk)
        self.size = model.itemsize
        last = self.types[program.output].pads
        self.head_tokens = Tokens(n + last, sp.Integer(1))
        self.heads = 1 + sum(1 for t in program.taps if t["head"])

    def build(self, stock: Cost | None) -> Cost:
        flops, backward = self._flops()
        decode, deepest = self._decode(expected=True), self._decode(expected=False)
        regions = self._regions()
        unique, visited = self._parameters()
        return Cost(
            self.program, self.model, self.schedule, self.attention, self.trainable, flops, backward, decode, deepest,
            unique, visited, self.new.parameters, self._quantities(flops, backward, decode, deepest, regions, unique,
            visited), regions, self._notes(), stock, self.visits, self.new,
        )

    def _around(self, norms: int, heads: int) -> dict[str, sp.Expr]:
        """FLOPs of what stands around the blocks, in B and n."""
        found: dict[str, sp.Expr] = {}
        _add(found, self.model.embed.count.gemm_flops)
        _add(found, self.model.norm.count.gemm_flops, sp.Integer(norms))
        _add(found, self.model.head.count.gemm_flops, sp.Integer(heads))
        return {c: e.xreplace({n: self.head_tokens.total}) for c, e in found.items()}

    @cached_property
    def _norms(self) -> int:
        return sum(1 for o in self.program.ops if o.kind == "norm")

    def _flops(self) -> tuple[dict[str, sp.Expr], dict[str, sp.Expr]]:
        forward = self._around(self._norms, self.heads)
        backward: dict[str, sp.Expr] = {}
        graded = self._graded()
        twice = sp.Integer(2 if self.trainable == "all" else 1)
        if self.trainable != "none":
            # The gradient reaches the head and the final norm whatever trains below them.
            _add(backward, {c: e for c, e in forward.items() if c != "embed"}, twice)
        for v in self.visits:
            gemm, attention = v.gemm_flops(), {"attention": v.attention_flops(self.attention)}
            _add(forward, gemm)
            _add(forward, attention)
            if v.op.name in graded:
                _add(backward, gemm, twice)
                _add(backward, attention, sp.Integer(2))
        _add(forward, {"new": self.new.flops})
        if self.trainable != "none":
            _add(backward, {"new": 2 * self.new.flops})
        return _ordered(forward), _ordered(backward)

    def _graded(self) -> frozenset[str]:
        """Values whose computation needs a backward pass."""
        if self.trainable == "none":
            return frozenset()
        if self.trainable == "all":
            return frozenset(self.by_name)
        reads: dict[str, list[str]] = {}
        for d in dependences(self.program):
            reads.setdefault(d.source, []).append(d.target)
        seen: set[str] = set()
        todo = list(self.new.trained)
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += reads.get(name, [])
        return frozenset(seen)

    def _decode(self, expected: bool) -> dict[str, sp.Expr]:
        found = {c: e.xreplace({n: sp.Integer(1)}) for c, e in self._plain_around().items()}
        for v in self.visits:
            times = v.tokens.share if expected else sp.Integer(1)
            _add(found, v.decode_gemm_flops(), times)
            _add(found, {"attention": v.decode_attention_flops()}, times)
        _add(found, {"new": self.new.decode_flops if expected else self.new.decode_flops_deepest})
        return _ordered(found)

    def _plain_around(self) -> dict[str, sp.Expr]:
        found: dict[str, sp.Expr] = {}
        for part, times in ((self.model.embed, 1), (self.model.norm, self._norms), (self.model.head, self.heads)):
            _add(found, part.count.gemm_flops, sp.Integer(times))
        return found

    def _regions(self) -> tuple[RegionCost, ...]:
        found = []
        for i, region in enumerate(self.schedule.regions):
            inside = [self.by_name[o.name] for o in region.visits]
            total = max((self.tokens[o.name].total for o in region.ops if o.name), key=lambda t: t.subs(n, 1),
                        default=n)
            chunk = None
            if region.serial:
                chunk = g if region.chunk == self.schedule.chunk else sp.Integer(region.chunk)
            steps = sp.ceiling(total / chunk) if region.serial else sp.Integer(1)
            flops = _sum(e for v in inside for e in v.gemm_flops().values())
            flops += _sum(v.attention_flops(self.attention) for v in inside)
            flops += _sum(self.new.by_op.get(o.name, sp.Integer(0)) for o in region.ops)
            elements = _sum(self._read_elements(v, chunk) for v in inside)
            elements += sum(self.new.elements.get(o.name, 0) for o in region.ops)
            moved = sp.expand(elements * self.size)
            intensity = sp.Integer(0) if moved == 0 else flops / (moved * steps)
            found.append(RegionCost(i, region.serial, len(inside), chunk, steps, sp.expand(flops), moved, intensity))
        return tuple(found)

    def _read_elements(self, v: VisitCost, chunk: sp.Expr | None) -> sp.Expr:
        weights = v.part.weights
        rows = B * (v.tokens.total if chunk is None else v.tokens.share * chunk)
        if not weights.expert:
            return sp.Integer(weights.dense)
        unread = (1 - sp.Rational(weights.chosen, weights.experts)) ** rows
        return weights.dense + weights.expert * (1 - unread)

    def _parameters(self) -> tuple[int, int]:
        used = {v.op["index"] for v in self.visits}
        idle = sum(p.weights.total for i, p in enumerate(self.model.blocks) if i not in used)
        unique = self.model.parameters - idle + self.new.parameters
        visited = self.model.embed.weights.total + self._norms * self.model.norm.weights.total
        visited += self.heads * self.model.head.weights.total + self.new.parameters_visited
        return unique, visited + sum(v.part.weights.total for v in self.visits)

    def _quantities(self, flops, backward, decode, deepest, regions, unique, visited) -> tuple[Quantity, ...]:
        size = self.size
        element = _sum(e.xreplace({n: v.tokens.total}) for v in self.visits
                       for e in v.part.count.elementwise_flops.values())
        element += _sum(e for p in (self.model.embed, self.model.norm, self.model.head)
                        for e in p.count.elementwise_flops.values()) + self.new.elementwise_flops
        kv = _sum(v.slot_elements() for v in self.visits) * size
        reads = _sum(v.tokens.share * v.decode_read_elements() for v in self.visits) * size
        reads_deepest = _sum(v.decode_read_elements() for v in self.visits) * size
        serial = [r for r in regions if r.serial]
        moved = _sum(r.weight_bytes_per_step * r.steps for r in regions) + self._outer_bytes()
        calls = stacks(self.program)
        steps = _sum(r.visits * r.steps for r in regions)
        return tuple(Quantity(name, unit, sp.sympify(e), note) for name, unit, e, note in (
            ("FLOPs forward", "FLOP", _sum(flops.values()), "matrix multiplies and attention"),
            ("FLOPs backward", "FLOP", _sum(backward.values()), TRAINABLE[self.trainable]),
            ("FLOPs decode", "FLOP", _sum(decode.values()), "one token per row at position n, expected over routes"),
            ("FLOPs decode, deepest token", "FLOP", _sum(deepest.values()), "a token that takes every route"),
            ("elementwise forward", "op", element, "norms, activations, rotary embedding; not in FLOPs"),
            ("parameters unique", "parameter", unique, "tied ones once, unused blocks left out"),
            ("parameters visited", "parameter", visited, "once per visit"),
            ("parameters new", "parameter", self.new.parameters, "added by passes"),
            ("weight bytes forward", "byte", moved, "weights read, once per visit and step; embedding rows only"),
            ("weight bytes per serial step", "byte", _sum(r.weight_bytes_per_step for r in serial),
             "weights that one step of the token loop reads"),
            ("weight bytes decode", "byte", self._decode_bytes(calls),
             "weights read per decoded token; visits stacked in one call read once"),
            ("KV slots", "slot", len(self.program.slots), "one per visit that keeps keys and values"),
            ("KV bytes", "byte", kv, "after n tokens"),
            ("KV bytes read, decode", "byte", reads, "one token per row at position n, expected over routes"),
            ("KV bytes read, decode, deepest token", "byte", reads_deepest, "a token that takes every route"),
            ("delay line bytes", "byte", self._delay_bytes(), "last tokens of every delayed stream"),
            ("activation bytes kept", "byte", self._saved(), "for backward, without checkpointing; an estimate"),
            ("activation bytes peak, forward", "byte", self._peak(regions) + kv + self._delay_bytes(),
             "with KV and delay lines; an estimate"),
            ("serial block calls", "call", steps, "of one forward pass, one after the other"),
            ("serial steps", "step", _sum(r.steps for r in serial), "trips of the token loop"),
            ("decode block calls", "call", len(calls), "per decoded token, one after the other"),
        ))

    def _outer_bytes(self) -> sp.Expr:
        """Weights around the blocks: embedding rows, final norms, heads."""
        elements = B * self.head_tokens.total * self.model.width
        elements += self._norms * self.model.norm.weights.total + self.heads * self.model.head.weights.total
        return sp.expand(elements * self.size)

    def _decode_bytes(self, calls) -> sp.Expr:
        elements = _sum(
            self._decode_elements(self.by_name[stack[0]], len(stack)) for stack in calls
        ) + sum(self.new.elements.values())
        elements += B * self.model.width + self._norms * self.model.norm.weights.total
        elements += self.heads * self.model.head.weights.total
        return sp.expand(elements * self.size)

    def _decode_elements(self, v: VisitCost, rows: int) -> sp.Expr:
        weights = v.part.weights
        if not weights.expert:
            return sp.Integer(weights.dense)
        unread = (1 - sp.Rational(weights.chosen, weights.experts)) ** (B * rows)
        return weights.dense + weights.expert * (1 - unread)

    def _delay_bytes(self) -> sp.Expr:
        """A line per delayed stream, as long as its longest delay; a line as long as the group scales with g."""
        longest: dict[str, int] = {}
        for o in self.program.ops:
            if o.kind == "delay":
                longest[o.args[0]] = max(longest.get(o.args[0], 0), o["tokens"])
        limit = next((r.limit for r in self.schedule.serial_regions if r.chunk == r.limit == self.schedule.chunk), None)
        return _sum(
            B * (g if length == limit else length) * self.types[source].width * self.size
            for source, length in longest.items()
        )

    def _saved(self) -> sp.Expr:
        if self.trainable == "none":
            return sp.Integer(0)
        graded = self._graded()
        kept = _sum(v.part.count.memory.saved_bytes.xreplace({n: v.tokens.total})
                    for v in self.visits if v.op.name in graded)
        around = self._norms * self.model.norm.count.memory.saved_bytes
        around += self.heads * self.model.head.count.memory.saved_bytes
        if self.trainable == "all":
            around += self.model.embed.count.memory.saved_bytes
        return sp.expand(kept + around.xreplace({n: self.head_tokens.total}) + self.new.saved_elements * self.size)

    def _peak(self, regions) -> sp.Expr:
        """Largest sum of values alive inside one call, plus the streams that wait between regions."""
        candidates: set[sp.Expr] = set()
        for region, found in zip(self.schedule.regions, regions):
            for o in region.visits:
                v = self.by_name[o.name]
                rows = v.tokens.total if found.chunk is None else v.tokens.share * found.chunk
                candidates |= {e.xreplace({n: rows}) for e in v.part.count.memory.peak_bytes}
        for part in (self.model.embed, self.model.norm, self.model.head):
            candidates |= set(part.count.memory.peak_bytes)
        return sp.Max(*candidates) + self._waiting()

    def _waiting(self) -> sp.Expr:
        home = {o.name: i for i, r in enumerate(self.schedule.regions) for o in r.ops if o.name}
        waits = {
            a for i, r in enumerate(self.schedule.regions) for o in r.ops for a in o.args
            if home.get(a, i) != i and not self.types[a].is_route
        }
        return _sum(B * self.tokens[a].total * self.types[a].width * self.size for a in sorted(waits))

    def _notes(self) -> tuple[str, ...]:
        notes = [
            CONVENTIONS[self.attention],
            "a multiply-add is two FLOPs; norms, activations, softmax and biases are not in FLOPs",
            "backward attention is twice forward: nothing is recomputed",
            f"bytes are in {str(self.model.dtype).removeprefix('torch.')}; the optimizer and activations are not in "
            "weight bytes",
        ]
        routes = [o for o in self.program.ops if o.kind == "route"]
        if routes:
            notes.append("routed tokens are taken to lie uniformly over the row")
        open_routes = [f"%{o.name}" for o in routes if o["rule"] != "topk"]
        if open_routes:
            notes.append(f"routes {', '.join(open_routes)} depend on the data: the share is the one given or written on "
                         "the route, else 1")
        if self.model.uncounted:
            notes.append(f"not counted, not understood: {', '.join(self.model.uncounted)}")
        return (*notes, *self.new.notes)


def _ordered(found: Mapping[str, sp.Expr]) -> dict[str, sp.Expr]:
    return {c: sp.expand(found[c]) for c in CLASSES if c in found and found[c] != 0}


def _work(cost: Cost) -> tuple[Work, ...]:
    """Visits, new maps, final norms' weightless parts left out, and heads, with their chunk."""
    def of(name: str, flops_per_token: sp.Expr, weights, share: sp.Expr, chunk: int | None, trained: bool) -> Work:
        return Work(name, float(flops_per_token) / 2, weights, chunk, trained, float(share))

    found = []
    base = cost.trainable == "all"
    by_name = {v.op.name: v for v in cost.visits}
    graded = {v.op.name for v in cost.visits} if base else set(_graded_names(cost))
    for region in cost.schedule.regions:
        for o in region.ops:
            if o.name in by_name:
                v = by_name[o.name]
                per_token = sum(v.gemm_flops().values()) / (B * v.tokens.total)
                found.append(Work(
                    f"%{o.name} block {o['index']}", float(sp.cancel(per_token)) / 2, v.part.weights, region.chunk,
                    base, o.name in graded, float(v.tokens.share),
                ))
    return tuple(found)


def _graded_names(cost: Cost) -> frozenset[str]:
    return _Builder(cost.program, cost.model, None, cost.attention, cost.trainable, {})._graded()
