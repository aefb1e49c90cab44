"""Check what only the outer class of a transformed model looks at, before its decoder is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthpass.errors import InputError
from depthpass.hf.caches.cache import NAMES, DepthCache, take_cache
from depthpass.hf.calls.ahead import refuse_shifted_loss
from depthpass.hf.calls.columns import packing_of, told_positions, validity
from depthpass.hf.calls.inputs import EMBEDS, IGNORED, prompt_of, refuse_flags, refuse_unknown
from depthpass.hf.calls.packing import WORDS
from depthpass.hf.calls.pads import FOR_LOSSES, IGNORED_LABEL

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel


def check_outer(model: DepthModel, names: tuple[str, ...], arguments: dict[str, Any]) -> None:
    """Check what only the outer class looks at, before its decoder is called.

    Args:
        names: parameters of the stock forward.
        arguments: what the caller gave, by name.

    Raises:
        InputError: an argument cannot be honoured; the message names it.
    """
    given = {k: v for k, v in arguments.items() if v is not None}
    prompt_of(model, given.pop("prompt_length", None))
    refuse_flags(given, model.config)
    take_cache(given)
    known = {*names, *FOR_LOSSES, *NAMES, *IGNORED, *WORDS}
    refuse_unknown(model, {n: v for n, v in given.items() if n not in known}, known)
    tokens = next((given[n] for n in EMBEDS if isinstance(given.get(n), Tensor)), None)
    if tokens is None or tokens.dim() < 2:
        return  # the decoder says what is wrong
    keep = _logits_to_keep(names, given, tokens.shape[1])
    if "labels" in given and "logits_to_keep" in names:  # a language model: one label per token
        refuse_shifted_loss(model.depth_program)
        if keep is not None:
            raise InputError("logits_to_keep: cannot be combined with labels, the loss needs every logit.")
        if (shape := tuple(given["labels"].shape)) != tuple(tokens.shape[:2]):
            raise InputError(f"labels: expected shape {tuple(tokens.shape[:2])}, got {shape}. The model shifts them by itself.")


def without_crossing(model: DepthModel, names: tuple[str, ...], arguments: dict[str, Any]) -> Tensor | None:
    """Labels of packed rows for a loss that shifts them: none at the start of a sequence, which no token predicts.

    Args:
        names: parameters of the stock forward.
        arguments: what the caller gave, by name; checked by :func:`check_outer`.

    Returns:
        ``[batch, tokens]``, or None where the labels stand as they are.
    """
    labels = arguments.get("labels")
    tokens = next((arguments[n] for n in EMBEDS if isinstance(arguments.get(n), Tensor)), None)
    if not isinstance(labels, Tensor) or tokens is None or "logits_to_keep" not in names:
        return None
    given = {n: v for n, v in arguments.items() if v is not None}
    batch, new = tokens.shape[:2]
    mask, cache = given.get("attention_mask"), take_cache(dict(given))[1]
    if not isinstance(cache, DepthCache | None):
        return None  # the decoder says what is wrong
    past = cache.state.tokens if cache is not None else 0
    valid = validity(mask, batch, past, new, tokens.device, cache) if isinstance(mask, Tensor) and mask.dim() == 2 else None
    told = told_positions(given, model.get_submodule(model._depth.decoder), batch, new, tokens.device)
    packing = packing_of(given, told, valid, past, (batch, new), tokens.device)
    return None if packing is None else labels.masked_fill(packing.starts.to(labels.device), IGNORED_LABEL)


def as_index(keep: Any) -> slice | Tensor | None:
    """A ``logits_to_keep`` that has been checked as an index of the token axis; None = all tokens."""
    if isinstance(keep, Tensor):
        return keep
    return slice(-keep, None) if keep else None


def _logits_to_keep(names: tuple[str, ...], given: dict[str, Any], new: int) -> slice | Tensor | None:
    value = given.get("logits_to_keep", 0)
    if isinstance(value, int) and value == 0:
        return None
    if "logits_to_keep" not in names:
        raise InputError("logits_to_keep: the stock model does not have this argument.")
    if isinstance(value, int):
        if value < 0:
            raise InputError(f"logits_to_keep: expected at least 0, got {value}.")
        return as_index(value)
    if not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point():
        got = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise InputError(f"logits_to_keep: expected an integer or a tensor of token indices [kept], got {got}.")
    if value.dtype != torch.bool and value.numel() and not -new <= (far := int(value[value.abs().argmax()])) < new:
        raise InputError(f"logits_to_keep: expected token indices in 0..{new - 1}, got {far}.")
    return value
