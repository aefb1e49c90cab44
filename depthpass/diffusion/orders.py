"""Which masked positions a denoising step writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from depthpass.annotations import checked
from depthpass.diffusion.noise import SAMPLERS
from depthpass.errors import InputError, did_you_mean
from depthpass.passes.masked_diffusion import ORDERS

Planner = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(logits, ids, masked, step)`` -> scores ``[batch, tokens]``, of which the highest masked ones are written; or a choice of
positions, bools ``[batch, tokens]``, that are written as they are, those that were written before included."""


def check_draws(who: str, order: str, temperature: float, known: Sequence[str], name: str = "order") -> None:
    """Refuse an order that is not known, and temperatures that tokens cannot be drawn at.

    Raises:
        InputError: naming the option.
    """
    if order not in known:
        raise InputError(f"{who}: {name}: expected one of {', '.join(known)}, got {order!r}.{did_you_mean(str(order), known)}")
    if not 0 <= temperature < math.inf:
        raise InputError(f"{who}: temperature: expected a number of at least 0, got {temperature}.")


@checked("sample")
def check_step(
    sampler: str = "ode", order: str = "ancestral", guidance: float = 1.0, temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Refuse what a step of coevolution cannot do, before one runs.

    Raises:
        InputError: naming the option.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}."
                         f"{did_you_mean(str(sampler), SAMPLERS)}")
    check_draws("sample", order, temperature, [o for o in ORDERS if o != "planner"])
    if not math.isfinite(guidance):
        raise InputError(f"sample: guidance: expected a number, got {guidance}.")


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
    plan = planner(logits, ids, masked, step)
    if not isinstance(plan, Tensor) or plan.shape != ids.shape:
        got = tuple(plan.shape) if isinstance(plan, Tensor) else type(plan).__name__
        raise InputError(f"denoise: planner: expected scores or choices of shape {tuple(ids.shape)}, got {got}.")
    if plan.is_floating_point() and bool(plan.isnan().any()):
        raise InputError("denoise: planner: expected scores, got NaN.")
    return plan
