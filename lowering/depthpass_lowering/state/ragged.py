"""Slots of routed visits: as many entries per row as tokens were routed, appended in place while that is safe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthpass_lowering.state.slots import Slot, room_for


@dataclass(eq=False)
class RaggedRoom:
    """Memory behind a slot that may be longer than the slot.

    Several states may share it: entries of a slot never change, and only the newest slot may append in place. A slot that
    continues an older state finds that it is not the newest and is copied.

    Attributes:
        keys, values: ``[batch, room, kv_heads, dim]`` per attention call.
        newest: the slot that was appended last.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    newest: Slot | None = None

    def open_to(self, slot: Slot, entries: int) -> bool:
        """Whether a slot may grow in here to so many entries per row."""
        frozen = any(t.requires_grad for t in (*self.keys, *self.values)) or (
            # A tensor made in inference mode cannot be written when that is over.
            self.keys[0].is_inference() and not torch.is_inference_mode_enabled()
        )
        return self.newest is slot and self.keys[0].shape[1] >= entries and not frozen


class AppendPlan:
    """Where new entries of routed tokens go, for all visits of one route that hold the same tokens.

    Args:
        before: a slot so far, all rows.
        columns, real: of the new entries of the active rows, ``[rows, k]``; real None = all.
        rows: the active rows; None = all.

    Attributes:
        columns, valid: of all entries afterwards, ``[batch, high]``.
        full: whether every entry of the active rows is real.
    """

    def __init__(self, before: Slot, columns: Tensor, real: Tensor | None, rows: Tensor | None):
        batch = len(before.listed_columns)
        active = torch.arange(batch, device=columns.device) if rows is None else rows
        counts = reality(before).sum(-1)
        added = columns.shape[1] if real is None else real.sum(-1)
        after = counts.clone()
        after[active] += added
        self.high = int(after.max())
        row, entry = torch.ones_like(columns, dtype=torch.bool).nonzero(as_tuple=True) if real is None else (
            real.nonzero(as_tuple=True)
        )
        rank = entry if real is None else (real.long().cumsum(1) - 1)[row, entry]
        self.source, self.place = (row, entry), (active[row], counts[active[row]] + rank)
        self.columns = before.listed_columns.new_zeros(batch, self.high)
        # A slot may be wider than its longest row: rows that were dropped or reordered leave their width behind.
        held = min(before.listed_columns.shape[1], self.high)
        self.columns[:, :held] = before.listed_columns[:, :held]
        self.columns.index_put_(self.place, columns[self.source])
        self.valid = torch.arange(self.high, device=after.device)[None] < after[:, None]
        self.full = bool((after[active] == self.high).all())
        self.before = before  # kept alive: plans are found by its identity


class Appending:
    """A routed visit's slot while new entries are appended to it; without gradients."""

    def __init__(self, before: Slot, plan: AppendPlan):
        self.plan, self.room = plan, _room(before, plan.high)

    def write(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new entries of one attention call; returns all entries of all rows, ``[batch, kv_heads, n, dim]``."""
        first, high = self.plan.before.listed_columns.shape[1], self.plan.high
        for target, source in ((self.room.keys[number], keys), (self.room.values[number], values)):
            # Rows that append less are read up to here as well, and masked: it has to be finite.
            target[:, first:high].zero_()
            target.index_put_(self.plan.place, source.transpose(1, 2)[self.plan.source])
        return self._held(self.room.keys[number]), self._held(self.room.values[number])

    def slot(self) -> Slot:
        """The slot with the new entries, once all attention calls have written theirs."""
        room, plan = self.room, self.plan
        slot = Slot(
            tuple(map(self._held, room.keys)), tuple(map(self._held, room.values)), plan.columns, plan.valid, ragged=room
        )
        room.newest = slot
        return slot

    def _held(self, t: Tensor) -> Tensor:
        return t[:, : self.plan.high].transpose(1, 2)


def _room(slot: Slot, entries: int) -> RaggedRoom:
    """Memory with the slot's entries and place for at least so many per row."""
    if slot.ragged is not None and slot.ragged.open_to(slot, entries):
        return slot.ragged
    size, held = entries + room_for(entries), min(slot.listed_columns.shape[1], entries)

    def longer(t: Tensor) -> Tensor:
        memory = t.new_empty((t.shape[0], size, *t.shape[2:]))
        memory[:, :held] = t[:, :held]
        return memory

    keys, values = (tuple(longer(t.transpose(1, 2)) for t in side) for side in (slot.keys, slot.values))
    return RaggedRoom(keys, values)


def joined(before: Slot, new: Slot) -> Slot:
    """Entries of a slot followed by new ones of all rows, real ones moved to the front; keeps gradients."""
    return compacted(Slot(
        tuple(torch.cat(pair, 2) for pair in zip(before.keys, new.keys)),
        tuple(torch.cat(pair, 2) for pair in zip(before.values, new.values)),
        torch.cat((before.listed_columns, new.listed_columns), 1), torch.cat((reality(before), reality(new)), 1),
    ))


def compacted(slot: Slot) -> Slot:
    """A slot with the real entries of each row first, as many as the row with most has."""
    high = int(reality(slot).sum(-1).max())
    order = torch.argsort((~reality(slot)).to(torch.uint8), dim=1, stable=True)[:, :high]

    def compact(t: Tensor) -> Tensor:
        if t.dim() == 2:
            return t.gather(1, order)
        return t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))

    return slot.map(compact)


def listed(slot: Slot, valid: Tensor | None) -> Slot:
    """A slot of tokens in order as one that lists its columns, real entries first."""
    if slot.columns is not None:
        return slot
    batch, n = slot.keys[0].shape[0], slot.keys[0].shape[2]
    columns = torch.arange(slot.first, slot.first + n, device=slot.keys[0].device).expand(batch, -1)
    if valid is None:
        return Slot(slot.keys, slot.values, columns)
    return compacted(Slot(slot.keys, slot.values, columns, valid[:, slot.first : slot.first + n]))


def reality(slot: Slot) -> Tensor:
    """Which entries of a routed visit's slot are real, ``[batch, n]``."""
    return torch.ones_like(slot.listed_columns, dtype=torch.bool) if slot.valid is None else slot.valid
