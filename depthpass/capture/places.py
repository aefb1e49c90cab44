"""Places in time, height and width of models that turn their keys by all of them (Qwen's vision models).

Their ``position_ids`` are ``[axes, batch, tokens]``, or one more in front that counts tokens, or one for all axes (text behind
cached images). Calls and captures hold them as ``[batch, tokens, axes]``, rows and tokens first as everything else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from depthpass.errors import InputError


def place_axes(decoder: Any) -> int:
    """How many places every token of a decoder has: one for each part of its keys; 0 = it has one position alone.

    Configs may leave the parts to the rotary module's own default.
    """
    config = decoder.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = getattr(getattr(decoder, "rotary_emb", None), "mrope_section", None) or rope.get("mrope_section") or ()
    return len(next(iter(parts.values())) if isinstance(parts, dict) else parts)


def counted_positions(position_ids: object, decoder: Any) -> object:
    """The positions that count tokens, ``[batch, tokens]``, where they stand in front of places; None where they do not."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 3 or not (axes := place_axes(decoder)):
        return position_ids
    return {1: None, axes: None, axes + 1: position_ids[0]}.get(position_ids.shape[0], position_ids)


def places_of(value: object, decoder: Any, batch: int, new: int) -> Tensor | None:
    """Places among ``position_ids``, ``[batch, new, axes]``; None = one position per token.

    Raises:
        InputError: places of other shapes, or for a model that knows none.
    """
    if not isinstance(value, Tensor) or value.dim() != 3:
        return None
    axes = place_axes(decoder)
    if not axes or value.shape[0] not in (1, axes, axes + 1) or value.shape[1] not in (1, batch) or value.shape[2] != new:
        raise InputError(f"position_ids: expected shape {(batch, new)} (new tokens only), got {tuple(value.shape)}.")
    return value[-axes:].expand(axes, batch, -1).permute(1, 2, 0).contiguous()


def as_given(position_ids: Tensor) -> Tensor:
    """``position_ids`` of a call as the stock model takes them."""
    return position_ids.permute(2, 0, 1) if position_ids.dim() == 3 else position_ids
