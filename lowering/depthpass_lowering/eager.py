"""L0: run a schedule op by op, region by region. Obviously right, and the oracle of every faster rung.

One primitive: advance a state by m new tokens. Training and prefill are m = all tokens, decoding is m = 1. Parallel
regions see all m tokens at once, serial regions run in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthpass.capture.model import Site, Template
from depthpass.errors import LoweringError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.ir.verify import Type, infer
from depthpass.schedule.regions import Region, Schedule
from depthpass_lowering.attention import Masks, column_mask, sdpa_attention
from depthpass_lowering.noise import noise
from depthpass_lowering.routes import Route, choose, stored
from depthpass_lowering.state import Slot, Span, State, push_delay, read_delay, spans

ACTIVATIONS = {
    "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu,
}


class Host(Protocol):
    """The stock modules a program runs on; implemented by the Hugging Face layer and by the compiler backend."""

    def block(self, index: int, visit: RunningVisit, hidden: Tensor, sides: Sequence[Tensor]) -> Tensor: ...

    def sides_of(self, index: int) -> tuple[int, ...]: ...

    def sites_of(self, index: int) -> tuple[Site, ...]: ...

    def norm(self, hidden: Tensor) -> Tensor: ...

    def module(self, name: str) -> nn.Module:
        """A new module of the program, by its name under ``depth.``."""
        ...

    def submodule(self, index: int, path: str, *args: Tensor) -> Tensor: ...

    def bound(self, index: int) -> tuple[Template, list[Tensor]]:
        """Template of a block and the tensors it is bound to, in the order of the graph's inputs."""
        ...

    def submodules_of(self, index: int) -> tuple[str, ...]:
        """Paths of the stock submodules that a block's graph calls."""
        ...

    def stock_module(self, index: int, path: str) -> nn.Module: ...

    def refuses_schedule(self, index: int) -> str | None:
        """Why a block must run as a module (hooks, checkpointing), or None."""
        ...

    def attention(self, index: int, site: Site, q, k, v, mask, causal: bool, sinks) -> Tensor: ...


