"""A visit of the routed tokens of a span."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.ir.program import Op
from depthpass_lowering.host import Host
from depthpass_lowering.state.ragged import Appending, AppendPlan, compacted, joined, listed, reality
from depthpass_lowering.state.slots import Slot, Span, State
from depthpass_lowering.visits.attention import Masks, column_mask
from depthpass_lowering.visits.routes import Route
from depthpass_lowering.visits.running import RunningVisit, validity

PICKED = 1 << 20
"""Numbers of keys and values that are picked at once on the CPU."""


class RoutedVisit(RunningVisit):
    """A visit of the routed tokens of a span, on the rows that send any.

    Attributes:
        at: columns of the tokens, ``[rows, k]``.
        real: which of them are routed and not fillers, ``[rows, k]``; None = all.
        rows: the rows that run; None = all.
        late: stored keys stay those of all rows until attention reads them.
    """

    in_order = False

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool, route: Route):
        super().__init__(op, host, state, span, masks, keep)
        self.before = None if self.before is None else listed(self.before, masks.valid)
        self.rows, self.batch, self.route = route.rows, len(route.chosen), route
        self.evenly = route.once("evenly", lambda: _evenly(route.rows))
        alone = op["gate"] is None and not op["update"] and not torch.is_grad_enabled()
        self.late = alone and self.rows is not None and self.evenly is None
        self.at, self.real = route.once(("at", span.start), lambda: (self.pick(route.index + span.start), self.pick(route.real)))
        self.appending: Appending | None = None
        self.all_before = self.before
        # What was stored stays where it is unless something has to be joined to it, or mixed with it.
        self.joins = torch.is_grad_enabled() or self.shared is not None
        if self.rows is not None and not self.late:
            self.shared = None if self.shared is None else self.shared.map(self.pick)
            if self.joins and self.before is not None:
                self.before = self.before.map(self.pick)

    def pick(self, t: Tensor | None) -> Any:
        """What belongs to the rows that run; a view where they stand at even distances."""
        if t is not None and self.evenly is not None:
            return t[self.evenly]
        return t if t is None or self.rows is None else t.index_select(0, self.rows)

    def _for_all(self, t: Tensor) -> Tensor:
        """Entries of the rows that run as entries of all rows."""
        return t if self.rows is None else t.new_zeros((self.batch, *t.shape[1:])).index_copy(0, self.rows, t)

    def extend(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = self.before
        if before is None:
            return super().extend(number, k, v)
        if self.joins:
            k, v = torch.cat((before.keys[number], k), 2), torch.cat((before.values[number], v), 2)
            if self.state is not None:
                self.extended[number] = k, v, None
            return k, v
        if self.appending is None:
            # The blocks of a routed stack hold the same tokens, in columns and validity that are the same tensors.
            key = ("plan", id(before.valid), id(before.columns))
            plan = self.route.once(key, lambda: AppendPlan(before, self.at, self.real, self.rows))
            self.appending = Appending(before, plan)
        k, v = self.appending.write(number, k, v)
        self.extended[number] = k, v, None
        return (k, v) if self.late else (self.pick(k), self.pick(v))

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        if not self.op["update"]:
            return super().attend(number, q, k, v, sinks)
        k, v = self.given[number] if self.given is not None else (k, v)
        k, v = self.extend(number, k, v)
        slot = self.shared_slot
        mask = self._mask(self._updated_columns(), *self.limits(number))
        keys, values = (torch.cat(pair, 2) for pair in ((slot.keys[number], k), (slot.values[number], v)))
        return self.attention(number, q, keys, values, sinks, mask)

    def _updated_columns(self) -> tuple[Tensor, Tensor]:
        """Columns of the shared keys and then of the own ones, and which are real: of a token that has both, the own one."""
        (theirs, real), (own, mine) = self._shared_columns(), self._own_columns()
        theirs, mine = theirs.expand(len(own), -1), torch.ones_like(own, dtype=torch.bool) if mine is None else mine
        end = self.span.start + self.span.count
        replaced = torch.zeros(len(own), end + 1, dtype=torch.bool, device=own.device)
        replaced.scatter_(1, torch.where(mine, own, end), True)
        left = ~replaced.gather(1, theirs)
        return torch.cat((theirs, own), 1), torch.cat((left if real is None else left & real, mine), 1)

    def attention(self, number: int, q, k, v, sinks, mask: tuple[Tensor | None, bool]) -> Tensor:
        """Keys of all rows are picked a few rows at a time, so that attention finds them in the processor's cache."""
        attend = super().attention
        if self.rows is None or len(k) == len(q):
            return attend(number, q, k, v, sinks, mask)
        size = len(q) if k.device.type != "cpu" else max(1, PICKED * len(k) // (k.numel() + v.numel()))
        seen = itertools.repeat(None) if mask[0] is None else mask[0].expand(len(q), -1, -1, -1).split(size)
        return torch.cat([attend(number, asks, k.index_select(0, r), v.index_select(0, r), sinks, (see, mask[1]))
                          for asks, r, see in zip(q.split(size), self.rows.split(size), seen)])

    def _shared_columns(self) -> tuple[Tensor, Tensor | None]:
        slot, valid = self.shared_slot, self.masks.valid
        if slot.columns is None:
            # All columns in order: the whole state, this span included.
            return torch.arange(slot.keys[0].shape[2], device=self.at.device)[None], self.pick(valid)
        if not self.late:
            return slot.columns, validity(slot, self.pick(valid))
        return self._once(slot.columns, slot.valid, lambda: (self.pick(slot.columns), self.pick(validity(slot, valid))))

    def _once(self, columns: Tensor, valid: Tensor | None, make: Callable[[], Any], *key: Any) -> Any:
        """What all visits of the route make of the same columns, which are kept alive: they are known by identity."""
        return self.route.once(("columns", id(columns), id(valid), *key), lambda: (make(), columns, valid))[0]

    def _all_real(self) -> Tensor:
        return torch.ones_like(self.at, dtype=torch.bool) if self.real is None else self.real

    def _own_columns(self) -> tuple[Tensor, Tensor | None]:
        if self.appending is not None:
            plan = self.appending.plan
            return self._once(plan.columns, plan.valid, lambda: (
                self.pick(plan.columns), None if plan.full else self.pick(plan.valid)))
        if self.before is None:
            return self.at, self.real
        return torch.cat((self.before.listed_columns, self.at), 1), torch.cat((reality(self.before), self._all_real()), 1)

    def _mask(self, where: tuple[Tensor, Tensor | None], window: int | None, chunk: int | None) -> tuple[Tensor | None, bool]:
        columns, valid = where
        end = self.span.start + self.span.count
        ahead = self.masks.ahead
        if ahead is None and valid is None and chunk is None and (window is None or window >= end):
            # Nothing but the order matters, and the tokens stand in order.
            if columns is self.at:
                return None, columns.shape[1] > 1
            if self.span.count == 1:
                return None, False
        return self._once(columns, valid, lambda: column_mask(
            self.at[..., None], columns[:, None], window, chunk, valid, self.pick(self.masks.row_start), ahead
        )[:, None], window, chunk), False

    def columns(self, device: torch.device) -> Tensor:
        raise LoweringError(
            f"block {self.index} counts the columns of its tokens itself, so it cannot run on routed tokens. "
            "Leave this block out of the routed stack."
        )

    def commit(self) -> None:
        state, extended, appending = self.state, self.extended, self.appending
        self.state, self.extended = None, {}
        if state is None or not self.keep or not extended:
            return
        if appending is not None:
            state.slots[self.op["slot"]] = appending.slot()
            return
        count, order = self.at.shape[1], range(len(self.sites))
        new = Slot(
            tuple(extended[i][0][:, :, -count:] for i in order), tuple(extended[i][1][:, :, -count:] for i in order)
        ).map(self._for_all)
        columns, valid = self.route.once(("stored", self.span.start), lambda: tuple(
            map(self._for_all, (self.at, self._all_real()))))
        new = replace(new, columns=columns, valid=valid)
        if self.all_before is not None:
            new = joined(self.all_before, new)
        elif self.route.everything and self.real is not None:  # pads stand among the entries
            new = compacted(new)
        state.slots[self.op["slot"]] = new


def _evenly(rows: Tensor | None) -> slice | None:
    """Rows that stand at even distances, which need not be picked to be read; None for others, and for all rows."""
    if rows is None:
        return None
    first, last, step = int(rows[0]), int(rows[-1]), int(rows[1] - rows[0]) if len(rows) > 1 else 1
    even = last - first == step * (len(rows) - 1) and bool((rows.diff() == step).all())
    return slice(first, last + 1, step) if even else None
