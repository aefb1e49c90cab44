"""Training losses of a program and the loads that balance it, over real tokens, gathered from all rows of a call.

Rows with loop counts of their own run in groups. A mean over all tokens is no mean of the groups' means, so groups hand in
sums and counts, and values are made once for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from depthpass.ir.program import Op


@dataclass
class Pool:
    """What the runs of one call hand in.

    Attributes:
        asked: whether losses are computed; the balance of routers that train is kept in any case.
        sums: per loss op, by its name and its place among the losses of that name: the op and its sums.
        loads: per balanced router, by its parameter's name: the module, its rate and how many tokens chose each place.
    """

    asked: bool = False
    sums: dict[tuple[str, int], tuple[Op, Tensor]] = field(default_factory=dict)
    loads: dict[str, tuple[Any, float, Tensor]] = field(default_factory=dict)

    def loss(self, key: tuple[str, int], o: Op, sums: Tensor) -> None:
        held = self.sums.get(key)
        self.sums[key] = o, sums if held is None else held[1] + sums

    def load(self, name: str, balance: Any, rate: float, load: Tensor) -> None:
        held = self.loads.get(name)
        self.loads[name] = balance, rate, load if held is None else held[2] + load

    def move(self) -> None:
        """One step of every balanced router, whatever the number of chunks and groups."""
        for balance, rate, load in self.loads.values():
            balance.move(load, rate)
        self.loads = {}

    def values(self) -> tuple[dict[str, Tensor], Tensor | float] | None:
        """Losses by name before their coefficients, and the sum of all with them; None = not computed."""
        if not self.asked:
            return None
        losses: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for (name, _), (o, sums) in self.sums.items():
            value = value_of(o["rule"], sums)
            losses[name] = losses.get(name, 0) + value
            total = total + o["coefficient"] * value
        return losses, total


def sums_of(rule: str, score: Tensor, taken: Tensor | None, among: Tensor | None) -> Tensor:
    """What the value of a ``loss`` op is made of, in float32 or wider: sums over tokens, and last their number.

    Args:
        score: ``[batch, tokens, width]``.
        taken: who the route of ``bce`` took, ``[batch, tokens]``; None = everybody.
        among: tokens that count, ``[batch, tokens]``; None = all.
    """
    score = score if score.dtype == torch.float64 else score.float()
    if rule == "balance":
        chosen = F.one_hot(score.argmax(-1), score.shape[-1]).to(score.dtype)
        terms = torch.cat((chosen, score), -1)
    elif rule == "z":
        terms = score.logsumexp(-1, keepdim=True).square()
    else:
        target = torch.ones_like(score) if taken is None else taken.to(score.dtype)[..., None]
        terms = F.binary_cross_entropy_with_logits(score[..., :1], target[..., :1], reduction="none")
    if among is None:
        return torch.cat((terms.sum((0, 1)), terms.new_full((1,), terms.shape[0] * terms.shape[1])))
    terms = torch.where(among[..., None], terms, terms.new_zeros(()))
    return torch.cat((terms.sum((0, 1)), among.sum()[None].to(terms.dtype)))


def value_of(rule: str, sums: Tensor) -> Tensor:
    """Value of a ``loss`` op before its coefficient."""
    means = sums[:-1] / sums[-1].clamp_min(1)
    if rule != "balance":
        return means[0]
    share, mass = means.chunk(2)
    return len(share) * (share * mass).sum()
