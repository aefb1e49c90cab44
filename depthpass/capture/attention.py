"""Capture-time attention, mask and expert functions: one opaque op per site, so that the captured graph is clean.

transformers dispatches attention through ``AttentionInterface``, masks through ``AttentionMaskInterface`` and
mixture-of-experts layers through ``ExpertsInterface``. For the time of a capture a model is switched to the functions
registered here. None of the ops ever runs: the outliner replaces each by a call on the running visit.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from depthpass.errors import UnsupportedModelError

NAME = "depthpass"
"""Name under which the functions are registered with transformers."""

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
    "position_ids", "use_cache", "cache_position", "past_key_values", "past_key_value", "position_embeddings",
    "layer_idx", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sliding_window",
    "num_items_in_batch", "attention_instance", "attn_implementation", "return_shared_kv_states",
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
        raise UnsupportedModelError(f"{name}: expected a mask made by transformers' mask interface, got none.")
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
        raise UnsupportedModelError("the model builds a mask without looking at attention_mask.")
    window, chunk = recognise_mask(mask_function, local_size)
    return torch.ops.depthpass.mask(attention_mask, window or -1, chunk or -1)


def capture_experts(module, hidden_states, top_k_index, top_k_weights, *args, **kwargs):
    """Experts function used during capture: the stock implementation runs at run time, on the routed block."""
    if args or kwargs:
        raise UnsupportedModelError(f"{type(module).__name__}: passes experts arguments depthpass does not know.")
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
    # Chunked predicates close over a traced per-row padding count: probe them with no padding instead.
    predicate = _with_concrete_cells(mask_function)
    size = local_size or 8
    edges = sorted({0, 1, 2, 3, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1, 3 * size + 2})
    with unset_fake_temporarily(), torch.utils._python_dispatch._disable_current_modes():
        keys = torch.arange(3 * size + 5)[None, :]
        queries = torch.tensor([e for e in edges if e >= 0])[:, None]
        zero = torch.zeros((), dtype=torch.long)
        try:
            seen = predicate(zero, zero, queries, keys)
            seen = seen.expand(len(queries), keys.shape[1])
        except Exception as error:
            raise UnsupportedModelError(
                f"the mask predicate {_name(mask_function)} cannot be probed on indices ({error}); "
                "packed sequences and data-dependent masks are not supported."
            ) from error
        causal = keys <= queries
        candidates: list[tuple[int | None, int | None, torch.Tensor]] = [(None, None, causal)]
        if local_size is not None:
            candidates.append((local_size, None, causal & (queries - keys < local_size)))
            candidates.append((None, local_size, causal & (queries // local_size == keys // local_size)))
        for window, chunk, want in candidates:
            if torch.equal(seen.bool(), want):
                return window, chunk
    raise UnsupportedModelError(
        f"the mask predicate {_name(mask_function)} is neither causal, nor a sliding window, nor chunked "
        f"(local size {local_size}); prefix, bidirectional, blockwise and custom masks are not supported."
    )


def _name(fn: Callable) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def _with_concrete_cells(fn: Callable) -> Callable:
    """Rebuild a closure with every traced tensor it holds replaced by one zero per row."""
    if not isinstance(fn, types.FunctionType) or fn.__closure__ is None:
        return fn

    def concrete(value):
        if isinstance(value, torch.Tensor):
            if value.dim() != 1 or value.dtype.is_floating_point:
                raise UnsupportedModelError(
                    f"the mask predicate {_name(fn)} depends on a tensor of shape {tuple(value.shape)} "
                    "(packed sequences, image blocks, ...), which is not supported."
                )
            with unset_fake_temporarily(), torch.utils._python_dispatch._disable_current_modes():
                return torch.zeros(1, dtype=torch.long)
        if isinstance(value, tuple | list):
            return type(value)(concrete(v) for v in value)
        return _with_concrete_cells(value) if callable(value) else value

    cells = tuple(types.CellType(concrete(c.cell_contents)) for c in fn.__closure__)
    rebuilt = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells)
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


def signature_names(fn: Callable) -> tuple[str, ...]:
    """Names of a forward's own parameters, ``**kwargs`` left out."""
    return tuple(
        p.name for p in inspect.signature(fn).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
    )
