"""A visit of the routed tokens of a span."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import LoweringError
from depthpass.ir.program import Op
from depthpass_lowering.host import Host
from depthpass_lowering.state.ragged import Appending, AppendPlan, compacted, joined, listed, reality, widened
from depthpass_lowering.state.slots import Slot, Span, State
from depthpass_lowering.visits.attention import Masks, column_mask
from depthpass_lowering.visits.routes import Route
from depthpass_lowering.visits.running import RunningVisit, validity


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
            and op["gate"] is None and not op["update"] and 3 * len(self.rows) >= self.batch
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

    def pick(self, t: Tensor | None) -> Any:
        """What belongs to the rows that run; a view where they stand together."""
        if t is not None and self.together is not None:
            return t.narrow(0, *self.together)
        return t if t is None or self.rows is None else t.index_select(0, self.rows)

    def _for_all(self, t: Tensor) -> Tensor:
        """Entries of the rows that run as entries of all rows."""
        return t if self.rows is None else t.new_zeros((self.batch, *t.shape[1:])).index_copy(0, self.rows, t)

    def _stored(self, t: Tensor | None) -> Any:
        """What belongs to the rows that attention over stored keys runs for."""
        return t if self.wide else self.pick(t)

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
        return self._stored(k), self._stored(v)

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        if not self.op["update"]:
            return super().attend(number, q, k, v, sinks)
        k, v = self.given[number] if self.given is not None else (k, v)
        k, v = self.extend(number, k, v)
        slot = self.shared_slot
        mask = self._mask(self._updated_columns(), *self.limits(number))
        return self.attention(
            number, q, torch.cat((slot.keys[number], k), 2), torch.cat((slot.values[number], v), 2), sinks, mask
        )

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
        slot, valid = self.shared_slot, self._stored(self.masks.valid)
        if slot.columns is None:
            # All columns in order: the whole state, this span included.
            return torch.arange(slot.keys[0].shape[2], device=self.at.device)[None], valid
        return slot.columns, validity(slot, valid)

    def _all_real(self) -> Tensor:
        return torch.ones_like(self.at, dtype=torch.bool) if self.real is None else self.real

    def _own_columns(self) -> tuple[Tensor, Tensor | None]:
        if self.appending is not None:
            plan = self.appending.plan
            return self._stored(plan.columns), None if plan.full else self._stored(plan.valid)
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
        state, extended, appending = self.state, self.extended, self.appending
        self.state, self.extended = None, {}
        if state is None or not self.keep or not extended:
            return
        if appending is not None:
            state.slots[self.op["slot"]] = appending.slot()
            return
        count, order = self.at.shape[1], range(len(self.sites))
        new = widened(Slot(
            tuple(extended[i][0][:, :, -count:] for i in order), tuple(extended[i][1][:, :, -count:] for i in order),
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


def _together(rows: Tensor | None) -> tuple[int, int] | None:
    """First and number of rows that follow one another; None for others, and for all rows."""
    if rows is None:
        return None
    first, last = int(rows[0]), int(rows[-1])
    return (first, len(rows)) if last - first + 1 == len(rows) else None