class RunningVisit:
    """One visit of one span: answers the calls of a block's graph (:class:`depthpass.capture.calls.Visit`).

    The slot is read when the visit is made, so running the block again (activation checkpointing) gives the same.

    Attributes:
        ring: how many of its own last keys a gated visit has to keep; None = all.
    """

    ring: int | None = None

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool):
        self.op, self.host, self.state, self.span, self.masks, self.keep = op, host, state, span, masks, keep
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.before = state.slots.get(op["slot"]) if writes_slot(op) is not None else None
        self.shared = None if op["keys"] is None else _until(state.slots[op["keys"]], span.start + span.count)
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.hidden: Tensor | None = None

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        site = self.sites[number]
        far = None
        if self.shared is not None:
            far = self._attention(number, q, self.shared.keys[number], self.shared.values[number], sinks,
                                  self._mask(self._shared_columns(), site.window, site.chunk))
            if self.op["gate"] is None:
                return far
        if self.before is not None:
            k = torch.cat((self.before.keys[number], k), 2)
            v = torch.cat((self.before.values[number], v), 2)
        elif self.keep:
            # As a stock cache stores them; the strides decide the last bits of a matrix product.
            k, v = k.contiguous(), v.contiguous()
        if self.state is not None:
            self.made[number] = (k, v)
        window = site.window if far is None else min(self.op["window"], site.window or self.op["window"])
        near = self._attention(number, q, k, v, sinks, self._mask(self._own_columns(), window, site.chunk))
        return near if far is None else self._mix(q, far, near)

    def _attention(self, number: int, q, k, v, sinks, mask: tuple[Tensor | None, bool]) -> Tensor:
        return self.host.attention(self.index, self.sites[number], q, k, v, *mask, sinks)

    def _shared_columns(self) -> tuple[Tensor, Tensor | None] | None:
        """Columns and validity of the shared keys; None = every column in order."""
        slot = self.shared
        return None if slot.columns is None else (slot.columns, _validity(slot, self.masks.valid))

    def _own_columns(self) -> tuple[Tensor, Tensor | None] | None:
        """The same for the visit's own keys, this span's included."""
        if self.before is None or self.before.columns is None:
            return None
        new = torch.arange(self.span.start, self.span.start + self.span.count, device=self.before.columns.device)
        columns = torch.cat((self.before.columns, new.expand(len(self.before.columns), -1)), 1)
        valid = self.masks.valid
        return columns, None if valid is None else valid.gather(1, columns)

    def _mask(
        self, where: tuple[Tensor, Tensor | None] | None, window: int | None, chunk: int | None
    ) -> tuple[Tensor | None, bool]:
        """Mask of the span's queries against keys at the given columns, and SDPA's causal flag."""
        if where is None:
            return self.masks.get(window, chunk)
        columns, valid = where
        q = torch.arange(self.span.start, self.span.start + self.span.count, device=columns.device)[None, :, None]
        return column_mask(q, columns[:, None], window, chunk, valid, self.masks.row_start)[:, None], False

    def _mix(self, q: Tensor, far: Tensor, near: Tensor) -> Tensor:
        """PLT: g * Attn(shared keys) + (1 - g) * Attn(own last W keys), per head and token, before o_proj."""
        gate = self.host.module(self.op["gate"])
        score = gate(q.transpose(1, 2)) if self.op["gate_input"] == "query" else gate(self.hidden)
        if score.shape != far.shape[:3]:
            raise LoweringError(
                f"gate {self.op['gate']!r} of block {self.index}: expected a score per token and head, "
                f"{tuple(far.shape[:3])}, got {tuple(score.shape)}: its attention has other heads than the config says. "
                "Use kv='own' or kv='first'."
            )
        g = torch.sigmoid(score)[..., None].to(far.dtype)
        return g * far + (1 - g) * near

    def submodule(self, path: str, *args: Tensor) -> Tensor:
        return self.host.submodule(self.index, path, *args)

    def adapt(self, names: Sequence[str], tensors: list[Tensor]) -> list[Tensor]:
        """The tensors a block is bound to, with this visit's own low-rank updates added."""
        if self.op["lora"] is None:
            return tensors
        # PEFT moves a wrapped weight one level down.
        place = {name.replace(".base_layer.", "."): i for i, name in enumerate(names)}
        adapted = list(tensors)
        for path, update in self.host.module(self.op["lora"]).named_modules():
            if not hasattr(update, "delta"):
                continue
            i = place.get(f"{path}.weight")
            if i is None:
                raise LoweringError(
                    f"per-visit LoRA {self.op['lora']!r}: {path} of block {self.index} is not read by its graph (it "
                    "belongs to an experts layer, which runs as a whole). Leave lora_rank out for this model."
                )
            adapted[i] = adapted[i] + update.delta()
        return adapted

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.span.start, self.span.start + self.span.count, device=device)

    def commit(self) -> None:
        """Store the slot; called once, after the block has run.

        Afterwards the visit forgets the state: an activation checkpoint keeps the visit, and through it would keep its own
        graph alive for ever.
        """
        state, made = self.state, self.made
        self.state, self.made = None, {}
        if not self.keep or not made:
            return
        order = range(len(self.sites))
        where = self._own_columns()
        slot = Slot(
            tuple(made[i][0] for i in order), tuple(made[i][1] for i in order), None if where is None else where[0],
        )
        state.slots[self.op["slot"]] = slot if self.ring is None else _last(slot, self.ring)


