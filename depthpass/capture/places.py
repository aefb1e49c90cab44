"""Places in time, height and width of models that turn their keys by all three (Qwen's vision models).

Their ``position_ids`` are ``[3, batch, tokens]``, or ``[4, ..]`` with the positions that count tokens in front. Calls and
captures hold them as ``[batch, tokens, 3]``, rows and tokens first as everything else.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor

from depthpass.errors import InputError

_AXES = 3


def is_places(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] in (_AXES, _AXES + 1)


def counted_positions(places: Tensor) -> Tensor | None:
    """The positions that count tokens, ``[batch, tokens]``, where they stand in front of places."""
    return places[0] if places.shape[0] > _AXES else None


def places_of(value: object, config: Any, batch: int, new: int) -> Tensor | None:
    """Places among ``position_ids``, ``[batch, new, 3]``; None = one position per token.

    Raises:
        InputError: places of other shapes, or for a model that knows none.
    """
    if not isinstance(value, Tensor) or value.dim() != 3:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "mrope_section" not in rope or not is_places(value) or value.shape[1] not in (1, batch) or value.shape[2] != new:
        raise InputError(f"position_ids: expected shape {(batch, new)} (new tokens only), got {tuple(value.shape)}.")
    return value[-_AXES:].expand(-1, batch, -1).permute(1, 2, 0).contiguous()


def as_given(position_ids: Tensor) -> Tensor:
    """``position_ids`` of a call as the stock model takes them."""
    return position_ids.permute(2, 0, 1) if position_ids.dim() == 3 else position_ids
