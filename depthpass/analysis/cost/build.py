"""Puts the cost of a program together from its visits, its new ops, its schedule and the parts of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import sympy as sp

from depthpass.analysis.cost.flops import CLASSES
from depthpass.analysis.cost.newops import new_ops
from depthpass.analysis.cost.program import TRAINABLE, Cost, Quantity, RegionCost, Trainable
from depthpass.analysis.cost.stock import ModelCost, PartCost
from depthpass.analysis.cost.symbols import CONVENTIONS, B, Convention, at_tokens, g, n
from depthpass.analysis.cost.visits import VisitCost, check_capacities, stacks, stream_tokens, visit_costs
from depthpass.analysis.dependence import dependences
from depthpass.analysis.roofline import Dense, Work
from depthpass.errors import SpecError, did_you_mean
from depthpass.ir.ops import OPS
from depthpass.ir.program import Program, plain
from depthpass.ir.verify import infer, verify
from depthpass.schedule import Region, schedule

_ONE = sp.Integer(1)


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
        trainable: which parameters train; decides what backward costs.
        capacities: expected share of tokens by route name, for routes whose share depends on the data.

    Raises:
        SpecError: an unknown convention, a chunk that is not legal, a program that does not fit the model.
    """
    for name, value, known in (("attention", attention, CONVENTIONS), ("trainable", trainable, TRAINABLE)):
        if value not in known:
            hint = did_you_mean(str(value), known)
            raise SpecError(f"{name}: expected one of {', '.join(known)}, got {value!r}.{hint}")
    if program.blocks != len(model.blocks) or program.width != model.width:
        raise SpecError(
            f"cost: the program is for {program.blocks} blocks of width {program.width}, the model has "
            f"{len(model.blocks)} of width {model.width}. Build the program for this model."
        )
    own = plain(program.model, program.blocks, program.width)
    is_stock = program.without_notes().renumbered() == own
    stock = None if is_stock else cost(own, model, attention=attention, trainable=trainable)
    return _Builder(verify(program), model, chunk, attention, trainable, capacities or {}).build(stock)


def visit_equivalents(program: Program, capacities: Mapping[str, float] | None = None) -> sp.Expr:
    """Visits per token, each weighted with the expected share of tokens that take it.

    Over the number of blocks this is the relative cost that most papers print: |P|/L for layer programs, sum(r)/L for
    intra-layer recurrence, (P + T*C + K)/L for loops, 1 + layers*sum(rho)/L for Inner Thinking.
    """
    check_capacities(program, capacities or {})
    tokens = stream_tokens(program, infer(program), capacities or {})
    return _sum(tokens[o.name].share for o in program.visits)


def _sum(values: Iterable[sp.Expr]) -> sp.Expr:
    return sp.Add(*values)  # all at once: one by one takes the square of their number


def _add(where: dict[str, sp.Expr], new: Mapping[str, sp.Expr], times: sp.Expr | int = 1) -> None:
    for c, e in new.items():
        where[c] = where.get(c, sp.Integer(0)) + times * e


def _ordered(flops: Mapping[str, sp.Expr]) -> dict[str, sp.Expr]:
    return {c: sp.expand(flops[c]) for c in CLASSES if c in flops and flops[c] != 0}


