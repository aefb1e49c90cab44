"""The training loss of masked diffusion: the evidence lower bound in continuous time (arXiv 2406.07524, 2502.09992)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from depthpass.annotations import checked
from depthpass.diffusion.inputs import checked_ids, maskable, new_cache, places, predictions, settings
from depthpass.errors import InputError
from depthpass.passes.masked_diffusion import MaskedDiffusion

Schedule = Literal["linear", "cosine"]
SCHEDULES = ("linear", "cosine")


@checked("diffusion_loss")
def diffusion_loss(
    model: Any, input_ids: Tensor, *, attention_mask: Tensor | None = None, labels: Tensor | None = None,
    schedule: Schedule = "linear", time: Tensor | None = None, masked: Tensor | None = None, eps: float = 1e-3,
    generator: torch.Generator | None = None, **arguments: Any,
) -> Tensor:
    """Bound of the negative log-likelihood per token, in nats, from one draw of noise.

    A time t from U(eps, 1) is drawn for every row (for every block of a row with ``block``), spread evenly over the batch;
    each token is masked with the chance m(t), and

        loss = 1/N sum over masked tokens of m'(t) / m(t) * CE(logits, token)

    N = tokens that may be masked. ``linear``: m = t, so the weight is 1/t; ``cosine``: m = 1 - cos(pi t / 2).

    With ``block`` (block diffusion, arXiv 2503.09573) a noised block sees *clean* earlier blocks: keys and values of clean
    blocks are kept, gradients included, and each block runs once noised and once clean.

    Args:
        model: transformed with :class:`depthpass.MaskedDiffusion`.
        input_ids: ``[batch, tokens]``.
        attention_mask: ``[batch, tokens]``; with ``block`` pads have to stand on the right.
        labels: ``[batch, tokens]``: tokens whose label is -100 (prompts) are never masked; None = all real tokens may be.
        schedule: m(t).
        time: t, ``[batch]`` or ``[batch, blocks]``, instead of a draw.
        masked: which tokens are masked, ``[batch, tokens]``, instead of a draw; with ``time``.
        eps: smallest time that is drawn.
        generator: of the draws.
        arguments: more of the model's call.

    Raises:
        SpecError: the model has no masked diffusion. InputError: shapes, values or padding that do not fit; nothing to mask.
    """
    who, diffusion = "diffusion_loss", settings(model, "diffusion_loss")
    valid = checked_ids(input_ids, attention_mask, who)
    if schedule not in SCHEDULES:
        raise InputError(f"{who}: schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    may = maskable(input_ids, valid, labels, diffusion.mask_token, who)
    if diffusion.block is not None and valid is not None and not bool((valid.long().diff(dim=1) <= 0).all()):
        raise InputError(f"{who}: expected pads on the right with block={diffusion.block}, got others: blocks are counted from a "
                         "row's first token and run together. Set tokenizer.padding_side = 'right'.")
    time = _times(input_ids, diffusion, time, eps, generator, who)
    chance, weight = _noise(time, schedule)
    if masked is None:
        masked = torch.rand(input_ids.shape, generator=generator, device=input_ids.device) < chance
    elif masked.shape != input_ids.shape:
        raise InputError(f"{who}: masked: expected shape {tuple(input_ids.shape)}, got {tuple(masked.shape)}.")
    masked = masked.bool() & may
    noised = input_ids.masked_fill(masked, diffusion.mask_token)
    run = _blocks if diffusion.block is not None else _whole
    logits = run(model, diffusion, input_ids, noised, attention_mask if valid is not None else None, arguments)
    picked = predictions(logits, diffusion)[masked]
    each = cross_entropy(picked, input_ids[masked], reduction="none")
    return (each * weight.expand_as(masked)[masked].to(each)).sum() / may.sum()


def _times(ids: Tensor, diffusion: MaskedDiffusion, time: Tensor | None, eps: float, generator, who: str) -> Tensor:
    """t of every token, ``[batch, tokens]``."""
    rows, tokens = ids.shape
    blocks = 1 if diffusion.block is None else -(-tokens // diffusion.block)
    if not 0 < eps < 1:
        raise InputError(f"{who}: eps: expected a number between 0 and 1, got {eps}.")
    if time is None:
        # Evenly spread over the batch: less noise in the loss than independent draws.
        spread = torch.arange(rows * blocks, device=ids.device) / (rows * blocks)
        u = (torch.rand((), generator=generator, device=ids.device) + spread) % 1
        time = (eps + (1 - eps) * u)[torch.randperm(rows * blocks, generator=generator, device=ids.device)].view(rows, blocks)
    elif tuple(time.shape) not in ((rows, blocks), *([(rows,)] if blocks == 1 else [])):
        raise InputError(f"{who}: time: expected shape {(rows, blocks)}, got {tuple(time.shape)}.")
    elif not bool(((time > 0) & (time <= 1)).all()):
        raise InputError(f"{who}: time: expected values in (0, 1], got {time.min().item()} to {time.max().item()}.")
    time = time.view(rows, blocks).to(ids.device)
    return time.repeat_interleave(tokens if diffusion.block is None else diffusion.block, 1)[:, :tokens]


def _noise(time: Tensor, schedule: str) -> tuple[Tensor, Tensor]:
    """Chance m(t) of a mask and weight m'(t) / m(t)."""
    if schedule == "linear":
        return time, 1 / time
    # By half the angle: 1 - cos loses every digit at early times, whose weights are the largest.
    half = math.pi / 4 * time
    return 2 * half.sin().square(), math.pi / 2 / half.tan()


def _whole(model, diffusion, ids: Tensor, noised: Tensor, mask: Tensor | None, arguments: dict) -> Tensor:
    return model(input_ids=noised, attention_mask=mask, **{**places(model, mask), **arguments}).logits


def _blocks(model, diffusion: MaskedDiffusion, ids: Tensor, noised: Tensor, mask: Tensor | None, arguments: dict) -> Tensor:
    """Logits of noised blocks, each behind the clean blocks before it."""
    cache, logits, size = new_cache(model), [], diffusion.block or 0
    for start in range(0, ids.shape[1], size):
        end = min(start + size, ids.shape[1])
        seen = None if mask is None else mask[:, :end]
        same = {"attention_mask": seen, "past_key_values": cache, **arguments}
        logits.append(model(input_ids=noised[:, start:end], use_cache=False, **same).logits)
        if end < ids.shape[1]:
            model(input_ids=ids[:, start:end], use_cache=True, **same)
    return torch.cat(logits, 1)
