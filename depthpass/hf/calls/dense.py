"""Dense masks: read back as what they were made from, or refused.

Multimodal models make the masks of their text decoder themselves, one for each kind of layer, because tokens of an image may
see each other; collators that pack sequences may hand in a block-diagonal one. A program makes its own from the rows' real
tokens and the starts of sequences, so the given ones have to say nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from depthpass.errors import InputError

_FULL = "full_attention"


def validity_of(masks: Mapping[str, Any] | Tensor, config: Any, batch: int, new: int, state: Any) -> Tensor | None:
    """The real tokens ``[batch, past + new]`` that masks by kind of layer were made from; None = all.

    Args:
        masks: by kind of layer, ``[batch or 1, 1, new, past + new]``: booleans (seen), or numbers to add (0 = seen). None =
            causal without padding, as transformers leaves it to the attention function. Or one that holds for every layer.
        config: of the decoder.
        state: of the cache, which knows the real tokens of the past: windows show but the last ones. None = no past.

    Raises:
        InputError: a mask is not causal, a window or chunks over the row's real tokens.
    """
    past = 0 if state is None else state.tokens
    seen = {kind: _seen(kind, m, past, new) for kind, m in _for_kinds(masks, config).items()}
    by_kind = {kind: m.expand(batch, -1, -1) for kind, m in seen.items() if m is not None}
    if not by_kind:
        return None
    columns = torch.arange(past + new, device=next(iter(by_kind.values())).device)
    queries = columns[past:, None]
    # The last query sees every real token that its kind of layer lets it see: of all, in a layer without window.
    shown = [by_kind[_FULL][:, -1]] if _FULL in by_kind else [m.any(1) for m in by_kind.values()]
    valid = torch.ones_like(shown[0]) if seen.get(_FULL, shown) is None else torch.stack(shown).any(0)
    if state is not None and _FULL not in seen:
        valid[:, :past] = True if state.known is None else state.known
    for kind, mask in by_kind.items():
        # Padding sees nothing of its own, or everything (a softmax over nothing is no number).
        odd = mask[:, :, past:].diagonal(dim1=1, dim2=2) & ~valid[:, past:] & ~mask.all(-1)
        wanted = (columns <= queries) & _near(kind, config, queries, columns)
        differs = (mask != (wanted & valid[:, None])) & valid[:, past:, None]
        if bool(differs.any()) or bool(odd.any()):
            raise InputError(
                f"attention_mask: the mask that was made for {kind} layers is not causal over the row's real tokens (tokens of "
                "an image that see each other, prefixes); a token that sees later ones has no place in a token "
                "loop. Give text alone, or leave token_type_ids (mm_token_type_ids) out to let images be read causally."
            )
    return valid


def sequences_of(mask: Any, config: Any, batch: int, new: int) -> tuple[Tensor, Tensor] | None:
    """The real tokens and the numbers of the sequences, from 1, that causal masks over sequences were made from.

    Args:
        mask: by kind of layer, or one that holds for every layer, as stock models take it.
        config: of the decoder.

    Returns:
        Both ``[batch, new]``; None = the masks are something else.

    Raises:
        InputError: a mask by kind of layer of another shape, or with values that are neither "seen" nor "not seen".
    """
    if isinstance(mask, Tensor) and (mask.shape[1:] != (1, new, new) or len(mask) not in (1, batch) or not _is_choice(mask)):
        return None
    seen = {kind: _seen(kind, m, 0, new) for kind, m in _for_kinds(mask, config).items()}
    if not seen or any(m is None for m in seen.values()):
        return None
    expanded: dict[str, Tensor] = {kind: m.expand(batch, -1, -1) for kind, m in seen.items() if m is not None}
    widest = torch.stack([*expanded.values()]).any(0)
    real = widest.diagonal(dim1=1, dim2=2)
    columns = torch.arange(new, device=real.device).expand_as(real)
    last = torch.nn.functional.pad(torch.where(real, columns, -1).cummax(1).values, (1, -1), value=-1)
    goes_on = (last >= 0) & widest.gather(2, last.clamp_min(0)[..., None])[..., 0]
    number = (real & ~goes_on).cumsum(1)
    place = real.cumsum(1) - 1
    place = place - torch.where(real & ~goes_on, place, 0).cummax(1).values
    inside = (number[:, :, None] == number[:, None]) & real[:, None] & (columns[:, None] <= columns[:, :, None])
    for kind, m in expanded.items():
        wanted = inside & _near(kind, config, place[:, :, None], place[:, None])
        if bool(((m != wanted) & real[:, :, None]).any()):
            return None
    return real, number


def _for_kinds(mask: Any, config: Any) -> Mapping[str, Any]:
    """Masks by kind of layer; one has to hold for all of them."""
    if isinstance(mask, Mapping):
        return mask
    return dict.fromkeys(set(getattr(config, "layer_types", None) or ()) or {
        "sliding_attention" if getattr(config, "sliding_window", None) else
        "chunked_attention" if getattr(config, "attention_chunk_size", None) else _FULL}, mask)


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
    if mask.dtype == torch.bool:
        return mask[:, 0]
    if not _is_choice(mask):
        raise InputError(f"attention_mask: expected a mask of booleans, or of 0 and the least number of its dtype, got values of "
                         f"{mask.dtype} in between. Biases on scores are not supported.")
    return mask[:, 0] == 0


def _is_choice(mask: Tensor) -> bool:
    """Whether a mask says "seen" or "not seen" and nothing else; half the least number of half precision hides a token."""
    return mask.dtype == torch.bool or (mask.is_floating_point() and not bool(((mask != 0) & (mask > -3e4)).any()))


def _near(kind: str, config: Any, queries: Tensor, columns: Tensor) -> Tensor:
    """Which keys a kind of layer lets a query see, whatever their order."""
    if kind == _FULL:
        return torch.ones_like(queries + columns, dtype=torch.bool)
    if kind == "sliding_attention" and getattr(config, "sliding_window", None):
        return queries - columns < config.sliding_window
    if kind == "chunked_attention" and getattr(config, "attention_chunk_size", None):
        return queries // config.attention_chunk_size == columns // config.attention_chunk_size
    raise InputError(f"attention_mask: expected masks of full, sliding or chunked attention, got one for {kind!r} layers.")
