"""Routes: which tokens of a span take a visit, and how their streams and tables are picked and put back.

A routed stream is ``[batch, k, width]`` with k the largest number of tokens any row sends. Rows that send fewer are
filled up with tokens of the row that are not routed: every index of a row differs, so putting tokens back never writes
one place twice, and fillers hold finite values. What is computed from a filler is never stored and never put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import InputError
from depthpass.ir.program import Op
from depthpass.ir.shares import exact_share, tokens_of


@dataclass(frozen=True)
class Route:
    """The chosen tokens of a span.

    Attributes:
        chosen: ``[batch, tokens]`` bool.
        index: positions in the span, ``[batch, k]``: the chosen ones ascending, then fillers.
        real: which entries of ``index`` are chosen, ``[batch, k]``; None = all.
        rows: rows that send at least one token, ``[rows]``; None = all.
        everything: whether every real token is chosen; then routed streams are the streams themselves, pads included.
        memo: what visits of this route work out once for all of them.
    """

    chosen: Tensor
    index: Tensor
    real: Tensor | None
    rows: Tensor | None
    everything: bool = False
    memo: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made on the first call with this key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

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

    @classmethod
    def at(cls, index: Tensor, tokens: int) -> Route:
        """The same number of tokens in every row: nothing has to be counted."""
        chosen = torch.zeros(len(index), tokens, dtype=torch.bool, device=index.device)
        return cls(chosen.scatter_(1, index, True), index, None, None, everything=index.shape[1] == tokens)

    @property
    def count(self) -> int:
        """Entries per row, fillers included."""
        return self.index.shape[1]

    @cached_property
    def flat(self) -> Tensor:
        """Places of the entries in all rows laid end to end, ``[batch * k]``: whole rows of memory are moved."""
        rows = torch.arange(len(self.index), device=self.index.device)[:, None]
        return (self.index + rows * self.chosen.shape[1]).flatten()

    def gather(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` -> ``[batch, k, width]``."""
        if self.everything:
            return x
        return x.reshape(-1, x.shape[2]).index_select(0, self.flat).view(x.shape[0], self.count, x.shape[2])

    def scatter(self, base: Tensor, update: Tensor, mode: str) -> Tensor:
        """The base with the update added to (``add``) or put in place of (``replace``) the chosen tokens."""
        if not self.count:
            return base
        update = update.to(base.dtype)
        if self.everything:
            return base + update if mode == "add" else update
        rows = base.reshape(-1, base.shape[2])
        if self.real is not None:
            spare = base.new_zeros(()) if mode == "add" else self.gather(base)
            update = torch.where(self.real[..., None], update, spare)
        write = rows.index_add if mode == "add" else rows.index_copy
        return write(0, self.flat, update.reshape(-1, base.shape[2])).view(base.shape)

    def spread(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """A routed stream over all tokens of the span, ``fill`` where a token is not routed."""
        base = x.new_full((x.shape[0], self.chosen.shape[1], x.shape[2]), fill)
        return self.scatter(base, x, "replace")

    def table(self, side: Tensor, axis: int) -> Tensor:
        """A per-token table of the span, batch first and tokens on ``axis``, at the routed tokens."""
        if self.everything:
            return side
        if axis == 1 and side.dim() == 3 and side.shape[0] == len(self.index):
            return self.gather(side)
        shape = [1] * side.dim()
        shape[0], shape[axis] = self.index.shape
        sizes = list(side.shape)
        sizes[0] = self.index.shape[0]
        index = self.index.reshape(shape).expand([*sizes[:axis], self.count, *sizes[axis + 1 :]])
        return side.expand(sizes).gather(axis, index)

    def split(self, sizes: Sequence[int]) -> list[Route]:
        return [Route.of(part) for part in self.chosen.split(list(sizes), 1)]


def choose(
    o: Op, score: Tensor, outer: Route | None, valid: Tensor | None, before: int, ratio: float | None = None
) -> Route:
    """Run a ``route`` op.

    Args:
        score: ``[batch, tokens, 1]`` (``R`` for rule ``choice``) over all tokens of the span.
        outer: the set to choose from; None = all real tokens.
        valid: which tokens of the span are real, ``[batch, tokens]``; None = all. Pads are never chosen.
        before: tokens of the row that came in earlier calls.
        ratio: in place of the op's own capacity; for the other rules 0 = nobody, 1 = as the rule says.

    Raises:
        InputError: rule ``topk`` in a call that has only a part of the row.
    """
    score = score.detach()
    batch, tokens = score.shape[:2]
    if ratio == 0:
        return Route.at(torch.zeros(batch, 0, dtype=torch.long, device=score.device), tokens)
    candidates = outer.chosen if outer is not None else valid
    if o["rule"] == "topk":
        capacity = o["capacity"] if ratio is None else ratio
        if before:
            raise InputError(
                f"%{o.name} = route topk: chooses among all tokens of a row, so it cannot decode on top of a cache: "
                f"{before} tokens have been chosen from already. Use mode='threshold', or score whole rows."
            )
        if valid is None and (outer is None or outer.real is None):
            return _top(score[..., 0], outer, tokens_of(capacity, o["rounding"], tokens))
        chosen = _best(score[..., 0], candidates, valid, capacity, o["rounding"])
    elif o["rule"] == "threshold":
        chosen = score[..., 0] >= o["threshold"]
    elif o["rule"] == "above":
        chosen = score[..., 0] > o["threshold"]
    else:
        chosen = score.argmax(-1) + 1 >= o["depth"]
    return Route.of(chosen if candidates is None else chosen & candidates, valid)


def _top(score: Tensor, outer: Route | None, k: int) -> Route:
    """The best k tokens of rows that all have the same number to choose from; ties go to the earlier token."""
    batch, tokens = score.shape
    among = None if outer is None or outer.everything else outer.index
    k = min(k, tokens if among is None else among.shape[1])
    if among is None and k == tokens:
        return Route.at(torch.arange(tokens, device=score.device).expand(batch, -1), tokens)
    if among is not None:
        score = score.gather(1, among)
    best = torch.argsort(score, dim=1, descending=True, stable=True)[:, :k].sort(1).values
    return Route.at(best if among is None else among.gather(1, best), tokens)


def _best(
    score: Tensor, candidates: Tensor | None, valid: Tensor | None, capacity: float, rounding: str
) -> Tensor:
    """The best ``capacity`` share of each row's real tokens, at least one; ties go to the earlier token."""
    if candidates is not None:
        score = score.masked_fill(~candidates, float("-inf"))
    real = score.new_full((score.shape[0],), score.shape[1], dtype=torch.long) if valid is None else valid.sum(-1)
    share = exact_share(capacity)
    whole = real * share.numerator + (share.denominator - 1 if rounding == "ceil" else 0)
    k = whole.div(share.denominator, rounding_mode="floor").clamp_min(1)
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank < k[:, None]
