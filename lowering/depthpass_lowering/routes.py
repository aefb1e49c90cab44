"""Routes: which tokens of a span take a visit, and how their streams, tables, keys and values are picked and put back.

A routed stream is ``[batch, k, width]`` with k the largest number of tokens any row sends. Rows that send fewer are
filled up with tokens of the row that are not routed: every index of a row differs, so putting tokens back never writes
one place twice, and fillers hold finite values. What is computed from a filler is never stored and never put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from depthpass.errors import InputError
from depthpass.ir.program import Op
from depthpass_lowering.state import Slot


@dataclass(frozen=True)
class Route:
    """The chosen tokens of a span.

    Attributes:
        chosen: ``[batch, tokens]`` bool.
        index: positions in the span, ``[batch, k]``: the chosen ones ascending, then fillers.
        real: which entries of ``index`` are chosen, ``[batch, k]``; None = all.
        rows: rows that send at least one token, ``[rows]``; None = all.
        everything: whether every real token is chosen; then routed streams are the streams themselves, pads included.
    """

    chosen: Tensor
    index: Tensor
    real: Tensor | None
    rows: Tensor | None
    everything: bool = False

    @classmethod
    def of(cls, chosen: Tensor, valid: Tensor | None = None) -> Route:
        """The route of the chosen tokens; ``valid`` says which tokens are real at all (None = all of them)."""
        if bool((chosen if valid is None else chosen | ~valid).all()):
            index = torch.arange(chosen.shape[1], device=chosen.device).expand(len(chosen), -1)
            return cls(chosen, index, valid, None, everything=True)
        if not bool(chosen.any()):
            return cls(chosen, chosen.new_zeros(len(chosen), 0, dtype=torch.long), None, None)
        counts = chosen.sum(-1)
        low, high = (int(n) for n in counts.aminmax())
        index = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)[:, :high]
        real = None if low == high else chosen.gather(1, index)
        return cls(chosen, index, real, counts.nonzero()[:, 0] if low == 0 else None)

    @property
    def count(self) -> int:
        """Entries per row, fillers included."""
        return self.index.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` -> ``[batch, k, width]``."""
        if self.everything:
            return x
        return x.gather(1, self._wide(x))

    def scatter(self, base: Tensor, update: Tensor, mode: str) -> Tensor:
        """The base with the update added to (``add``) or put in the place of (``replace``) the chosen tokens."""
        if not self.count:
            return base
        if self.everything:
            return update.to(base.dtype) if mode == "replace" else base + update.to(base.dtype)
        wide = self._wide(update)
        if mode == "replace":
            if self.real is not None:
                update = torch.where(self.real[..., None], update, base.gather(1, wide))
            return base.scatter(1, wide, update.to(base.dtype))
        if self.real is not None:
            update = torch.where(self.real[..., None], update, update.new_zeros(()))
        return base.scatter_add(1, wide, update.to(base.dtype))

    def spread(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """A routed stream over all tokens of the span, ``fill`` where a token is not routed."""
        base = x.new_full((x.shape[0], self.chosen.shape[1], x.shape[2]), fill)
        return self.scatter(base, x, "replace")

    def table(self, side: Tensor, axis: int) -> Tensor:
        """A per-token table of the span, batch first and tokens on ``axis``, at the routed tokens."""
        shape = [1] * side.dim()
        shape[0], shape[axis] = self.index.shape
        sizes = list(side.shape)
        sizes[0] = self.index.shape[0]
        index = self.index.reshape(shape).expand([*sizes[:axis], self.count, *sizes[axis + 1 :]])
        return side.expand(sizes).gather(axis, index)

    def split(self, sizes: Sequence[int]) -> list[Route]:
        return [Route.of(part) for part in self.chosen.split(list(sizes), 1)]

    def _wide(self, x: Tensor) -> Tensor:
        return self.index[..., None].expand(-1, -1, x.shape[2])


def choose(o: Op, score: Tensor, outer: Route | None, valid: Tensor | None, before: int) -> Route:
    """Run a ``route`` op.

    Args:
        score: ``[batch, tokens, 1]`` (``R`` for rule ``choice``) over all tokens of the span.
        outer: the set to choose from; None = all real tokens.
        valid: which tokens of the span are real, ``[batch, tokens]``; None = all. Pads are never chosen.
        before: tokens of the row that came in earlier calls.

    Raises:
        InputError: rule ``topk`` in a call that has only a part of the row.
    """
    score = score.detach()
    candidates = outer.chosen if outer is not None else valid
    if o["rule"] == "topk":
        if before:
            raise InputError(
                f"%{o.name} = route topk: chooses among all tokens of a row, so it cannot decode on top of a cache: "
                f"{before} tokens have been chosen from already. Use mode='threshold', or score whole rows."
            )
        chosen = _best(o, score[..., 0], candidates, valid)
    elif o["rule"] == "threshold":
        chosen = score[..., 0] >= o["threshold"]
    elif o["rule"] == "above":
        chosen = score[..., 0] > o["threshold"]
    else:
        chosen = score.argmax(-1) + 1 >= o["depth"]
    return Route.of(chosen if candidates is None else chosen & candidates, valid)


def _best(o: Op, score: Tensor, candidates: Tensor | None, valid: Tensor | None) -> Tensor:
    """The top max(1, capacity * real tokens) of each row; ties go to the earlier token."""
    if candidates is not None:
        score = score.masked_fill(~candidates, float("-inf"))
    real = score.new_full((score.shape[0],), score.shape[1], dtype=torch.float64) if valid is None else (
        valid.sum(-1).double()
    )
    share = real * o["capacity"]
    k = (share.ceil() if o["rounding"] == "ceil" else share.floor()).clamp_min(1)
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < k[:, None]


def stored(before: Slot | None, new: Slot, rows: Tensor | None, batch: int) -> Slot:
    """A routed visit's slot after new entries: real entries only, as many per row as the row has had.

    Args:
        before: the slot so far, all rows.
        new: the entries of this call, of the active rows.
        rows: the active rows; None = all.
    """
    if rows is not None:
        def widen(t: Tensor) -> Tensor:
            return t.new_zeros((batch, *t.shape[1:])).index_copy(0, rows, t)

        new = new.map(widen)
    joined = new if before is None else join(before, new)
    if bool(joined.valid.all()):
        return replace(joined, valid=None)
    high = int(joined.valid.sum(-1).max())
    order = torch.argsort((~joined.valid).to(torch.uint8), dim=1, stable=True)[:, :high]

    def compact(t: Tensor) -> Tensor:
        if t.dim() == 2:
            return t.gather(1, order)
        return t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))

    return joined.map(compact)


def listed(slot: Slot, valid: Tensor | None) -> Slot:
    """A slot of tokens in order as one that lists its columns, and which of them are real."""
    if slot.columns is not None:
        return slot
    batch, n = slot.keys[0].shape[0], slot.keys[0].shape[2]
    columns = torch.arange(slot.first, slot.first + n, device=slot.keys[0].device).expand(batch, -1)
    real = None if valid is None else valid[:, slot.first : slot.first + n]
    return Slot(slot.keys, slot.values, columns, real)


def reality(slot: Slot) -> Tensor:
    """Which entries of a routed visit's slot are real, ``[batch, n]``."""
    return torch.ones_like(slot.columns, dtype=torch.bool) if slot.valid is None else slot.valid


def join(before: Slot, new: Slot) -> Slot:
    """Entries of a routed visit's slot followed by new ones."""
    return Slot(
        tuple(torch.cat((a, b), 2) for a, b in zip(before.keys, new.keys)),
        tuple(torch.cat((a, b), 2) for a, b in zip(before.values, new.values)),
        torch.cat((before.columns, new.columns), 1),
        torch.cat((reality(before), reality(new)), 1),
    )