class RoutedVisit(RunningVisit):
    """A visit of the routed tokens of a span, on the rows that send any.

    Attributes:
        at: columns of the tokens, ``[rows, k]``.
        real: which of them are routed and not fillers, ``[rows, k]``; None = all.
        rows: the rows that run; None = all.
    """

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool, route: Route):
        super().__init__(op, host, state, span, masks, keep)
        self.all_before, self.rows, self.batch = self.before, route.rows, len(route.chosen)
        self.at, self.real = self._pick(route.index + span.start), self._pick(route.real)
        if self.rows is not None:
            self.before = None if self.before is None else self.before.map(self._pick)
            self.shared = None if self.shared is None else self.shared.map(self._pick)

    def _pick(self, t: Tensor | None) -> Tensor | None:
        return t if t is None or self.rows is None else t.index_select(0, self.rows)

    def _shared_columns(self) -> tuple[Tensor, Tensor | None]:
        slot, valid = self.shared, self._pick(self.masks.valid)
        if slot.columns is None:
            # All columns in order: the whole state, this span included.
            return torch.arange(slot.keys[0].shape[2], device=self.at.device)[None], valid
        return slot.columns, _validity(slot, valid)

    def _own_columns(self) -> tuple[Tensor, Tensor]:
        new = torch.ones_like(self.at, dtype=torch.bool) if self.real is None else self.real
        if self.before is None:
            return self.at, new
        return torch.cat((self.before.columns, self.at), 1), torch.cat((self.before.valid, new), 1)

    def _mask(self, where, window: int | None, chunk: int | None) -> tuple[Tensor | None, bool]:
        columns, valid = where
        start = self._pick(self.masks.row_start)
        return column_mask(self.at[..., None], columns[:, None], window, chunk, valid, start)[:, None], False

    def columns(self, device: torch.device) -> Tensor:
        raise LoweringError(
            f"block {self.index} counts the columns of its tokens itself, so it cannot run on routed tokens. "
            "Leave this block out of the routed stack."
        )

    def commit(self) -> None:
        if not self.keep or not self.made:
            return
        count = self.at.shape[1]
        new = Slot(
            tuple(self.made[i][0][:, :, -count:] for i in range(len(self.sites))),
            tuple(self.made[i][1][:, :, -count:] for i in range(len(self.sites))),
            self.at, torch.ones_like(self.at, dtype=torch.bool) if self.real is None else self.real,
        )
        self.state.slots[self.op["slot"]] = stored(self.all_before, new, self.rows, self.batch)


def _until(slot: Slot, end: int) -> Slot:
    """A slot's entries before column ``end``: a region that ran before a token loop has written every token's."""
    if slot.columns is not None or slot.keys[0].shape[2] <= end:
        return slot
    return slot.map(lambda t: t[:, :, :end])


def _validity(slot: Slot, valid: Tensor | None) -> Tensor | None:
    """Which entries of a slot with columns are real."""
    if slot.valid is not None:
        return slot.valid
    return None if valid is None else valid.gather(1, slot.columns)


def _last(slot: Slot, count: int) -> Slot:
    """The last ``count`` entries of a slot that holds every column up to the last one."""
    n, batch = slot.keys[0].shape[2], slot.keys[0].shape[0]
    columns = slot.columns
    if columns is None:
        if n <= count:
            return slot
        columns = torch.arange(n, device=slot.keys[0].device).expand(batch, -1)
    # Copies, so that the long prefix is freed.
    keys, values = (tuple(t[:, :, -count:].contiguous() for t in side) for side in (slot.keys, slot.values))
    return Slot(keys, values, columns[:, -count:].contiguous())


def run(
    schedule: Schedule,
    host: Host,
    hidden: Tensor,
    sides: Sequence[Tensor],
    side_axes: Sequence[int | None],
    state: State,
    valid: Tensor | None,
    keep: bool,
    types: dict[str, Type] | None = None,
    lowering: str = "eager",
) -> tuple[dict[str, Tensor], State]:
    """Advance a state by the tokens of ``hidden``.

    Args:
        hidden: the embedded new tokens, ``[batch, m, width]``.
        sides: the prologue's per-token tables for the new tokens.
        valid: validity of all columns, old and new, ``[batch, state.length + m]``; None = no padding anywhere.
        keep: whether the returned state is needed (a cache, not just a forward pass).
        lowering: a rung of :data:`depthpass_lowering.ladder.RUNGS`.

    Returns:
        the streams of ``output`` and of every tap by name (``output`` for the output), and the new state. The state
        passed in is unchanged.
    """
    from depthpass_lowering.ladder import rung

    return rung(lowering)(schedule, host, hidden, sides, side_axes, state.fork(), valid, keep, types).run()


