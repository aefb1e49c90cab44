"""Visits: one block over one span of tokens, or over the routed tokens of a span, against its slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from depthpass_kernels.gated_attention.naive import mix
from torch import Tensor, fx

from depthpass.capture.model import Template
from depthpass.errors import LoweringError
from depthpass.ir.program import Op
from depthpass_lowering.attention import Masks, column_mask
from depthpass_lowering.host import Host
from depthpass_lowering.queries import split_graph
from depthpass_lowering.ragged import Appending, Plan, compacted, joined, listed, reality, widened
from depthpass_lowering.routes import Route
from depthpass_lowering.state import Grown, Slot, Span, State


class RunningVisit:
    """One visit of one span: answers the calls of a block's graph (:class:`depthpass.capture.calls.Visit`).

    The slot is read when the visit is made, so running the block again (activation checkpointing) gives the same.

    Attributes:
        ring: how many of its own last keys a gated visit has to keep; None = all.
        in_order: whether its own keys are those of the last tokens, without gaps.
        factors: of a modulated visit, ``[width]`` by place.
        memory: the stream that its own keys and values come from, ``[batch, tokens, width]``; None = its input.
    """

    ring: int | None = None
    in_order = True
    factors: Mapping[str, Tensor] | None = None
    memory: Tensor | None = None
    given: Mapping[int, tuple[Tensor, Tensor]] | None = None

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool):
        self.op, self.host, self.state, self.span, self.masks, self.keep = op, host, state, span, masks, keep
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.before = state.slots.get(op["slot"]) if self.writes else None
        # The writer of the shared keys may run in the same call (:class:`StackedVisit`): then they are not there yet.
        shared = state.slots.get(op["keys"]) if self.shares else None
        self.shared = None if shared is None else _until(shared, span.start + span.count)
        self.made: dict[int, Grown] = {}
        self.hidden: Tensor | None = None

    @property
    def shares(self) -> bool:
        """Whether the visit reads another one's keys."""
        return self.op["keys"] is not None

    @property
    def gated(self) -> bool:
        return self.op["gate"] is not None

    @property
    def writes(self) -> bool:
        """Whether the visit has keys of its own."""
        return self.gated or not self.shares

    def run(self, template: Template, hidden: Tensor, sides: Sequence[Tensor], params, runner=None) -> Tensor:
        """Run the block's graph; ``runner`` gives the callable to run a graph with (None = the graph itself)."""
        graph, runner = self.graph(template), runner or (lambda graph: graph)
        if self.memory is not None:
            found = runner(split_graph(graph, self.index).keys)(self, self.memory.to(hidden.device), *sides, *params)
            self.given = {i: (found[2 * i], found[2 * i + 1]) for i in range(len(self.sites))}
        return runner(graph)(self, hidden, *sides, *params)

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        if self.given is not None:
            k, v = self.given[number]
        own = self.extend(number, k, v) if self.writes else None
        if not self.shares:
            return self.attention(number, q, *own, sinks, self._own_mask(own[0].shape[2], *self.limits(number)))
        far = self.attention(
            number, q, self.shared.keys[number], self.shared.values[number], sinks, self.shared_mask(number)
        )
        return self.mix(q, self.hidden, far, self.near(number, q, *own, sinks)) if self.gated else far

    def extend(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The visit's own keys and values, this span's last."""
        place = None
        if self.before is not None:
            # One token needs no more than it leaves behind; of several, each has a window of its own.
            k, v, place = self.before.grown(number, k, v, self.ring if self.span.count == 1 else None)
        elif self.keep and self.ring is None:
            # As a stock cache stores them; the strides decide the last bits of a matrix product.
            k, v = k.contiguous(), v.contiguous()
        if self.state is not None:
            self.made[number] = k, v, place
        return k, v

    def near(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """A gated visit's attention to its own last keys."""
        site = self.sites[number]
        window = min(self.op["window"], site.window or self.op["window"])
        if self.span.count == 1 and site.chunk is None and self.in_order:
            # One token sees its whole window, but for pads.
            if k.shape[2] > window:
                k, v = k[:, :, -window:], v[:, :, -window:]
            return self.attention(number, q, k, v, sinks, (self.masks.last(k.shape[2]), False))
        if not self.in_order:
            return self.attention(number, q, k, v, sinks, self._own_mask(k.shape[2], window, site.chunk))

        # Stock attention functions repeat key heads by themselves and want a bool mask; SDPA need not repeat.
        plain = self.host.style == "sdpa"
        blocks = self.masks.blocks(
            window, site.chunk, k.shape[2], q.shape[1] // k.shape[1] if plain else 1, q.dtype if plain else None, len(q)
        )
        return blocks.read(q, k, v, lambda q, k, v, *mask: self.attention(number, q, k, v, sinks, mask))

    def limits(self, number: int) -> tuple[int | None, int | None]:
        """Window and chunk of the block itself."""
        return self.sites[number].window, self.sites[number].chunk

    def attention(self, number: int, q, k, v, sinks, mask: tuple[Tensor | None, bool]) -> Tensor:
        return self.host.attention(self.index, self.sites[number], q, k, v, *mask, sinks)

    def shared_mask(self, number: int) -> tuple[Tensor | None, bool]:
        """Mask of the span's queries against the shared keys, and SDPA's causal flag."""
        return self._mask(self._shared_columns(), *self.limits(number))

    def _shared_columns(self) -> tuple[Tensor, Tensor | None] | None:
        """Columns and validity of the shared keys; None = every column in order."""
        slot = self.shared
        return None if slot.columns is None else (slot.columns, _validity(slot, self.masks.valid))

    def _own_columns(self) -> tuple[Tensor, Tensor | None] | None:
        """The same for the visit's own keys, this span's included."""
        return None

    def _own_mask(self, keys: int, window: int | None, chunk: int | None) -> tuple[Tensor | None, bool]:
        """Mask of the span's queries against the visit's own last keys, and SDPA's causal flag."""
        where = self._own_columns()
        if where is not None:
            return self._mask(where, window, chunk)
        return self.masks.get(window, chunk, self.span.start + self.span.count - keys)

    def _mask(
        self, where: tuple[Tensor, Tensor | None] | None, window: int | None, chunk: int | None
    ) -> tuple[Tensor | None, bool]:
        """Mask of the span's queries against keys at the given columns, and SDPA's causal flag."""
        if where is None:
            return self.masks.get(window, chunk)
        columns, valid = where
        q = torch.arange(self.span.start, self.span.start + self.span.count, device=columns.device)[None, :, None]
        return column_mask(
            q, columns[:, None], window, chunk, valid, self.masks.row_start, self.masks.ahead
        )[:, None], False

    def mix(self, q: Tensor, hidden: Tensor, far: Tensor, near: Tensor) -> Tensor:
        """PLT: g * Attn(shared keys) + (1 - g) * Attn(own last W keys), per head and token, before o_proj."""
        gate = self.host.module(self.op["gate"])
        score = gate(q.transpose(1, 2)) if self.op["gate_input"] == "query" else gate(hidden)
        if score.shape != far.shape[:3]:
            raise LoweringError(
                f"gate {self.op['gate']!r} of block {self.index}: expected a score per token and head, "
                f"{tuple(far.shape[:3])}, got {tuple(score.shape)}: its attention has other heads than the config says. "
                "Use kv='own' or kv='first'."
            )
        return mix(far, near, score)

    def submodule(self, path: str, *args: Tensor) -> Tensor:
        return self.host.submodule(self.index, path, *args)

    def graph(self, template: Template) -> fx.GraphModule:
        """The graph of a block's template that this visit runs."""
        if self.op["modulate"] is None:
            return template.graph
        from depthpass_lowering.fx_passes.modulate import modulated

        return modulated(template, self.index)

    def modulate(self, place: str, x: Tensor) -> Tensor:
        return x * self.factors[place].to(x)

    def adapt(self, names: Sequence[str], tensors: list[Tensor]) -> list[Tensor]:
        """The tensors a block is bound to, with this visit's own low-rank updates added."""
        if self.op["lora"] is None:
            return tensors
        # PEFT moves a wrapped weight one level down.
        place = {name.replace(".base_layer.", "."): i for i, name in enumerate(names)}
        adapted = list(tensors)
        for path, update in self.host.module(self.op["lora"]).named_modules():
            if not hasattr(update, "low_rank"):
                continue
            i = place.get(f"{path}.weight")
            if i is None:
                raise LoweringError(
                    f"per-visit LoRA {self.op['lora']!r}: {path} of block {self.index} is not read by its graph (it "
                    "belongs to an experts layer, which runs as a whole). Leave lora_rank out for this model."
                )
            adapted[i] = adapted[i] + update().to(adapted[i].device)
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
        keys, values, places = zip(*(made[i] for i in range(len(made))))
        first = self.span.start + self.span.count - keys[0].shape[2]
        slot = Slot(keys, values, None, None, first, places)
        state.slots[self.op["slot"]] = slot if self.ring is None else slot.last(self.ring)


class RoutedVisit(RunningVisit):
    """A visit of the routed tokens of a span, on the rows that send any.

    Attributes:
        at: columns of the tokens, ``[rows, k]``.
        real: which of them are routed and not fillers, ``[rows, k]``; None = all.
        rows: the rows that run; None = all.
        wide: attention over stored keys runs for all rows, and what the others get is dropped: one query reads its row's
            keys once, while picking the rows' keys would read and write them first.
    """

    in_order = False

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool, route: Route):
        super().__init__(op, host, state, span, masks, keep)
        self.before = None if self.before is None else listed(self.before, masks.valid)
        self.rows, self.batch, self.route = route.rows, len(route.chosen), route
        self.together = route.once("together", lambda: _together(route.rows))
        self.wide = (
            self.rows is not None and self.together is None and span.count == 1 and not torch.is_grad_enabled()
            and op["gate"] is None and 3 * len(self.rows) >= self.batch
        )
        self.at, self.real = route.once(
            ("at", span.start), lambda: (self.pick(route.index + span.start), self.pick(route.real))
        )
        self.appending: Appending | None = None
        self.all_before = self.before
        # What was stored stays where it is unless something has to be joined to it, or mixed with it.
        self.joins = torch.is_grad_enabled() or self.shared is not None
        if self.rows is not None and not self.wide:
            self.shared = None if self.shared is None else self.shared.map(self.pick)
            if self.joins and self.before is not None:
                self.before = self.before.map(self.pick)

    def pick(self, t: Tensor | None) -> Tensor | None:
        """What belongs to the rows that run; a view where they stand together."""
        if t is not None and self.together is not None:
            return t.narrow(0, *self.together)
        return t if t is None or self.rows is None else t.index_select(0, self.rows)

    def _for_all(self, t: Tensor) -> Tensor:
        """Entries of the rows that run as entries of all rows."""
        return t if self.rows is None else t.new_zeros((self.batch, *t.shape[1:])).index_copy(0, self.rows, t)

    def _stored(self, t: Tensor | None) -> Tensor | None:
        """What belongs to the rows that attention over stored keys runs for."""
        return t if self.wide else self.pick(t)

    def extend(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.before is None:
            return super().extend(number, k, v)
        if self.joins:
            k, v = torch.cat((self.before.keys[number], k), 2), torch.cat((self.before.values[number], v), 2)
            if self.state is not None:
                self.made[number] = k, v, None
            return k, v
        if self.appending is None:
            # The blocks of a routed stack hold the same tokens, in columns and validity that are the same tensors.
            key = ("plan", id(self.before.valid), id(self.before.columns))
            plan = self.route.once(key, lambda: Plan(self.before, self.at, self.real, self.rows))
            self.appending = Appending(self.before, plan)
        k, v = self.appending.write(number, k, v)
        self.made[number] = k, v, None
        return self._stored(k), self._stored(v)

    def attention(self, number: int, q, k, v, sinks, mask: tuple[Tensor | None, bool]) -> Tensor:
        """One query per row asks as one head group of several queries: a mask then needs no copies of the keys."""
        if len(k) != len(q):
            q = q.new_zeros((self.batch, *q.shape[1:])).index_copy(0, self.rows, q)
            return self.pick(self.attention(number, q, k, v, sinks, mask))
        groups = q.shape[1] // k.shape[1]
        if q.shape[2] > 1 or groups == 1 or sinks is not None or self.host.style != "sdpa":
            return super().attention(number, q, k, v, sinks, mask)
        grouped = q.reshape(q.shape[0], k.shape[1], groups, q.shape[3])
        out = super().attention(number, grouped, k, v, None, (mask[0], False))
        return out.transpose(1, 2).reshape(q.shape[0], 1, q.shape[1], v.shape[3])

    def _shared_columns(self) -> tuple[Tensor, Tensor | None]:
        slot, valid = self.shared, self._stored(self.masks.valid)
        if slot.columns is None:
            # All columns in order: the whole state, this span included.
            return torch.arange(slot.keys[0].shape[2], device=self.at.device)[None], valid
        return slot.columns, _validity(slot, valid)

    def _all_real(self) -> Tensor:
        return torch.ones_like(self.at, dtype=torch.bool) if self.real is None else self.real

    def _own_columns(self) -> tuple[Tensor, Tensor | None]:
        if self.appending is not None:
            plan = self.appending.plan
            return self._stored(plan.columns), None if plan.full else self._stored(plan.valid)
        if self.before is None:
            return self.at, self.real
        return torch.cat((self.before.columns, self.at), 1), torch.cat((reality(self.before), self._all_real()), 1)

    def _mask(self, where, window: int | None, chunk: int | None) -> tuple[Tensor | None, bool]:
        columns, valid = where
        end = self.span.start + self.span.count
        ahead = self.masks.ahead
        if ahead is None and valid is None and chunk is None and (window is None or window >= end):
            # Nothing but the order matters, and the tokens stand in order.
            if columns is self.at:
                return None, columns.shape[1] > 1
            if self.span.count == 1:
                return None, False
        at, rows = self.at, self.pick
        if self.wide and columns is not self.at:
            at, rows = self.route.index + self.span.start, self._stored
        start = rows(self.masks.row_start)
        return column_mask(at[..., None], columns[:, None], window, chunk, valid, start, ahead)[:, None], False

    def columns(self, device: torch.device) -> Tensor:
        raise LoweringError(
            f"block {self.index} counts the columns of its tokens itself, so it cannot run on routed tokens. "
            "Leave this block out of the routed stack."
        )

    def commit(self) -> None:
        state, made, appending = self.state, self.made, self.appending
        self.state, self.made = None, {}
        if not self.keep or not made:
            return
        if appending is not None:
            state.slots[self.op["slot"]] = appending.slot()
            return
        count, order = self.at.shape[1], range(len(self.sites))
        new = widened(Slot(
            tuple(made[i][0][:, :, -count:] for i in order), tuple(made[i][1][:, :, -count:] for i in order),
        ), self.rows, self.batch)
        columns, valid = self.route.once(
            ("stored", self.span.start), lambda: (self._for_all(self.at), self._for_all(self._all_real()))
        )
        new = replace(new, columns=columns, valid=valid)
        if self.all_before is not None:
            new = joined(self.all_before, new)
        elif self.route.everything and self.real is not None:  # pads stand among the entries
            new = compacted(new)
        state.slots[self.op["slot"]] = new


class AskingVisit(RunningVisit):
    """A visit whose routed tokens alone ask; keys and values come from every token of the span.

    Attributes:
        at: columns of the asking tokens, ``[rows, k]``.
        rows: the rows that ask; None = all.
        given: keys and values of the span by attention call.
    """

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool, route: Route, axes):
        super().__init__(op, host, state, span, masks, keep)
        self.route, self.axes = route, axes
        self.rows = route.rows
        self.at = self._pick(route.index + span.start)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        self.asking = False

    def _pick(self, t: Tensor | None) -> Tensor | None:
        return t if t is None or self.rows is None else t.index_select(0, self.rows)

    def run(self, template: Template, hidden: Tensor, sides: Sequence[Tensor], params, runner=None) -> Tensor:
        """``[batch, tokens, width]`` of every token -> ``[batch, k, width]`` of the asking ones."""
        runner = runner or (lambda graph: graph)
        split = split_graph(self.graph(template), self.index)
        if not self.keep:
            hidden_keys, sides_keys = self._pick(hidden), [self._side(s, axis) for s, axis in zip(sides, self.axes)]
        else:
            hidden_keys, sides_keys = hidden, sides
        self.asking = False
        found = runner(split.keys)(self, hidden_keys, *sides_keys, *params)
        read = found[2 * len(self.sites) :]
        self.given = {i: (found[2 * i].contiguous(), found[2 * i + 1].contiguous()) for i in range(len(self.sites))}
        asks = self.route.gather(hidden)
        if self.route.count == 0:
            return asks
        tables = [s if axis is None else self.route.table(s, axis) for s, axis in zip(sides, self.axes)]
        route = self.route if self.keep or self.rows is None else self._active()
        read = [route.table(t, axis) for t, axis in zip(read, split.axes)]
        self.asking = True
        y = runner(split.queries)(
            self, self._pick(asks), *(self._side(t, axis) for t, axis in zip(tables, self.axes)), *params,
            *(self._pick(t) if self.keep else t for t in read)
        )
        return y if self.rows is None else asks.to(y.dtype).index_copy(0, self.rows, y)

    def _active(self) -> Route:
        """The route on the rows that ask alone."""
        return Route(self._pick(self.route.chosen), self._pick(self.route.index), self._pick(self.route.real), None)

    def _side(self, side: Tensor, axis: int | None) -> Tensor:
        """A table at the rows that ask; one without a batch has a single row for all."""
        return side if axis is None or side.shape[0] == 1 else self._pick(side)

    def attend(self, number: int, q: Tensor, k: None, v: None, sinks: Tensor | None) -> Tensor:
        site, (k, v) = self.sites[number], self.given[number]
        if self.keep:
            k, v = (self._pick(t) for t in self.extend(number, k, v))
        elif self.before is not None:
            held = (self.before.keys[number], self.before.values[number])
            k, v = (torch.cat((self._pick(h), new), 2) for h, new in zip(held, (k, v)))
        return self.attention(number, q, k, v, sinks, self._asking_mask(k.shape[2], site.window, site.chunk))

    def _asking_mask(self, keys: int, window: int | None, chunk: int | None) -> tuple[Tensor | None, bool]:
        columns, valid = torch.arange(keys, device=self.at.device)[None], self.masks.valid
        end = self.span.start + self.span.count
        ahead = self.masks.ahead
        if ahead is None and valid is None and self.span.count == 1 and chunk is None and (window is None or window >= end):
            return None, False
        start = self._pick(self.masks.row_start)
        mask = column_mask(self.at[..., None], columns[:, None], window, chunk, self._pick(valid), start, ahead)
        return mask[:, None], False

    def columns(self, device: torch.device) -> Tensor:
        if not self.asking:
            return super().columns(device)
        raise LoweringError(
            f"block {self.index} counts the columns of its tokens itself, so its queries cannot be routed. Leave this "
            "block out of the routed steps."
        )

    def commit(self) -> None:
        if self.keep and not self.made:  # nobody asked, but later tokens will see this span
            for number, (k, v) in self.given.items():
                self.extend(number, k, v)
        self.given = {}
        super().commit()


def _together(rows: Tensor | None) -> tuple[int, int] | None:
    """First and number of rows that follow one another; None for others, and for all rows."""
    if rows is None:
        return None
    first, last = int(rows[0]), int(rows[-1])
    return (first, len(rows)) if last - first + 1 == len(rows) else None


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
