"""What the eager level computes for every op, on a span of tokens: the oracle of every faster level."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.ir.definitions import Type
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.ir.structural_ops import asks
from depthpass.lowered.program import LoweredRegion
from depthpass_lowering.executors.context import CallContext
from depthpass_lowering.executors.losses import sums_of
from depthpass_lowering.executors.noise import cut_off, noise
from depthpass_lowering.host import Host
from depthpass_lowering.state.slots import Span, State, push_delay, read_delay, read_group, spans
from depthpass_lowering.visits.attention import Masks
from depthpass_lowering.visits.parts import FfnVisit, beside
from depthpass_lowering.visits.query_routed import QueryRoutedVisit
from depthpass_lowering.visits.routed import RoutedVisit
from depthpass_lowering.visits.routes import Route, choose
from depthpass_lowering.visits.running import RunningVisit


class Ops:
    """The ops of a program on one call and its state.

    Attributes:
        env: values of regions that have run.
        out: what is handed out, by name.
    """

    def __init__(self, context: CallContext, state: State):
        self.context, self.state = context, state
        self.env: dict[str, Tensor | Route] = {}
        self.out: dict[str, Tensor] = {}
        self.factors: dict[str, dict[str, Tensor]] = {}
        self.nothing: dict[int, Tensor] = {}

    @property
    def host(self) -> Host:
        return self.context.host

    @property
    def hidden(self) -> Tensor:
        return self.context.hidden

    @property
    def program(self) -> Program:
        return self.context.program

    @property
    def types(self) -> Mapping[str, Type]:
        return self.context.types

    def loop(
        self, region: LoweredRegion, inputs: Mapping[str, Tensor | Route], wanted: Collection[str], keep: bool
    ) -> dict[str, Any]:
        """Run a region op by op, chunk by chunk in a token loop; returns the wanted streams over all tokens."""
        c = self.context
        cut = spans(c.start, c.count, c.valid, None, region.chunk, region.groups)
        sizes = [span.count for span in cut]
        pieces = self._split(inputs, sizes)
        side_inputs = [[s] * len(cut) if axis is None else s.split(sizes, axis) for s, axis in zip(c.side_inputs, c.side_axes)]
        done: dict[str, list] = {name: [] for name in wanted}
        for i, span in enumerate(cut):
            local = {name: parts[i] for name, parts in pieces.items()}
            masks = Masks(span.start, span.count, c.valid_until(span.start + span.count), self.hidden.device, self.program.ahead)
            tables = [parts[i] for parts in side_inputs]
            for o in region.program_ops:
                self.one(o, local, span, masks, tables, keep)
            self.push(region, local, span)
            for name, parts in done.items():
                parts.append(self._whole(name, local))
        outputs = self._joined(done)
        return self._tied(region, local, outputs) if len(cut) == 1 and region.lines else outputs

    @staticmethod
    def _tied(region: LoweredRegion, local: Mapping, outputs: dict[str, Any]) -> dict[str, Any]:
        """The outputs of one chunk, through which what its delay lines keep gets gradients of zero.

        In a row that ends with its first chunk nobody reads the lines. Parameters before and behind a delay then have the same
        gradient, zero, on every level; torch would have None for some, which stops data-parallel ranks with longer rows.
        """
        held = [x.narrow(1, 0, 0).sum() for line in region.lines if (x := local[line.source]).requires_grad]
        name = next((n for n, x in outputs.items() if isinstance(x, Tensor)), None)
        return outputs | {name: outputs[name] + sum(held)} if held and name else outputs

    def one(self, o: Op, local: dict, span: Span, masks: Masks, tables, keep: bool) -> None:
        """Run one op on a span; ``local`` holds the span's values."""
        if self._idle(o, local):
            return
        if o.kind == "delay":
            local[o.name] = self.delayed(o, local.get(o.args[0]), span)
        elif o.kind == "route":
            local[o.name] = self._route(o, local, span)
        elif o.kind == "loss":
            self._loss(o, local, span)
        elif asks(o):
            x, route = (local[a] for a in o.args)
            local[o.name] = self._query_routed_block(o, x, route, span, masks, tables, keep)
        elif o.kind == "block" and (route := self.types[o.args[0]].tokens):
            local[o.name] = self._routed_block(o, local[o.args[0]], local[route], span, masks, tables, keep)
        else:
            result = self.op(o, [local[x] for x in o.args], span, masks, tables, keep)
            if o.name:
                local[o.name] = result

    def delayed(self, o: Op, source: Tensor | None, span: Span) -> Tensor:
        """A delay on a span; ``source`` at the span's own tokens where it is known already."""
        line = self.line(o.name, OPS[o.kind].lag(o))
        return read_delay(line, source, o["tokens"], span) if o["group"] is None else read_group(line, source, o["group"], span)

    def push(self, region: LoweredRegion, local: Mapping, span: Span) -> None:
        """Let every delay line forget what is too old and keep the span's tokens."""
        for line in region.lines:
            held = self.line(line.name, line.tokens)
            self.state.lines[line.name] = push_delay(held, local[line.source], line.tokens, span, self.state.record)

    def _idle(self, o: Op, local: dict) -> bool:
        """Whether an op works on a route that took no token of the span; its result, no token or none, is set then."""
        if o.kind == "scatter" or not o.name:
            return False
        if o.kind == "route":
            if len(o.args) == 1 or local[o.args[1]].count:
                return False
            local[o.name] = local[o.args[1]]
            return True
        kind = self.types[o.name]
        # A visit that nobody asks still keeps the keys of its span.
        if kind.tokens is None or local[kind.tokens].count or asks(o):
            return False
        if kind.width not in self.nothing:
            self.nothing[kind.width] = self.hidden.new_empty(self.hidden.shape[0], 0, kind.width)
        local[o.name] = self.nothing[kind.width]
        return True

    def _split(self, inputs: Mapping, sizes: list[int]) -> dict[str, Sequence]:
        """Every input cut into spans; routed streams are spread over the tokens, cut and gathered again."""
        if len(sizes) == 1:
            return {name: (x,) for name, x in inputs.items()}
        pieces: dict[str, Sequence] = {name: x.split(sizes) for name, x in inputs.items() if isinstance(x, Route)}
        for name, x in inputs.items():
            if name in pieces:
                continue
            route = self.types[name].tokens
            if route is None:
                pieces[name] = x.split(sizes, 1)
            else:
                parts = inputs[route].spread(x).split(sizes, 1)
                pieces[name] = [r.gather(part) for r, part in zip(pieces[route], parts)]
        return pieces

    def _whole(self, name: str, local: dict) -> Tensor:
        """A span's part of a value over all its tokens, so that parts can be joined."""
        x = local[name]
        if isinstance(x, Route):
            return x.chosen
        route = self.types[name].tokens
        return x if route is None else local[route].spread(x)

    def _joined(self, done: dict[str, list[Tensor]]) -> dict[str, Any]:
        """Values over all new tokens from their spans' parts."""
        values = {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in done.items()}
        routes = {name: Route.of(x) for name, x in values.items() if self.types[name].is_route}
        for name, x in values.items():
            route = self.types[name].tokens
            if route is not None:
                known: Any = routes.get(route) or self.env[route]
                values[name] = known.gather(x)
        return values | routes

    def line(self, name: str, tokens: int) -> Tensor:
        """A delay line; zeros before the first token."""
        line = self.state.lines.get(name)
        if line is None:
            line = self.hidden.new_zeros(self.context.batch, tokens, self.types[name].width)
            self.state.lines[name] = line
        return line

    def op(self, o: Op, args: list[Any], span: Span, masks: Any, side_inputs: Sequence[Tensor], keep: bool) -> Any:
        definition, kind = OPS[o.kind], o.kind
        if definition.meaning is not None:
            name = definition.scope(o)
            return definition.apply(None if name is None else self.host.module(name), o, args)
        if kind == "embed":
            whole = span.count == self.context.count
            return self.hidden if whole else self.hidden.narrow(1, span.start - self.context.start, span.count)
        if kind == "block":
            return self._block(o, args[0], span, masks, side_inputs, keep, args[1] if o["memory"] else None)
        if kind == "ffn":
            x, read = args
            return self.host.block(o["index"], FfnVisit(o, self.host, read), x, ())
        if kind == "point":
            return args[0 if beside(self.host.bound(o["index"])[0], o) else 1]
        if kind == "add":
            return self._add(o, args, span)
        if kind == "norm":
            return self.host.norm(args[0])
        if kind == "zeros":
            return self.hidden.new_zeros(self.hidden.shape[0], span.count, o["width"] or self.program.width)
        if kind == "noise":
            return self._noise(o, span)
        if kind == "gather":
            return args[1].gather(args[0])
        if kind == "scatter":
            return args[2].scatter(args[0], args[1], o["mode"])
        if kind == "logits":
            return self._logits(o, args[0])
        if kind in ("pad", "trim"):
            # The host puts the pads into the row before the program runs, and takes them out of what it hands out.
            return args[0]
        if kind in ("output", "tap"):
            self.out["output" if kind == "output" else o["name"]] = args[0].chosen if isinstance(args[0], Route) else args[0]
        # What is left ("average", "retire") was done once, when the model was transformed.
        return None

    def _block(self, o: Op, x: Tensor, span: Span, masks: Masks, side_inputs, keep: bool, memory: Tensor | None = None) -> Tensor:
        self._check_operands(o)
        if o["past"] is not None and o.name not in self.context.looped:
            keep = False
        visit = self._visit(o, span, masks, keep or writes_slot(o) in self.context.read)
        visit.memory = memory
        # Truncated backpropagation: what no gradient reaches is run without recording it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and o.name not in self.program.stopped):
            return self._visited(o, visit, x, [side_inputs[s] for s in self.host.side_inputs_of(o["index"])])

    def _visited(self, o: Op, visit: RunningVisit, x: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Run a visit and store its keys."""
        visit.hidden, visit.factors = x, self._factors(o)
        y = self.host.block(o["index"], visit, x, tables)
        visit.commit()
        return y

    def _visit(self, o: Op, span: Span, masks: Masks, keep: bool) -> RunningVisit:
        visit = RunningVisit(o, self.host, self.state, span, masks, keep)
        visit.ring, visit.factors = self.ring(o), self._factors(o)
        return visit

    def ring(self, o: Op) -> int | None:
        """How many of its own last keys a visit has to keep; None = all."""
        # A slot that others read or that may be cropped is kept whole.
        whole = o["gate"] is None or o["slot"] in self.context.read or self.state.record or self.context.whole_slots
        return None if whole else o["window"]

    def _routed_block(self, o: Op, x: Tensor, route: Route, span: Span, masks: Masks, side_inputs, keep: bool) -> Tensor:
        """A visit of the routed tokens only; rows that send none do no work, unless a table ties the rows together."""
        self._check_operands(o)
        if route.everything and self._gapless(o, span):
            return self._block(o, x, span, masks, side_inputs, keep)
        used, axes, route = self._tables(o, route)
        visit = RoutedVisit(o, self.host, self.state, span, masks, keep or writes_slot(o) in self.context.read, route)
        tables = [t if axis is None else route.once(
            ("table", id(t), axis), lambda t=t, axis=axis: (visit.pick(route.table(t, axis)), t)
        )[0] for t, axis in zip((side_inputs[s] for s in used), axes)]
        if route.rows is None:
            return self._visited(o, visit, x, tables)
        y = self._visited(o, visit, visit.pick(x), tables)
        return x.to(y.dtype).index_copy(0, route.rows, y)

    def _gapless(self, o: Op, span: Span) -> bool:
        """Whether every earlier token has taken a routed visit too, so that it may go on like any other."""
        if writes_slot(o) is None:
            return True
        slot = self.state.slots.get(o["slot"])
        if slot is None:
            return span.start == 0
        return slot.columns is None and slot.first + slot.keys[0].shape[2] == span.start

    def _query_routed_block(self, o: Op, x: Tensor, route: Route, span: Span, masks: Masks, side_inputs, keep: bool) -> Tensor:
        """A visit that only the routed tokens ask; keys and values come from every token."""
        self._check_operands(o)
        if route.everything:  # then keys and queries are of one stream
            return self._block(replace(o, args=o.args[:1]), x, span, masks, side_inputs, keep)
        keep = keep or writes_slot(o) in self.context.read
        if route.count == 0 and not keep:
            return x[:, :0]
        used, axes, route = self._tables(o, route)
        visit = QueryRoutedVisit(o, self.host, self.state, span, masks, keep, route, axes)
        return self._visited(o, visit, x, [side_inputs[s] for s in used])

    def _tables(self, o: Op, route: Route) -> tuple[tuple[int, ...], list[int | None], Route]:
        """The tables that a block on routed tokens reads, their token axes, and the route on the rows that may run."""
        used = self.host.side_inputs_of(o["index"])
        axes = [self.context.side_axes[s] for s in used]
        if 0 in axes:
            raise LoweringError(f"block {o['index']} reads a per-token table without a batch dimension, so its tokens "
                                "cannot be routed. Leave this block out of the routed stack.")
        return used, axes, replace(route, rows=None, memo={}) if None in axes else route

    def _check_operands(self, o: Op) -> None:
        if (o["lora"] or o["modulate"]) and not self.host.adapts:
            what = "a LoRA" if o["lora"] else "scales"
            raise LoweringError(f"block {o['index']} has {what} of its own for each visit, which only transformed models "
                                "run. Use dp.transform(model, spec) instead of the torch.compile backend.")

    def _factors(self, o: Op) -> dict[str, Tensor] | None:
        """What a modulated visit multiplies with, by place; made once per call, whatever the chunks."""
        if o["modulate"] is None:
            return None
        if o.name not in self.factors:
            make = self.host.module(o["modulate"])
            factors = make() if o["clock"] is None else make(self.host.module(o["clock"])(o["step"]))
            gate_a, gate_m, scale_a, scale_m = factors.unbind(0)
            self.factors[o.name] = {
                "gate_attention": o["base"] + gate_a, "gate_mlp": o["base"] + gate_m,
                "read_attention": 1.0 + scale_a, "read_mlp": 1.0 + scale_m,
            }
        return self.factors[o.name]

    def _route(self, o: Op, local: dict, span: Span) -> Route:
        score = local[o.args[0]]
        held = self.types[o.args[0]].tokens
        if held is not None:
            score = local[held].spread(score)
        outer = local[o.args[1]] if len(o.args) == 2 else None
        if o["bias"]:
            balance: Any = self.host.module(o["bias"])
            score = score.detach() + balance.bias
            if o["rate"] and self.host.training and torch.is_grad_enabled():
                self.host.pool.load(o["bias"], balance, o["rate"], balance.load(score, span.valid))
        return choose(o, score, outer, span.valid, span.start, self.host.ratios.get(o["label"]))

    def _loss(self, o: Op, local: dict, span: Span) -> None:
        if not self.host.pool.asked:
            return
        route = local[o.args[1]] if len(o.args) == 2 else None
        nest = self.program.defs[o.args[1]].args[1:] if route is not None else ()
        among = local[nest[0]].chosen if nest else span.valid
        sums = sums_of(o["rule"], local[o.args[0]], None if route is None else route.chosen, among)
        place = [p for p in self.program.losses if p["name"] == o["name"]].index(o)
        self.host.pool.loss((o["name"], place), o, sums)

    def _logits(self, o: Op, normed: Tensor) -> Tensor:
        logits = self.host.logits(normed)
        if logits.shape[-1] != o["width"]:
            raise LoweringError(f"%{o.name} = logits: expected a vocabulary of {o['width']}, got logits of "
                                f"{logits.shape[-1]}. Transform the model again after its vocabulary was resized.")
        return logits

    def _noise(self, o: Op, span: Span) -> Tensor:
        width = o["width"] or self.program.width
        # A host that does not say is scored, not trained.
        if self.host.training:
            return o["std"] * cut_off(self.hidden.new_empty(self.hidden.shape[0], span.count, width).normal_(), o["cut"])
        number = [p.name for p in self.program if p.kind == "noise"].index(o.name)
        rank = span.rank
        if rank is None:
            rank = torch.arange(span.start, span.start + span.count)[None]
        drawn = o["std"] * cut_off(noise(number, rank, width).double(), o["cut"]).to(self.hidden)
        return drawn.expand(self.hidden.shape[0], -1, -1)

    def _add(self, o: Op, args: list[Tensor], span: Span) -> Tensor:
        """Sum; a summand that is absent where the result is present adds nothing there."""
        base, summands = self.types[o.name].absent, []
        order = sorted(range(len(args)), key=lambda i: self.types[o.args[i]].absent > base)
        for i in order:
            x, absent = args[i], self.types[o.args[i]].absent
            if absent > base:
                present = span.present(absent)
                if present is not True:
                    mask = present if isinstance(present, Tensor) else torch.zeros(1, span.count, dtype=torch.bool)
                    x = torch.where(mask.to(x.device)[..., None], x, x.new_zeros(()))
            summands.append(x)
        return functools.reduce(torch.add, summands)