class _Builder:
    def __init__(
        self, program: Program, model: ModelCost, chunk: int | None, attention: Convention, trainable: Trainable,
        capacities: Mapping[str, float],
    ):
        check_capacities(program, capacities)
        self.program, self.model = program, model
        self.attention: Convention = attention
        self.trainable: Trainable = trainable
        self.types = infer(program)
        self.tokens = stream_tokens(program, self.types, capacities)
        self.visits = visit_costs(program, model, self.tokens)
        self.by_name = {v.op.name: v for v in self.visits}
        self.new = new_ops(program, model, self.types, self.tokens)
        self.schedule = schedule(program, chunk)
        self.total = n + self.types[program.output].pads
        norms = sum(1 for o in program.ops if o.kind == "norm")
        heads = 1 + sum(1 for t in program.taps if t["head"])
        self.around: tuple[tuple[PartCost, int], ...] = ((model.embed, 1), (model.norm, norms), (model.head, heads))
        self.stacks = stacks(program)

    def build(self, stock: Cost | None) -> Cost:
        forward, backward = self._forward(), self._backward()
        decode, deepest = self._decode(expected=True), self._decode(expected=False)
        regions = tuple(self._region(i, r) for i, r in enumerate(self.schedule.regions))
        return Cost(
            self.program, self.model, self.schedule, self.attention, self.trainable, forward, backward, decode,
            self._quantities(forward, backward, decode, deepest, regions), regions, self._work(), self._notes(), stock,
        )

    # FLOPs ---------------------------------------------------------------------------------------------------

    def _forward(self) -> dict[str, sp.Expr]:
        flops: dict[str, sp.Expr] = {"new": self.new.flops + _sum(self._fixed().values())}
        for part, times in self.around:
            _add(flops, {c: at_tokens(e, self.total) for c, e in part.count.gemm_flops.items()}, times)
        for v in self.visits:
            _add(flops, v.gemm_flops())
            _add(flops, {"attention": v.attention_flops(self.attention)})
        return _ordered(flops)

    def _backward(self) -> dict[str, sp.Expr]:
        """Twice forward where weights train (input and weight gradient), once where the gradient only passes."""
        if self.trainable == "none":
            return {}
        times = 2 if self.trainable == "all" else 1
        stopped = self.program.stopped
        new = [*self.new.by_op.items(), *self._fixed().items()]
        flops: dict[str, sp.Expr] = {"new": 2 * _sum(e for k, e in new if k not in stopped)}
        for part, repeats in self.around[1:]:
            _add(flops, {c: at_tokens(e, self.total) for c, e in part.count.gemm_flops.items()}, times * repeats)
        for v in self.visits:
            if v.op.name in self.graded:
                # A LoRA of the visit gets its gradient through that of the weight it is added to.
                _add(flops, v.gemm_flops(), 2 if v.op.kind == "block" and v.op["lora"] else times)
                _add(flops, {"attention": v.attention_flops(self.attention)}, 2)
        return _ordered(flops)

    def _fixed(self) -> dict[str, sp.Expr]:
        """FLOPs by visit name of what it does in every call, over all its calls."""
        calls = {o.name: self._steps(r) for r in self.schedule.regions for o in r.visits}
        return {k: e * calls[k] for k, e in self.new.per_call.items()}

    def _chunk(self, region: Region) -> sp.Expr | None:
        if region.chunk is None:
            return None
        return g if region.chunk == self.schedule.chunk else sp.Integer(region.chunk)

    def _steps(self, region: Region) -> sp.Expr:
        """Calls of one sequence; latents run one by one."""
        chunk, latents = self._chunk(region), self.program.latents
        pads = max((self.types[o.name].pads for o in region.ops if o.name), default=0) - latents
        return latents + (_ONE if chunk is None else sp.ceiling((n + pads) / chunk))

    @cached_property
    def graded(self) -> frozenset[str]:
        """Values through which a gradient flows."""
        if self.trainable == "none":
            return frozenset()
        if self.trainable == "all":
            return frozenset(o.name for o in self.program.ops if o.name) - self.program.stopped
        readers: dict[str, list[str]] = {}
        for d in dependences(self.program):
            readers.setdefault(d.source, []).append(d.target)
        seen: set[str] = set()
        todo = list(self.new.trained)
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += readers.get(name, [])
        return frozenset(seen) - self.program.stopped

    def _decode(self, expected: bool) -> dict[str, sp.Expr]:
        flops: dict[str, sp.Expr] = {"new": self.new.decode_flops(expected)}
        for part, times in self.around:
            _add(flops, {c: at_tokens(e, _ONE) for c, e in part.count.gemm_flops.items()}, times)
        for v in self.visits:
            times = v.tokens.share if expected else _ONE
            _add(flops, v.decode_gemm_flops(expected))
            _add(flops, {"attention": v.decode_attention_flops()}, times)
        return _ordered(flops)

    # Bytes ---------------------------------------------------------------------------------------------------

    def _region(self, index: int, region: Region) -> RegionCost:
        inside = [self.by_name[o.name] for o in region.calls]
        chunk, steps = self._chunk(region), self._steps(region)
        flops = _sum(e for v in inside for e in v.gemm_flops().values())
        flops += _sum(v.attention_flops(self.attention) for v in inside)
        flops += _sum(self.new.by_op.get(o.name, sp.Integer(0)) for o in region.ops)
        flops += steps * sum(self.new.per_call.get(o.name, 0) for o in region.visits)
        read = _sum(self._elements(v, B * v.tokens.total if chunk is None else B * v.tokens.share * chunk)
                    for v in inside)
        read += sum(self.new.elements.get(o.name, 0) for o in region.ops)
        return RegionCost(index, region.serial, len(region.counted), chunk, steps, sp.expand(flops),
                          sp.expand(read * self.model.itemsize))

    def _elements(self, v: VisitCost, rows: sp.Expr) -> sp.Expr:
        """Weights that a run of so many rows reads, experts as expected under uniform routing."""
        weights = v.part.weights
        if not weights.expert:
            return sp.Integer(weights.dense)
        unread = (1 - sp.Rational(weights.chosen, weights.experts)) ** rows
        return weights.dense + weights.expert * (1 - unread)

    def _outer_elements(self, tokens: sp.Expr) -> sp.Expr:
        """Weights read around the blocks: embedding rows, final norms, heads."""
        return B * tokens * self.model.width + sum(p.weights.total * times for p, times in self.around[1:])

    def _decode_elements(self) -> sp.Expr:
        read = _sum(self._elements(self.by_name[s[0]], B * len(s)) for s in self.stacks)
        return read + sum(self.new.elements.values()) + self._outer_elements(_ONE)

    def _delay_bytes(self) -> sp.Expr:
        """A line per delay op, as long as its delay; one as long as the group scales with g."""
        chunk = self.schedule.chunk
        group = chunk if any(r.chunk == r.limit == chunk for r in self.schedule.serial_regions) else None
        return _sum(
            B * (g if OPS[o.kind].lag(o) == group else OPS[o.kind].lag(o)) * self.types[o.name].width * self.model.itemsize
            for o in self.program.ops if o.kind == "delay"
        )

    def _saved_bytes(self) -> sp.Expr:
        if self.trainable == "none":
            return sp.Integer(0)
        kept = _sum(at_tokens(v.part.count.memory.saved_bytes, v.tokens.total)
                    for v in self.visits if v.op.name in self.graded)
        around = self.around if self.trainable == "all" else self.around[1:]
        kept += at_tokens(_sum(p.count.memory.saved_bytes * times for p, times in around), self.total)
        # What the prologue hands out besides the hidden stream (rotary tables) is kept once for all visits.
        side_inputs = self.model.embed.count.memory.result_bytes - B * n * self.model.width * self.model.itemsize
        kept += at_tokens(side_inputs, self.total)
        return sp.expand(kept + self.new.saved_elements * self.model.itemsize)

    def _peak_bytes(self, regions: tuple[RegionCost, ...]) -> sp.Expr:
        """Largest sum of values alive inside one call, and the streams that wait between regions."""
        calls = {at_tokens(e, self.total) for p, _ in self.around for e in p.count.memory.peak_bytes}
        for region, region_cost in zip(self.schedule.regions, regions):
            for o in region.visits:
                v = self.by_name[o.name]
                rows = v.tokens.total if region_cost.chunk is None else v.tokens.share * region_cost.chunk
                calls |= {at_tokens(e, rows) for e in v.part.count.memory.peak_bytes}
        home = {o.name: i for i, r in enumerate(self.schedule.regions) for o in r.ops if o.name}
        waiting = {a for i, r in enumerate(self.schedule.regions) for o in r.ops for a in o.args
                   if home[a] != i and not self.types[a].is_route}
        return sp.Max(*calls) + _sum(
            B * self.tokens[a].total * self.types[a].width * self.model.itemsize for a in sorted(waiting)
        )

    # Tables --------------------------------------------------------------------------------------------------

    def _parameters(self) -> tuple[int, int]:
        used = {v.op["index"] for v in self.visits}
        idle = sum(p.weights.total for i, p in enumerate(self.model.blocks) if i not in used)
        visited = sum(p.weights.total * times for p, times in self.around)
        visited += sum(v.part.weights.total for v in self.visits) + self.new.parameters_visited
        return self.model.parameters - idle + self.new.parameters, visited

    def _quantities(self, forward, backward, decode, deepest, regions) -> tuple[Quantity, ...]:
        size = self.model.itemsize
        element = _sum(at_tokens(e, v.tokens.total) for v in self.visits
                       for e in v.part.count.elementwise_flops.values())
        element += _sum(at_tokens(e, self.total) * times for p, times in self.around
                        for e in p.count.elementwise_flops.values())
        unique, visited = self._parameters()
        serial = [r for r in regions if r.serial]
        moved = _sum(r.weight_bytes_per_step * r.steps for r in regions) + self._outer_elements(self.total) * size
        kv = sp.expand(_sum(v.slot_elements() for v in self.visits) * size)
        kv_bytes = sp.expand(_sum(v.held_elements() for v in self.visits) * size)
        lines = self._delay_bytes()
        table: tuple[tuple[str, str, sp.Expr | int, str], ...] = (
            ("FLOPs forward", "FLOP", _sum(forward.values()), "matrix multiplies and attention"),
            ("FLOPs backward", "FLOP", _sum(backward.values()), TRAINABLE[self.trainable]),
            ("FLOPs decode", "FLOP", _sum(decode.values()), "one token per row at position n, expected over routes"),
            ("FLOPs decode, deepest token", "FLOP", _sum(deepest.values()), "a token that takes every route"),
            ("elementwise forward", "op", element + self.new.elementwise_flops,
             "norms, activations, rotary embedding; not in FLOPs"),
            ("parameters unique", "parameter", unique, "tied ones once, unused blocks left out"),
            ("parameters visited", "parameter", visited, "once per visit"),
            ("parameters new", "parameter", self.new.parameters, "added by passes"),
            ("weight bytes forward", "byte", moved, "weights read, once per visit and step; of the embedding its rows"),
            ("weight bytes per serial step", "byte", _sum(r.weight_bytes_per_step for r in serial),
             "weights that one step of the token loop reads"),
            ("weight bytes decode", "byte", self._decode_elements() * size,
             "weights read per decoded token; visits that run as rows of one call read once"),
            ("KV slots", "slot", len(self.program.slots), "one per visit that keeps keys and values"),
            ("KV bytes", "byte", kv, "needed after n tokens: windows keep what can still be seen"),
            ("KV bytes, whole slots", "byte", kv_bytes, "when slots are not cut to their windows"),
            ("KV bytes read, decode", "byte",
             _sum(v.tokens.share * v.decode_read_elements() for v in self.visits) * size,
             "one token per row at position n, expected over routes"),
            ("KV bytes read, decode, deepest token", "byte",
             _sum(v.decode_read_elements() for v in self.visits) * size, "a token that takes every route"),
            ("delay line bytes", "byte", lines, "the last tokens of every delayed stream"),
            ("activation bytes kept", "byte", self._saved_bytes(),
             "from forward to backward without checkpointing; an estimate"),
            ("activation bytes peak, forward", "byte", self._peak_bytes(regions) + kv_bytes + lines,
             "with KV and delay lines, without gradients; an estimate"),
            ("serial block calls", "call", _sum(r.visits * r.steps for r in regions),
             "of one forward pass, one after the other"),
            ("serial steps", "step", _sum(r.steps for r in serial), "trips of the token loop"),
            ("decode block calls", "call", len(self.stacks), "per decoded token, one after the other"),
        )
        return tuple(Quantity(name, unit, sp.sympify(e), note) for name, unit, e, note in table)

    def _work(self) -> tuple[Work, ...]:
        trained = self.trainable == "all"
        stack_of = {name: i for i, s in enumerate(self.stacks) for name in s}
        work = []
        for region in self.schedule.regions:
            for o in region.ops:
                if o.kind not in ("block", "ffn") and not (o.name in self.new.elements and o.name in self.new.by_op):
                    continue
                share, pads = float(self.tokens[o.name].share), self.types[o.name].pads
                graded = o.name in self.graded
                if o.kind in ("block", "ffn"):
                    v = self.by_name[o.name]
                    work.append(Work(f"%{o.name} block {o['index']}", self._active(v), v.part.weights, region.chunk,
                                     share, pads, graded, trained, stack_of[o.name]))
                else:
                    size = self.new.elements[o.name]
                    work.append(Work(f"%{o.name} {OPS[o.kind].scope(o)}", size, Dense(size), region.chunk, share, pads, graded,
                                     self.trainable != "none"))
        head, repeats = self.around[2]
        active = float(sp.cancel(_sum(head.count.gemm_flops.values()) / (2 * B * n)))
        pads = self.types[self.program.output].pads
        one = Work("head", active, head.weights, None, 1.0, pads, self.trainable != "none", trained)
        return (*work, *(one for _ in range(repeats)))

    def _active(self, v: VisitCost) -> float:
        """Weights that a visit multiplies each of its tokens with, its share of other tokens' keys included."""
        return float(sp.cancel(_sum(v.gemm_flops_per_token().values()) / 2))

    def _notes(self) -> tuple[str, ...]:
        notes: list[str] = []
        if any(not v.writes and v.op.kind == "block" for v in self.visits):
            notes.append("a visit that reads another visit's keys needs no keys and values of its own: not counted, "
                         "though a lowering may compute them")
        notes += [
            CONVENTIONS[self.attention],
            "a multiply-add is two FLOPs; norms, activations, softmax and biases are not in FLOPs",
            "backward attention is twice forward: nothing is recomputed",
            f"bytes are in {str(self.model.dtype).removeprefix('torch.')}; activations and the optimizer are not in "
            "weight bytes",
        ]
        routes = [o for o in self.program.ops if o.kind == "route"]
        if routes:
            notes.append("routed tokens are taken to lie uniformly over the row")
        if open_routes := [f"%{o.name}" for o in routes if o["rule"] != "topk"]:
            notes.append(f"the share of {', '.join(open_routes)} depends on the data: as given, else as written on the "
                         "route, else 1")
        if any(p.weights.expert for p in self.model.blocks):
            notes.append("expert weights read: as expected when every token chooses its experts uniformly")
        if self.model.uncounted:
            notes.append(f"not understood and not counted: {', '.join(self.model.uncounted)}")
        return (*notes, *self.new.notes)
