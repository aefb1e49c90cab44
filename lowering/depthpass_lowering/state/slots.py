"""State: what a batch of rows carries from one call to the next, as an argument and a result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from depthpass.errors import CacheError

if TYPE_CHECKING:
    from depthpass_lowering.state.ragged import RaggedRoom


def room_for(columns: int) -> int:
    """Free columns that a slot of so many is given when it grows: a 64th, so that copies and free memory stay about that
    part of the whole, but at least 16."""
    return max(16, columns // 64)


@dataclass(eq=False)
class Room:
    """Keys and values with free columns behind those in use, shared by the slots that grew out of one another.

    A column is written once: a slot may only grow in place where no other slot has grown before, so what an earlier state
    sees never changes.

    Attributes:
        k, v: ``[batch, kv_heads, capacity, dim]``.
        used: columns written.
    """

    k: Tensor
    v: Tensor
    used: int


@dataclass(frozen=True)
class Slot:
    """Keys and values of one visit, one entry per attention call of its block.

    Attributes:
        keys, values: ``[batch, kv_heads, n, dim]`` per attention call.
        columns: column of each key in its row, ``[batch, n]``; None = tokens in order, ``first .. first+n-1``.
        valid: which entries are real, ``[batch, n]``; None with ``columns`` None = the state's own validity.
        first: column of the first entry where ``columns`` is None.
        places: per attention call, where its entries end in a room; None = nothing to grow into.
        ragged: memory that a routed visit's slot, whose rows differ in length, may grow in.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    columns: Tensor | None = None
    valid: Tensor | None = None
    first: int = 0
    places: tuple[Place | None, ...] | None = None
    ragged: RaggedRoom | None = field(default=None, repr=False, compare=False)

    @property
    def listed_columns(self) -> Tensor:
        """``columns`` of a slot that lists them."""
        if self.columns is None:
            raise TypeError("a slot of tokens in order lists no columns")
        return self.columns

    def map(self, fn: Callable[[Tensor], Tensor]) -> Slot:
        return Slot(
            tuple(map(fn, self.keys)), tuple(map(fn, self.values)),
            None if self.columns is None else fn(self.columns), None if self.valid is None else fn(self.valid), self.first,
        )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def grown(self, number: int, k: Tensor, v: Tensor, last: int | None = None) -> Grown:
        """The entries of one attention call with new ones behind them: in place where that is safe, else copied.

        Args:
            last: only so many of them; None = all.
        """
        old_k, old_v = self.keys[number], self.values[number]
        n, m = old_k.shape[2], k.shape[2]
        if last is not None and (drop := n + m - last) > 0:
            old_k, old_v, n = old_k.narrow(2, drop, n - drop), old_v.narrow(2, drop, n - drop), n - drop
        if torch.is_grad_enabled():
            return torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), None
        place = None if self.places is None else self.places[number]
        if place is None or not place.takes(k, v):
            room = Room(_wider(old_k, k), _wider(old_v, v), n)
            room.k.narrow(2, 0, n).copy_(old_k)
            room.v.narrow(2, 0, n).copy_(old_v)
            place = Place(room, n)
        room, at = place.room, place.end
        room.k.narrow(2, at, m).copy_(k)
        room.v.narrow(2, at, m).copy_(v)
        room.used = at + m
        return room.k.narrow(2, at - n, n + m), room.v.narrow(2, at - n, n + m), Place(room, at + m)

    def last(self, count: int) -> Slot:
        """The last ``count`` entries of a slot of tokens in order, in memory of their own unless they grow."""
        n = self.keys[0].shape[2]
        if n <= count:
            return self
        # Copies, so that the long prefix is freed.
        return replace(self.map(lambda t: t[:, :, n - count :].contiguous()), first=self.first + n - count)


Grown = tuple[Tensor, Tensor, "Place | None"]


@dataclass(frozen=True)
class Place:
    """The entries of a room before column ``end``."""

    room: Room
    end: int

    def takes(self, k: Tensor, v: Tensor) -> bool:
        """Whether new columns can be written right behind: nothing has been, they fit, and they need no wider type."""
        room = self.room
        return (
            self.end == room.used and self.end + k.shape[2] <= room.k.shape[2]
            and torch.promote_types(room.k.dtype, k.dtype) == room.k.dtype
            and torch.promote_types(room.v.dtype, v.dtype) == room.v.dtype
            # A tensor made in inference mode cannot be written when that is over.
            and (torch.is_inference_mode_enabled() or not room.k.is_inference())
        )


def _wider(old: Tensor, new: Tensor) -> Tensor:
    """Memory for both and some more columns."""
    columns = old.shape[2] + new.shape[2]
    return new.new_empty(
        *old.shape[:2], columns + room_for(columns), old.shape[3], dtype=torch.promote_types(old.dtype, new.dtype)
    )


