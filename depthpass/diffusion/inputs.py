"""What losses and samplers ask of a transformed model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import InputError, SpecError
from depthpass.limits import shown
from depthpass.passes.masked_diffusion import MaskedDiffusion


def settings(model: Any, who: str) -> MaskedDiffusion:
    """The masked-diffusion pass of a model's spec.

    Raises:
        SpecError: the model has none.
    """
    inner = _inner(model)
    passes = inner._depth.plan.passes if hasattr(inner, "_depth") else ()
    diffusions = [p for p in passes if isinstance(p, MaskedDiffusion)]
    if len(diffusions) != 1:
        raise SpecError(f"{who}: expected a model transformed with dp.MaskedDiffusion, got {type(inner).__name__} with "
                        f"{'; '.join(p.label for p in passes) or 'no spec'}.")
    return diffusions[0]


def new_cache(model: Any) -> Any:
    """An empty cache of the transformed model."""
    return _inner(model).depth_cache()


def _inner(model: Any) -> Any:
    """The transformed model inside a PEFT wrapper, or the model itself."""
    wrapped = getattr(model, "get_base_model", None)
    return wrapped() if callable(wrapped) else model


def checked_ids(ids: object, attention_mask: object, who: str) -> Tensor | None:
    """The validity mask, as bools, of ids that are a batch of rows; None = no padding.

    Raises:
        InputError: ids or mask of another form, or a row without a real token.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.shape[0]:
        got = f"a tensor {tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else repr(ids)
        raise InputError(f"{who}: input_ids: expected token ids [batch, tokens], got {got}.")
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else repr(attention_mask)
        raise InputError(f"{who}: attention_mask: expected shape {tuple(ids.shape)}, got {got}.")
    valid = attention_mask.bool()
    if not bool(valid.any(-1).all()):
        raise InputError(f"{who}: attention_mask: every row has to have a real token.")
    return None if bool(valid.all()) else valid


def checked_prompts(
    ids: Tensor, attention_mask: Tensor | None, mask_token: int, who: str, new: object, steps: object
) -> Tensor | None:
    """The validity mask of prompts that masks are appended to, as :func:`checked_ids` has it.

    Args:
        new, steps: how many masks and steps.

    Raises:
        InputError: as :func:`checked_ids`; counts below 1, pads that are not on the left, a prompt with a mask in it.
    """
    valid = checked_ids(ids, attention_mask, who)
    for name, value in (("new_tokens", new), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise InputError(f"{who}: {name}: expected an integer of at least 1 and below 2**31, got {shown(value)}.")
    if valid is not None and not bool((valid.long().diff(dim=1) >= 0).all()):
        raise InputError(f"{who}: attention_mask: expected prompts padded on the left, got other pads. Set "
                         "tokenizer.padding_side = 'left'.")
    among = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    if count := int(((ids == mask_token) & among).sum()):
        raise InputError(f"{who}: input_ids: expected prompts without the mask token {mask_token}, got {count} of them, which "
                         "would stay masked: new tokens are appended.")
    return valid


def places(model: Any, valid: Tensor | None) -> dict[str, Tensor]:
    """Positions as an argument of the call of rows with pads, counted from each row's first real token, as ``generate`` counts
    them: with a table of positions a row would else be another one behind pads."""
    if valid is None or "position_ids" not in inspect.signature(_inner(model).forward).parameters:
        return {}
    return {"position_ids": (valid.long().cumsum(-1) - 1).clamp_min(0)}


def maskable(ids: Tensor, valid: Tensor | None, labels: Tensor | None, mask_token: int, who: str) -> Tensor:
    """Which tokens may be masked, ``[batch, tokens]``.

    Raises:
        InputError: none may, labels of another shape, or a text with the mask in it.
    """
    may = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    if labels is not None:
        if labels.shape != ids.shape:
            raise InputError(f"{who}: labels: expected shape {tuple(ids.shape)}, got {tuple(labels.shape)}.")
        may = may & (labels != -100)
    if not bool(may.any()):
        raise InputError(f"{who}: expected a token that may be masked, got labels of -100 alone.")
    if bool(((ids == mask_token) & may).any()):
        raise InputError(f"{who}: input_ids: token {mask_token} is the mask, and no text may have it where it is masked.")
    return may


def check_noise(who: str, ids: Tensor, latent: int, time: Tensor, masked: Tensor | None, noise: Tensor | None) -> None:
    """Refuse draws of coevolution that do not fit the rows.

    Raises:
        InputError: another shape, or times outside of (0, 1).
    """
    shapes = {"time": (time, ids.shape[:1]), "masked": (masked, ids.shape), "noise": (noise, (*ids.shape, latent))}
    for name, (given, shape) in shapes.items():
        if given is not None and tuple(given.shape) != tuple(shape):
            raise InputError(f"{who}: {name}: expected shape {tuple(shape)}, got {tuple(given.shape)}.")
    if not bool(((time > 0) & (time < 1)).all()):
        raise InputError(f"{who}: time: expected values in (0, 1), got {time.min().item()} to {time.max().item()}.")


def predictions(logits: Tensor, given: MaskedDiffusion) -> Tensor:
    """Logits of each position's own token, in float32 or better; the mask itself is never predicted."""
    if given.shift:
        logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if given.mask_token >= precise.shape[-1]:
        raise InputError(f"mask_token: expected a token below the vocabulary of {precise.shape[-1]}, got {given.mask_token}.")
    mask = torch.zeros(precise.shape[-1], dtype=torch.bool, device=precise.device)
    mask[given.mask_token] = True
    return precise.masked_fill(mask, float("-inf"))
