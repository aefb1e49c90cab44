"""Which masked positions a denoising step writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from depthpass.errors import InputError

Planner = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(logits, ids, masked, step)`` -> scores ``[batch, tokens]``, of which the highest masked ones are written; or a choice of
positions, bools ``[batch, tokens]``, that are written as they are, those that were written before included."""


def scores(order: str, logits: Tensor, chosen: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scores ``[batch, tokens]`` of an order by name; the highest come first.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        chosen: the tokens that would be written.
    """
    if order == "random":
        return torch.rand(chosen.shape, generator=generator, device=chosen.device)
    if order == "left":
        return -torch.arange(chosen.shape[1], device=chosen.device).float().expand(chosen.shape)
    p = logits.softmax(-1)
    if order == "confidence":
        return p.gather(-1, chosen[..., None])[..., 0]
    if order == "margin":
        best = p.topk(2, -1).values
        return best[..., 0] - best[..., 1]
    return torch.special.xlogy(p, p).sum(-1)  # entropy: least first


def highest(score: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[row]`` highest scores of each row among some positions, ties to the left: bools ``[batch, tokens]``."""
    ranked = score.masked_fill(~among, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(score.shape[1], device=score.device).expand_as(ranked))
    return among & (rank < counts[:, None])


def planned(planner: Planner, logits: Tensor, ids: Tensor, masked: Tensor, step: int) -> Tensor:
    """What a planner says, checked.

    Raises:
        InputError: another shape, or numbers that are none.
    """
    found = planner(logits, ids, masked, step)
    if not isinstance(found, Tensor) or found.shape != ids.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"denoise: planner: expected scores or choices of shape {tuple(ids.shape)}, got {got}.")
    if found.is_floating_point() and bool(found.isnan().any()):
        raise InputError("denoise: planner: expected scores, got NaN.")
    return found