@dataclass
class State:
    """KV slots, delay lines and token counters of a batch.

    Attributes:
        length: columns seen so far.
        valid: which columns hold real tokens, ``[batch, length]`` bool; None = all of them.
        slots: by slot number.
        lines: by delay name: the source stream at the last real tokens of each row, ``[batch, >= n, width]``, most
            recent last; zeros where a row has fewer.
        record: keep whole delay lines instead of the last n tokens, so that tokens can be taken back (crop).
        since: columns seen when recording began: how far back tokens can be taken.
        pads: which columns are workspace pads of the program, ``[batch, length]`` bool; None = none.
    """

    length: int = 0
    valid: Tensor | None = None
    slots: dict[int, Slot] = field(default_factory=dict)
    lines: dict[str, Tensor] = field(default_factory=dict)
    record: bool = False
    since: int = 0
    pads: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Columns that callers know of."""
        return self.length - (0 if self.pads is None else int(self.pads[0].sum()))

    def longer_pads(self, count: int) -> Tensor | None:
        """``pads`` with so many more columns, which are none."""
        return None if self.pads is None else torch.nn.functional.pad(self.pads, (0, count))

    @property
    def known(self) -> Tensor | None:
        """Validity of the columns that callers know of; None = all real."""
        if self.valid is None or self.pads is None:
            return self.valid
        return self.valid[~self.pads].view(len(self.valid), -1)

    def fork(self) -> State:
        """A state that can be advanced without changing this one (tensors are shared, never written in place)."""
        return replace(self, slots=self.slots.copy(), lines=dict(self.lines))

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """Apply a function to every tensor; all have the batch as dimension 0."""
        return State(
            self.length, None if self.valid is None else fn(self.valid),
            {k: s.map(fn) for k, s in self.slots.items()}, {k: fn(t) for k, t in self.lines.items()}, self.record,
            self.since, None if self.pads is None else fn(self.pads),
        )

    def nbytes(self) -> tuple[int, int]:
        """Bytes held in (KV slots, delay lines)."""
        kv = sum(s.nbytes for s in self.slots.values())
        return kv, sum(t.nbytes for t in self.lines.values())


def crop(state: State, length: int) -> State:
    """The state after its first ``length`` columns.

    Raises:
        CacheError: the delay lines do not reach back that far (they keep only what decoding needs, unless ``record``).
    """
    if length == 0:  # nothing has to be known of it, not even the rows
        return State(record=state.record)
    if state.lines and not state.record:
        raise CacheError(
            f"crop: the delay lines only hold the last tokens of each row, so {state.length - length} tokens cannot be "
            "taken back. Make the cache with DepthCache(model, record=True)."
        )
    if state.lines and length < state.since:
        raise CacheError(
            f"crop: the delay lines were recorded from token {state.since} on, so only tokens after it can be taken back, "
            f"not all after {length}. Make the cache with DepthCache(model, record=True) to record from the start."
        )
    if state.pads is not None and bool(state.pads[:, length:].any()):
        raise CacheError("crop: the workspace pads and the prompt before them cannot be taken back. Make a new cache.")
    dropped = state.length - length
    valid = state.valid
    lines = {}
    for name, line in state.lines.items():
        if valid is None:
            lines[name] = line[:, : line.shape[1] - dropped]
            continue
        # Lines hold real tokens only, newest last: shift each row right by the real tokens it loses.
        lost = valid[:, length:].long().sum(-1, keepdim=True)
        index = torch.arange(line.shape[1], device=line.device)[None, :] - lost
        kept = line.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, line.shape[2]))
        lines[name] = torch.where((index >= 0)[..., None], kept, kept.new_zeros(()))
    slots = {}
    for number, slot in state.slots.items():
        if slot.columns is not None or slot.first:
            raise CacheError("crop: a slot of a routed or windowed visit does not hold every token. Windowed ones do with "
                             "DepthCache(model, record=True); routed ones cannot be cropped.")
        slots[number] = slot.map(lambda t: t[:, :, :length])
    return State(length, None if valid is None else valid[:, :length], slots, lines, state.record, state.since,
                 None if state.pads is None else state.pads[:, :length])


@dataclass(frozen=True)
class Span:
    """A run of new tokens: columns ``start .. start+count-1`` of every row.

    Attributes:
        valid: which of them are real, ``[batch, count]``; None = all.
        rank: real tokens of the row before each token, ``[batch, count]``; None when ``valid`` is None and no earlier
            column is padding: then the rank is the column.
    """

    start: int
    count: int
    valid: Tensor | None
    rank: Tensor | None

    def present(self, absent: int) -> Tensor | bool:
        """Where a value that is absent for the first ``absent`` real tokens is present: True, False or a mask."""
        if self.rank is not None:
            return self.rank >= absent
        missing = absent - self.start
        return True if missing <= 0 else False if missing >= self.count else _from(missing, self.count)


def _from(first: int, count: int) -> Tensor:
    return torch.arange(count)[None, :] >= first


def spans(
    length: int, count: int, valid: Tensor | None, earlier: Tensor | None, chunk: int | None, groups: Sequence[int] = ()
) -> list[Span]:
    """Cut ``count`` new tokens after ``length`` old ones into spans of at most ``chunk`` (None = one span).

    Args:
        valid: validity of all columns, old and new, ``[batch, length + count]``; None = no padding anywhere.
        groups: sizes of groups of real tokens that no span may reach across, in any row.
    """
    step = count if chunk is None else chunk
    starts = _starts(length, count, valid, step, groups) if groups else range(0, count, step)
    rank = None if valid is None else (valid.long().cumsum(-1) - valid.long())[:, length:]
    new = None if valid is None else valid[:, length:]
    return [
        Span(
            length + a, end - a, None if new is None else new[:, a:end], None if rank is None else rank[:, a:end],
        )
        for a, end in pairwise([*starts, count])
    ]


def _starts(length: int, count: int, valid: Tensor | None, step: int, groups: Sequence[int]) -> list[int]:
    """Where spans begin: wherever a group of some row does, and ``step`` tokens behind another at most."""
    if valid is None:
        begins = [any((length + a) % g == 0 for g in groups) for a in range(count)]
    else:
        rank = (valid.long().cumsum(-1) - valid.long())[:, length:]
        first = functools.reduce(torch.logical_or, (rank % g == 0 for g in groups)) & valid[:, length:]
        begins = first.any(0).tolist()
    starts = [0]
    for a in range(1, count):
        if begins[a] or a - starts[-1] >= step:
            starts.append(a)
    return starts


def read_delay(line: Tensor, source: Tensor | None, n: int, span: Span) -> Tensor:
    """Values of ``delay n`` for the tokens of a span.

    Args:
        line: the source at earlier tokens, most recent last, ``[batch, >= n, width]``.
        source: the source at the span's own tokens when it is known already, else None (then ``span.count <= n``).
    """
    past = line[:, line.shape[1] - n :]
    if span.valid is None:
        combined = past if source is None or span.count <= n else torch.cat((past, source), 1)
        return combined[:, : span.count]
    index = (span.valid.long().cumsum(-1) - span.valid.long())
    combined = past if source is None else torch.cat((past, _compact(source, span.valid)), 1)
    # Pads at the end of a row may count past a line read without its source; what they read is never used.
    index = index.clamp_max(combined.shape[1] - 1)
    return combined.gather(1, index[..., None].expand(-1, -1, combined.shape[2]))


def read_group(line: Tensor, source: Tensor | None, size: int, span: Span) -> Tensor:
    """Values of ``delay 1 group size`` for the tokens of a span: the source at the last token of the group before.

    Args:
        line, source: as of :func:`read_delay`; without its source a span lies within one group of each row.
    """
    past, device = line[:, line.shape[1] - size :], line.device
    if span.valid is None:
        before = torch.arange(span.count, device=device)[None]
        combined = past if source is None else torch.cat((past, source), 1)
    else:
        before = span.valid.long().cumsum(-1) - span.valid.long()
        combined = past if source is None else torch.cat((past, _compact(source, span.valid)), 1)
    rank = span.start + before if span.rank is None else span.rank
    index = (size - 1 + before - rank % size).clamp(0, combined.shape[1] - 1)
    return combined.gather(1, index[..., None].expand(len(line), -1, combined.shape[2]))


def push_delay(line: Tensor, source: Tensor, n: int, span: Span, record: bool) -> Tensor:
    """The delay line after a span."""
    keep = line.shape[1] + span.count if record else n
    if span.valid is None:
        combined = source if span.count >= keep else torch.cat((line, source), 1)
        return combined[:, combined.shape[1] - keep :]
    combined = torch.cat((line, _compact(source, span.valid)), 1)
    # Rows with fewer real tokens than columns keep more of their past: take the window that ends at the last real one.
    shift = span.valid.long().sum(-1, keepdim=True)
    index = shift + torch.arange(line.shape[1], device=line.device)[None, :]
    if record:
        pads = span.count - shift
        index = torch.arange(keep, device=line.device)[None, :] - pads
        kept = combined.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, combined.shape[2]))
        return torch.where((index >= 0)[..., None], kept, kept.new_zeros(()))
    return combined.gather(1, index[..., None].expand(-1, -1, combined.shape[2]))


def _compact(x: Tensor, valid: Tensor) -> Tensor:
    """Real tokens first, in order; what follows is filler."""
    order = torch.argsort((~valid).long(), dim=1, stable=True)
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
