"""Capture-time attention, mask and expert functions: one opaque op per site, so that the captured graph is clean.

transformers dispatches attention through ``AttentionInterface``, masks through ``AttentionMaskInterface`` and
mixture-of-experts layers through ``ExpertsInterface``. For the time of a capture a model is switched to the functions
registered here. None of the ops ever runs: the outliner replaces each by a call on the running visit.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from depthpass.errors import UnsupportedModelError, did_you_mean

NAME = "depthpass"
"""Name under which the functions are registered with transformers."""

STYLES = ("sdpa", "eager")
"""Attention implementations of transformers whose numbers depthpass reproduces."""

_LIB = torch.library.Library("depthpass", "DEF")
_LIB.define("attend(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? sinks, float scale, float softcap, "
            "float dropout) -> Tensor")
_LIB.define("mask(Tensor valid, int window, int chunk) -> Tensor")
_LIB.define("experts(Tensor hidden, Tensor index, Tensor weights) -> Tensor")
_LIB.define("enter(Tensor hidden, int block) -> Tensor")
_LIB.define("leave(Tensor hidden, int block) -> Tensor")
_LIB.define("final(Tensor hidden) -> Tensor")


@torch.library.register_fake("depthpass::attend")
def _attend(q, k, v, mask, sinks, scale, softcap, dropout):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.register_fake("depthpass::mask")
def _mask(valid, window, chunk):
    return torch.empty_like(valid, dtype=torch.bool)


@torch.library.register_fake("depthpass::experts")
def _experts(hidden, index, weights):
    return torch.empty_like(hidden)


@torch.library.register_fake("depthpass::enter")
@torch.library.register_fake("depthpass::leave")
def _marker(hidden, block):
    return torch.empty_like(hidden)


@torch.library.register_fake("depthpass::final")
def _final(hidden):
    return torch.empty_like(hidden)


# Arguments that stock layers pass along and that do not change what eager or SDPA attention computes.
_INERT = frozenset({
    "position_ids", "use_cache", "cache_position", "past_key_values", "past_key_value", "cache", "position_embeddings",
    "layer_idx", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sliding_window",
    "num_items_in_batch", "attention_instance", "attn_implementation", "return_shared_kv_states", "logits_to_keep",
})


def capture_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention function used during capture; refuses what the lowering could not honour.

    Raises:
        UnsupportedModelError: the layer passes an argument that is not understood, or attends bidirectionally.
    """
    name = type(module).__name__
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal:
        raise UnsupportedModelError(f"{name}: expected causal attention, got is_causal=False (bidirectional).")
    for flag in ("output_attentions", "output_hidden_states", "output_router_logits"):
        kwargs.pop(flag, None)
    unknown = {k for k, v in kwargs.items() if v is not None and k not in _INERT}
    if unknown:
        raise UnsupportedModelError(
            f"{name}: passes attention arguments depthpass does not know: {', '.join(sorted(unknown))}. "
            "They may change the result, so they are refused rather than dropped."
        )
    if attention_mask is None:
        raise UnsupportedModelError(
            f"{name}: expected a mask made by transformers' mask interface from a 2-D attention_mask [batch, tokens] of the "
            "captured call (all ones where nothing is padding), got none."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.depthpass.attend(
        query, key, value, attention_mask, sinks, scale, float(softcap or 0.0), float(dropout)
    )
    return out, None


def capture_mask(*_, mask_function: Callable, attention_mask=None, local_size: int | None = None, **kwargs):
    """Mask function used during capture: hands the 2-D validity mask through, with its structure in the op."""
    for offset in ("q_offset", "kv_offset"):
        if not isinstance(kwargs.get(offset, 0), int) or kwargs.get(offset, 0) != 0:
            raise UnsupportedModelError(f"masks with a {offset} are not supported: caching is done by depthpass.")
    if attention_mask is None:
        # Decoders of encoder-decoders make one for an encoder that is not there; a layer that reads it is refused.
        return None
    if local_size is not None and local_size < 1:
        # Models make masks of kinds that none of their layers has; a layer that reads this one is refused.
        return torch.ops.depthpass.mask(attention_mask, NOTHING, NOTHING)
    window, chunk = recognise_mask(mask_function, local_size)
    return torch.ops.depthpass.mask(attention_mask, window or -1, chunk or -1)


NOTHING = 0
"""Window and chunk of a mask under which no token sees itself."""


def sees_nothing(size: int) -> str:
    """What is wrong with such a mask."""
    return (f"has a window or chunk of {size} tokens, in which no token sees itself; expected at least 1 (set "
            "config.sliding_window to None for full attention).")


met: set[torch.nn.Module] = set()
"""Experts modules that the capture going on has called; one goes on at a time."""


def capture_experts(module, hidden_states, top_k_index, top_k_weights, *args, **kwargs):
    """Experts function used during capture: the stock implementation runs at run time, on the routed block."""
    if args or kwargs:
        raise UnsupportedModelError(f"{type(module).__name__}: passes experts arguments depthpass does not know.")
    met.add(module)
    return torch.ops.depthpass.experts(hidden_states, top_k_index, top_k_weights)


def recognise_mask(mask_function: Callable, local_size: int | None) -> tuple[int | None, int | None]:
    """Tell a causal, sliding-window or chunked mask predicate by probing it on index grids.

    Args:
        mask_function: transformers' predicate ``(batch, head, query, key) -> bool`` without padding.
        local_size: the window or chunk size transformers announces for it.

    Returns:
        ``(window, chunk)``, each None when it does not apply.

    Raises:
        UnsupportedModelError: the predicate is none of the three (packed, prefix, bidirectional, blockwise, ...).
    """
    name = _name(mask_function)
    if local_size is not None and local_size < 1:
        raise UnsupportedModelError(f"the mask predicate {name} {sees_nothing(local_size)}")
    constants: set[int] = set()
    # Chunked predicates close over the number of pads of each row, a traced tensor: probe them as if there were none.
    predicate = _without_padding(mask_function, constants)
    with unset_fake_temporarily(), _disable_current_modes():
        points = torch.tensor(_probes(constants | {local_size or 8}))
        queries, keys = points[:, None], points[None, :]
        seen = _probe(predicate, queries, keys, name)
        causal = keys <= queries
        candidates: list[tuple[int | None, int | None, torch.Tensor]] = [(None, None, causal)]
        if local_size is not None:
            candidates.append((local_size, None, causal & (queries - keys < local_size)))
            candidates.append((None, local_size, causal & (queries // local_size == keys // local_size)))
        for window, chunk, want in candidates:
            if torch.equal(seen, want.expand_as(seen)):
                return window, chunk
        later = bool((seen & ~causal).any())
    kind = "lets tokens see later tokens (bidirectional, prefix or blockwise)" if later else "hides earlier tokens"
    raise UnsupportedModelError(
        f"the mask predicate {name} {kind}; expected a causal mask, a sliding window or chunks"
        f"{'' if local_size is None else f' of {local_size} tokens'}."
    )


def _probes(sizes: set[int]) -> list[int]:
    """Indices at which masks of these sizes may change, and some far away."""
    points = {0, 1, 2, 3, 5, 7, 11, *(2**i for i in range(4, 21, 2)), *(2**i + 1 for i in range(4, 21, 4))}
    for size in sorted(s for s in sizes if 0 < s <= 2**24)[:8]:
        points |= {size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1, 3 * size + 2}
    return sorted(points)


def _probe(predicate: Any, queries: torch.Tensor, keys: torch.Tensor, name: str) -> torch.Tensor:
    """Values of a predicate for several rows and heads, ``[rows, heads, queries, keys]``."""
    rows, heads = torch.arange(_ROWS)[:, None, None, None], torch.arange(8)[None, :, None, None]
    try:
        seen = predicate(rows, heads, queries, keys)
        return seen.bool().expand(_ROWS, 8, len(queries), keys.shape[1])
    except Exception as error:
        raise UnsupportedModelError(
            f"the mask predicate {name} cannot be evaluated on indices alone ({type(error).__name__}: {error}); masks that "
            "depend on data are not supported."
        ) from error


_ROWS = 3


def _name(fn: Callable) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def _without_padding(fn: object, constants: set[int]) -> object:
    """Rebuild a predicate with no padding in any row, and collect the whole numbers it closes over.

    Raises:
        UnsupportedModelError: it closes over another tensor, or is no plain function.
    """
    from transformers.masking_utils import chunked_overlay

    if isinstance(fn, tuple | list):
        return type(fn)(_without_padding(f, constants) for f in fn)
    if isinstance(fn, int):
        constants.add(int(fn))
        return fn
    if isinstance(fn, torch.Tensor) or (callable(fn) and not isinstance(fn, types.FunctionType)):
        what = f"a tensor of shape {tuple(fn.shape)}" if isinstance(fn, torch.Tensor) else f"a {type(fn).__name__}"
        raise UnsupportedModelError(
            f"the attention mask depends on {what} (packed sequences from position_ids, token types, prefixes, image "
            "blocks, ...), which is not supported. Packed rows are known by position_ids, cu_seq_lens or seq_idx of a call."
        )
    if not isinstance(fn, types.FunctionType) or fn.__closure__ is None:
        return fn
    # Only here is a per-row number known to be the row's padding.
    chunked = fn.__code__ in chunked_overlay.__code__.co_consts
    cells = []
    for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__):
        value = cell.cell_contents
        if chunked and variable == "left_padding":
            with unset_fake_temporarily(), _disable_current_modes():
                cells.append(types.CellType(torch.zeros(_ROWS, dtype=torch.long)))
        else:
            cells.append(types.CellType(_without_padding(value, constants)))
    rebuilt = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, tuple(cells))
    rebuilt.__kwdefaults__ = fn.__kwdefaults__
    return rebuilt


def register() -> None:
    """Register the capture functions with transformers; safe to call again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, capture_attention)
    AttentionMaskInterface.register(NAME, capture_mask)
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        return
    ExpertsInterface.register(NAME, capture_experts)


def attention_style(model: nn.Module) -> str:
    """The stock attention implementation whose numerics are kept: ``sdpa`` or ``eager``.

    Raises:
        UnsupportedModelError: the model was loaded with any other implementation.
    """
    config = getattr(model, "config", None)
    style = getattr(config, "_attn_implementation", None) or "eager"
    if style not in STYLES:
        raise UnsupportedModelError(
            f"{type(model).__name__}: attention implementation {style!r}; expected one of {', '.join(STYLES)}."
            f"{did_you_mean(str(style), STYLES)} Load the model with attn_implementation='sdpa' (or call "
            "model.set_attn_implementation('sdpa')); depthpass runs attention itself."
        )
    return style


@functools.cache
def signature_names(fn: Callable) -> tuple[str, ...]:
    """Names of a forward's own parameters, ``**kwargs`` left out."""
    return tuple(
        p.name for p in inspect.signature(fn).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
    )