class Run:
    """One advance of a state: the eager rung; faster rungs override how regions and visits run."""

    def __init__(self, schedule, host, hidden, sides, side_axes, state, valid, keep, types):
        self.schedule, self.host, self.hidden = schedule, host, hidden
        self.program: Program = schedule.program
        self.sides, self.side_axes = tuple(sides), tuple(side_axes)
        self.state, self.valid, self.keep = state, valid, keep
        self.types = types or infer(self.program)
        self.length, self.count = state.length, hidden.shape[1]
        self.read = {o["keys"] for o in self.program.visits} - {None}
        self.parallel = {o.name for r in schedule.regions if not r.serial for o in r.visits}
        self.env: dict[str, Tensor | Route] = {}
        self.out: dict[str, Tensor] = {}

    def run(self) -> tuple[dict[str, Tensor], State]:
        needed = [self._needed(r) for r in self.schedule.regions]
        for i, region in enumerate(self.schedule.regions):
            later = set().union(*needed[i + 1 :]) if needed[i + 1 :] else set()
            self._region(region, later)
        self.state.length += self.count
        self.state.valid = self.valid
        return self.out, self.state

    def _needed(self, region: Region) -> set[str]:
        """Values a region reads, with the routes that say which tokens they hold."""
        names = {a for o in region.ops for a in o.args}
        return names | {t for a in names if (t := self.types[a].tokens)}

    def _region(self, region: Region, later: set[str]) -> None:
        inputs = {a: self.env[a] for a in sorted(self._needed(region)) if a in self.env}
        # Slots of parallel regions are only needed by a later call; those of serial ones by the next chunk.
        keep = self.keep or region.serial
        self.env |= self._loop(region, inputs, {o.name for o in region.ops if o.name in later}, keep)

    def _loop(self, region: Region, inputs: dict[str, Tensor], wanted: set[str], keep: bool) -> dict[str, Tensor]:
        """Run a region chunk by chunk; returns the wanted streams over all tokens."""
        cut = spans(self.length, self.count, self.valid, None, region.chunk)
        sizes = [span.count for span in cut]
        pieces = self._split(inputs, sizes)
        sides = [
            [s] * len(cut) if axis is None else s.split(sizes, axis) for s, axis in zip(self.sides, self.side_axes)
        ]
        done: dict[str, list] = {name: [] for name in wanted}
        for i, span in enumerate(cut):
            local = {name: parts[i] for name, parts in pieces.items()}
            masks = Masks(
                span.start, span.count,
                None if self.valid is None else self.valid[:, : span.start + span.count], self.hidden.device,
            )
            tables = [parts[i] for parts in sides]
            for o in region.ops:
                if o.kind == "delay":
                    line = self._line(o, self.hidden)
                    local[o.name] = read_delay(line, local.get(o.args[0]), o["tokens"], span)
                elif o.kind == "route":
                    local[o.name] = self._route(o, local, span)
                elif o.kind == "block" and (route := self.types[o.args[0]].tokens):
                    local[o.name] = self._routed_block(o, local[o.args[0]], local[route], span, masks, tables, keep)
                else:
                    result = self._op(o, [local[x] for x in o.args], span, masks, tables, keep)
                    if o.name:
                        local[o.name] = result
            for o in region.ops:
                if o.kind == "delay":
                    line = self._line(o, self.hidden)
                    self.state.lines[o.name] = push_delay(line, local[o.args[0]], o["tokens"], span, self.state.record)
            for name, parts in done.items():
                parts.append(self._whole(name, local))
        return self._joined(done)

    def _split(self, inputs: dict, sizes: list[int]) -> dict[str, Sequence]:
        """Every input cut into spans; routed streams are spread over the tokens, cut and gathered again."""
        if len(sizes) == 1:
            return {name: (x,) for name, x in inputs.items()}
        pieces: dict[str, Sequence] = {
            name: x.split(sizes) for name, x in inputs.items() if isinstance(x, Route)
        }
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

    def _joined(self, done: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Values over all new tokens from their spans' parts."""
        found = {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in done.items()}
        routes = {name: Route.of(x) for name, x in found.items() if self.types[name].is_route}
        for name, x in found.items():
            route = self.types[name].tokens
            if route is not None:
                known = routes.get(route) or self.env[route]
                found[name] = known.gather(x)
        return found | routes

    def _line(self, o: Op, like: Tensor) -> Tensor:
        line = self.state.lines.get(o.name)
        if line is None:
            line = like.new_zeros(self.hidden.shape[0], o["tokens"], self.types[o.name].width)
            self.state.lines[o.name] = line
        return line

    def _op(self, o: Op, args: list[Tensor], span: Span, masks: Masks, sides, keep: bool) -> Tensor | None:
        kind = o.kind
        if kind == "embed":
            whole = span.count == self.count
            return self.hidden if whole else self.hidden.narrow(1, span.start - self.length, span.count)
        if kind == "block":
            return self._block(o, args[0], span, masks, sides, keep)
        if kind == "add":
            return self._add(o, args, span)
        if kind == "linear":
            return self.host.module(o["name"])(args[0] if len(args) == 1 else torch.cat(args, -1))
        if kind == "norm":
            return self.host.norm(args[0])
        if kind == "scale":
            return args[0] * o["by"]
        if kind == "mul":
            return args[0] * args[1]
        if kind == "act":
            return ACTIVATIONS[o["fn"]](args[0])
        if kind == "weigh":
            return self.host.module(o["name"])(args[0])
        if kind == "rms":
            y = args[0] * torch.rsqrt(args[0].pow(2).mean(-1, keepdim=True) + o["eps"])
            return self.host.module(o["name"])(y) if o["name"] else y
        if kind == "zeros":
            return self.hidden.new_zeros(self.hidden.shape[0], span.count, o["width"] or self.program.width)
        if kind == "noise":
            return self._noise(o, span)
        if kind == "gather":
            return args[1].gather(args[0])
        if kind == "scatter":
            return args[2].scatter(args[0], args[1], o["mode"])
        if kind == "select":
            return _select(args, o["cdf"])
        if kind == "output":
            self.out["output"] = args[0]
            return None
        if kind == "tap":
            self.out[o["name"]] = args[0]
            return None
        raise LoweringError(f"op {kind!r} cannot be run by the eager lowering yet.")

    def _block(self, o: Op, x: Tensor, span: Span, masks: Masks, sides, keep: bool) -> Tensor:
        self._check_lora(o)
        visit = self._visit(o, span, masks, keep or writes_slot(o) in self.read)
        visit.hidden = x
        y = self.host.block(o["index"], visit, x, [sides[s] for s in self.host.sides_of(o["index"])])
        visit.commit()
        return y

    def _visit(self, o: Op, span: Span, masks: Masks, keep: bool) -> RunningVisit:
        visit = RunningVisit(o, self.host, self.state, span, masks, keep)
        # A slot that others read, that a token loop appends to, or that may be cropped is kept whole.
        if o["gate"] is not None and o["slot"] not in self.read and o.name in self.parallel and not self.state.record:
            visit.ring = o["window"]
        return visit

    def _routed_block(
        self, o: Op, x: Tensor, route: Route, span: Span, masks: Masks, sides, keep: bool
    ) -> Tensor:
        """A visit of the routed tokens only; rows that send none do no work, unless a table ties the rows together."""
        self._check_lora(o)
        if route.count == 0:
            return x
        used = self.host.sides_of(o["index"])
        axes = [self.side_axes[s] for s in used]
        if 0 in axes:
            raise LoweringError(f"block {o['index']} reads a per-token table without a batch dimension, so its tokens "
                                "cannot be routed. Leave this block out of the routed stack.")
        if None in axes and route.rows is not None:
            route = replace(route, rows=None)
        tables = [sides[s] if axis is None else route.table(sides[s], axis) for s, axis in zip(used, axes)]
        visit = RoutedVisit(o, self.host, self.state, span, masks, keep or writes_slot(o) in self.read, route)
        if route.rows is None:
            visit.hidden = x
            y = self.host.block(o["index"], visit, x, tables)
        else:
            visit.hidden = x.index_select(0, route.rows)
            tables = [t.index_select(0, route.rows) for t in tables]
            y = self.host.block(o["index"], visit, visit.hidden, tables)
            y = x.to(y.dtype).index_copy(0, route.rows, y)
        visit.commit()
        return y

    def _check_lora(self, o: Op) -> None:
        if o["lora"] and not getattr(self.host, "adapts", False):
            raise LoweringError(f"block {o['index']} has a LoRA of its own for each visit, which only transformed models "
                                "run. Use dp.transform(model, spec) instead of the torch.compile backend.")

    def _route(self, o: Op, local: dict, span: Span) -> Route:
        score = local[o.args[0]]
        held = self.types[o.args[0]].tokens
        if held is not None:
            score = local[held].spread(score)
        outer = local[o.args[1]] if len(o.args) == 2 else None
        return choose(o, score, outer, span.valid, span.start)

    def _noise(self, o: Op, span: Span) -> Tensor:
        width = o["width"] or self.program.width
        # A host that does not say is scored, not trained.
        if getattr(self.host, "training", False):
            return o["std"] * self.hidden.new_empty(self.hidden.shape[0], span.count, width).normal_()
        number = [p.name for p in self.program if p.kind == "noise"].index(o.name)
        rank = span.rank
        if rank is None:
            rank = torch.arange(span.start, span.start + span.count)[None]
        drawn = o["std"] * noise(number, rank, width).to(self.hidden)
        return drawn.expand(self.hidden.shape[0], -1, -1)

    def _add(self, o: Op, args: list[Tensor], span: Span) -> Tensor:
        """Sum; a summand that is absent where the result is present adds nothing there."""
        total, base = None, self.types[o.name].absent
        order = sorted(range(len(args)), key=lambda i: self.types[o.args[i]].absent > base)
        for i in order:
            x, absent = args[i], self.types[o.args[i]].absent
            if absent > base:
                present = span.present(absent)
                if present is not True:
                    mask = present if isinstance(present, Tensor) else torch.zeros(1, span.count, dtype=torch.bool)
                    x = torch.where(mask.to(x.device)[..., None], x, x.new_zeros(()))
            total = x if total is None else total + x
        return total


def _select(args: list[Tensor], cdf: float) -> Tensor:
    """Of T states and T exit gates, per token the first state whose cumulative exit probability reaches ``cdf``."""
    half = len(args) // 2
    states, gates = args[:half], args[half:]
    out, left, reached = states[-1], torch.ones_like(gates[0]), torch.zeros_like(gates[0])
    open_ = torch.ones_like(gates[0], dtype=torch.bool)
    for state, gate in zip(states[:-1], gates):
        reached, left = reached + left * gate, left * (1 - gate)
        exits = open_ & (reached >= cdf)
        out, open_ = torch.where(exits, state, out), open_ & ~exits
    return out


RUNS = frozenset(OPS) - {"pad", "trim"}
"""Kinds of ops that run on models."""


def unsupported_ops(program: Program) -> list[str]:
    """What of a program cannot run on a model, one line each; empty when all of it can."""
    found = [f"%{o.name} = {o.kind}" for o in program if o.kind not in RUNS]
    for o in program.visits:
        if o["modulate"]:
            found.append(f"%{o.name} = block {o['index']} with modulate {o['modulate']}")
    return found


def check_program(program: Program) -> None:
    """Refuse a program that cannot run on a model.

    Raises:
        LoweringError: naming the ops.
    """
    if found := unsupported_ops(program):
        raise LoweringError(
            f"this program can be reported but not run on a model yet: {'; '.join(found[:3])}"
            f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}. Leave out what adds it "
            "(the pass pad; timestep of loop)."
        )


__all__ = ["Host", "RunningVisit", "check_program", "column_mask", "run", "sdpa_attention", "unsupported_ops"]
