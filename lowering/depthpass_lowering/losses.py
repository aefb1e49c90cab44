"""Training losses of a program, over real tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loss(rule: str, score: Tensor, taken: Tensor | None, among: Tensor | None) -> Tensor:
    """Value of a ``loss`` op before its coefficient, in float32 or wider.

    Args:
        score: ``[batch, tokens, width]``.
        taken: who the route of ``bce`` took, ``[batch, tokens]``; None = everybody.
        among: tokens that count, ``[batch, tokens]``; None = all.
    """
    score = score if score.dtype == torch.float64 else score.float()
    if rule == "balance":
        return _balance(score, among)
    if rule == "z":
        return _mean(score.logsumexp(-1).square(), among)
    logit = score[..., 0]
    target = torch.ones_like(logit) if taken is None else taken.to(logit.dtype)
    return _mean(F.binary_cross_entropy_with_logits(logit, target, reduction="none"), among)


def _balance(p: Tensor, among: Tensor | None) -> Tensor:
    chosen = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
    share, mass = (torch.stack([_mean(x[..., j], among) for j in range(p.shape[-1])]) for x in (chosen, p))
    return p.shape[-1] * (share * mass).sum()


def _mean(x: Tensor, among: Tensor | None) -> Tensor:
    if among is None:
        return x.mean()
    return torch.where(among, x, x.new_zeros(())).sum() / among.sum().clamp_min(1)
