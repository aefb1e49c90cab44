"""Masks that a stock outer class has made for its decoder: read back as what they were made from, or refused.

Multimodal models make the masks of their text decoder themselves, one for each kind of layer, because tokens of an image may
see each other. A program makes its own from the rows' real tokens, so the given ones have to say nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import InputError

_FULL = "full_attention"


def validity_of(masks: Mapping[str, Any], config: Any, batch: int, past: int, new: int) -> Tensor | None:
    """The real tokens ``[batch, past + new]`` that masks by kind of layer were made from; None = all.

    Args:
        masks: by kind of layer, ``[batch or 1, 1, new, past + new]``: booleans (seen), or numbers to add (0 = seen). None =
            causal without padding, as transformers leaves it to the attention function.
        config: of the decoder.

    Raises:
        InputError: a mask is not causal, a window or chunks over the row's real tokens.
    """
    seen = {kind: _seen(kind, m, past, new) for kind, m in masks.items()}
    given = {kind: m for kind, m in seen.items() if m is not None}
    if not given:
        return None
    columns = torch.arange(past + new, device=next(iter(given.values())).device)
    queries = columns[past:, None]
    # The last query sees every real token that its kind of layer lets it see: of all, in a layer without window.
    if _FULL in seen:
        full = seen[_FULL]
        valid = None if full is None else full[:, -1].expand(batch, -1)
    else:
        valid = torch.stack([m.any(1).expand(batch, -1) for m in given.values()]).any(0)
    if valid is None:
        valid = torch.ones(batch, past + new, dtype=torch.bool, device=columns.device)
    for kind, mask in given.items():
        wanted = (columns <= queries) & _near(kind, config, queries, columns)
        differs = (mask != (wanted & valid[:, None])) & valid[:, past:, None]
        if bool(differs.any()):
            raise InputError(
                f"attention_mask: the mask that was made for {kind} layers is not causal over the row's real tokens (tokens of "
                "an image that see each other, prefixes); a token that sees later ones has no place in a token "
                "loop. Give text alone, or leave token_type_ids (mm_token_type_ids) out to let images be read causally."
            )
    return valid


def made_of_packed_rows(masks: Mapping[str, Any], config: Any, starts: Tensor) -> bool:
    """Whether every mask is causal, a window or chunks inside the sequences of packed rows, and nothing else.

    Args:
        masks, config: as for :func:`validity_of`.
        starts: first token of every sequence, ``[batch, new]``.
    """
    new = starts.shape[1]
    columns = torch.arange(new, device=starts.device).expand_as(starts)
    place, number = columns - torch.where(starts, columns, 0).cummax(1).values, starts.cumsum(1)
    inside = (number[:, :, None] == number[:, None]) & (columns[:, None] <= columns[:, :, None])
    for kind, mask in masks.items():
        seen = _seen(kind, mask, 0, new)
        if seen is None or bool((seen != (inside & _near(kind, config, place[:, :, None], place[:, None]))).any()):
            return False
    return True


def _seen(kind: str, mask: Any, past: int, new: int) -> Tensor | None:
    if mask is None:
        return None
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.dim() != 4 or shape[1:] != (1, new, past + new):
        raise InputError(f"attention_mask: expected a mask [batch, 1, {new}, {past + new}] for {kind} layers, got {shape}. "
                         "Use attn_implementation='sdpa' or 'eager'.")
    return (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]


def _near(kind: str, config: Any, queries: Tensor, columns: Tensor) -> Tensor:
    """Which keys a kind of layer lets a query see, whatever their order."""
    if kind == _FULL:
        return torch.ones_like(queries + columns, dtype=torch.bool)
    if kind == "sliding_attention" and getattr(config, "sliding_window", None):
        return queries - columns < config.sliding_window
    if kind == "chunked_attention" and getattr(config, "attention_chunk_size", None):
        return queries // config.attention_chunk_size == columns // config.attention_chunk_size
    raise InputError(f"attention_mask: expected masks of full, sliding or chunked attention, got one for {kind!r} layers.")
