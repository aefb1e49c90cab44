"""Check and normalise the arguments of a call before any compute: each is honoured or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from depthpass.capture.places import places_of
from depthpass.errors import CacheError, InputError, did_you_mean
from depthpass.hf.caches.cache import NAMES, DepthCache, adopted, take_cache
from depthpass.hf.calls.ahead import cached
from depthpass.hf.calls.columns import packing_of, positions_of, told_positions, validity
from depthpass.hf.calls.dense import made_of_packed_rows, sequences_of, validity_of
from depthpass.hf.calls.packing import WORDS, Packing, Rows, find_packing
from depthpass.hf.calls.pads import FOR_LOSSES, IGNORED_LABEL, pad_op

if TYPE_CHECKING:
    from depthpass.hf.calls.doors import DepthDecoder, Frame
    from depthpass.hf.model import DepthModel

IGNORED = {
    "output_hidden_states", "return_dict", "use_cache", "cache_position", "logits_to_keep", "attention_mask", "position_ids",
    "tokenizer", "assistant_tokenizer",  # generate hands on what its stop strings were made with
}
_REFUSED_FLAGS = ("output_attentions", "output_router_logits")
EMBEDS = ("input_ids", "inputs_embeds")
_BETWEEN = (" Images of this model are added to the stream between blocks, too: its text runs, and images run on models that "
            "read them as embeddings alone, such as Qwen2.5-VL.")
_TENSORS = ("token_type_ids", "mm_token_type_ids", "per_layer_inputs")


@dataclass(frozen=True)
class Call:
    """A normalised call.

    Attributes:
        tensors: tensor inputs of the captured model, new tokens only.
        valid: validity of all columns, old and new, ``[batch, past + new]``; None = no padding anywhere.
        past: columns seen before this call.
        cache_name: the argument that the cache was given as.
        hidden_states: whether the stream after every visit is handed out.
        labels: of the outer call; None = none.
        prompt: real tokens of each row's prompt (of each segment's in packed rows), ``[batch]`` or ``[1]``; None = not told.
            Only programs with pads ask.
        packing: where the sequences of packed rows lie; None = every row is one sequence.
        ids: the new tokens, where they were given as such.
    """

    tensors: dict[str, Tensor]
    valid: Tensor | None
    past: int
    cache: DepthCache | None
    cache_name: str
    use_cache: bool
    return_dict: bool
    hidden_states: bool = False
    labels: Tensor | None = None
    prompt: Tensor | None = None
    packing: Packing | None = None
    ids: Tensor | None = None

    def of(self, rows: Rows) -> Call:
        """Segments of a packed call as a call in which each is a row."""
        tensors = {n: rows.take(t, 0 if n == "attention_mask" else None) for n, t in self.tensors.items()}
        labels, prompt = self.labels, self.prompt
        if labels is not None and labels.shape == self.tensors["attention_mask"].shape:
            labels = rows.take(labels, IGNORED_LABEL)
        if prompt is not None and len(prompt) > 1:
            prompt = prompt[rows.segments]
        ids = None if self.ids is None else rows.take(self.ids, None)
        return replace(self, tensors=tensors, valid=rows.valid, labels=labels, prompt=prompt, packing=None, ids=ids)


def _dense(mask: object) -> bool:
    return isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.dim() == 4 and not mask.is_meta)


def refuse_flags(given: dict[str, Any], config) -> None:
    for flag in _REFUSED_FLAGS:
        if given.pop(flag, getattr(config, flag, False)):
            raise InputError(f"{flag}: not available on a transformed model; only the hidden stream leaves a block. Set it to "
                             "False (in TRL's trainers of experts router_aux_loss_coef=0.0).")


def refuse_unknown(model: nn.Module, given: dict[str, Any], known: Collection[str]) -> None:
    for name, value in given.items():
        if value is not False:
            raise InputError(f"{name}: a transformed {type(model).__name__} does not know this argument."
                             f"{did_you_mean(name, known)}")


def normalise(
    model: DepthModel, decoder: DepthModel | DepthDecoder, names: tuple[str, ...], arguments: Mapping[str, Any],
    frame: Frame | None,
) -> Call:
    """Turn the arguments of the decoder's ``forward`` into a :class:`Call`.

    Args:
        model: the transformed model.
        decoder: its decoder, whose forward is called.
        names: parameters of the decoder's stock forward.
        arguments: what the caller gave, by name.
        frame: of the outer call that it is a part of, or None.

    Raises:
        InputError, CacheError: an argument cannot be honoured; the message names it.
    """
    given = {k: v for k, v in arguments.items() if v is not None}
    prompt, config = given.pop("prompt_length", None), decoder.config
    labels = None
    if frame is not None:
        prompt, labels = frame.arguments.get("prompt_length"), frame.arguments.get("labels")
        given.pop("labels", None)  # some hand them on to a decoder that takes none
        # Outer classes that know no such keywords do not hand them on.
        given = {n: frame.arguments[n] for n in WORDS if frame.arguments.get(n) is not None} | given
    refuse_flags(given, config)
    source, tokens = _tokens(given)
    batch, new, device = tokens.shape[0], tokens.shape[1], tokens.device
    cache_name, cache = _cache(model, given, frame, batch)
    past = cache.state.tokens if cache is not None else 0
    told = told_positions(given, decoder, batch, new, device)
    _flatten_masks(given, told, config, cache, (batch, new))
    valid = validity(given.get("attention_mask"), batch, past, new, device, cache)
    packing = packing_of(given, told, valid, past, (batch, new), device)
    if (positions := places_of(given.get("position_ids"), decoder, batch, new)) is None:
        positions = positions_of(model, config, told, packing, valid, batch, past, new, device)
    tensors = {source: tokens} | ({"position_ids": positions.to(device)} if "position_ids" in names else {})
    tensors["attention_mask"] = (torch.ones(batch, new, dtype=torch.bool, device=device) if valid is None else valid[:, past:])
    tensors |= _others(decoder, names, given)
    use_cache = given.get("use_cache")
    if packing is not None:
        _refuse_cache(cache, cache_name, use_cache)
        use_cache = False
    if model.depth_program.ahead is not None:
        use_cache = cached(model.depth_program, cache, cache_name, use_cache, valid, past)
    if use_cache is None:
        use_cache = cache is not None or (bool(getattr(config, "use_cache", False)) and not model.training)
    return_dict = given.get("return_dict", getattr(config, "return_dict", True))
    states = bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
    length = prompt_of(model, prompt)
    _check_lengths(length, packing)
    return Call(
        tensors, valid, past, cache, cache_name, bool(use_cache), bool(return_dict), states, labels, length, packing,
        given.get("input_ids"),
    )


def _flatten_masks(
    given: dict[str, Any], told: Tensor | None, config: Any, cache: DepthCache | None, shape: tuple[int, int]
) -> None:
    """Put a 2-D mask, and the sequences of packed rows, in place of dense masks."""
    mask, past = given.get("attention_mask"), cache.state.tokens if cache is not None else 0
    if _dense(mask) and not past and (flat := sequences_of(mask, config, *shape)) is not None:
        given["attention_mask"], numbers = flat
        if bool((numbers.amax(1) > 1).any()):
            given.setdefault("seq_idx", numbers)
    elif mask is not None and (isinstance(mask, Mapping) or (past and _dense(mask))):
        # Masks of packed rows are made where there is no 2-D mask.
        rows = None if past or told is None else find_packing({}, told, None, False, shape, told.device)
        packed = rows is not None and made_of_packed_rows(mask, config, rows.starts)
        given["attention_mask"] = None if packed else validity_of(mask, config, *shape, None if cache is None else cache.state)


def _check_lengths(length: Tensor | None, packing: Packing | None) -> None:
    """Prompts of packed rows: one length for all sequences, or one for each."""
    if packing is not None and length is not None and len(length) not in (1, len(packing.first)):
        raise InputError(f"prompt_length: expected one number, or one for each of the {len(packing.first)} sequences in the "
                         f"packed rows, got {len(length)}.")


def _tokens(given: Mapping[str, Any]) -> tuple[str, Tensor]:
    """The one argument that holds the tokens, ids ``[batch, tokens]`` or embeddings ``[batch, tokens, width]``."""
    sources = [n for n in EMBEDS if n in given]
    if len(sources) != 1:
        raise InputError(f"expected exactly one of input_ids and inputs_embeds, got {sources or 'neither'}.")
    source = sources[0]
    tokens, want = given[source], 2 if source == "input_ids" else 3
    if not isinstance(tokens, Tensor):
        raise InputError(f"{source}: expected a tensor, got {type(tokens).__name__}. Tokenize with return_tensors='pt'.")
    if tokens.is_floating_point() != (want == 3):
        raise InputError(f"{source}: expected {'integers' if want == 2 else 'floats'}, got {tokens.dtype}.")
    if tokens.dim() != want or tokens.shape[0] == 0 or tokens.shape[1] == 0:
        raise InputError(
            f"{source}: expected a non-empty tensor of {want} dimensions [batch, tokens{', width' * (want - 2)}], "
            f"got shape {tuple(tokens.shape)}."
        )
    return source, tokens


def _cache(model: DepthModel, given: dict[str, Any], frame: Frame | None, batch: int) -> tuple[str, DepthCache | None]:
    """The name under which a cache was given, and the cache; ``given`` loses it."""
    name, cache = take_cache(given)
    if frame is not None and frame.cache_name is not None:
        name = frame.cache_name
    if cache is None:
        return name, None
    if _is_made_inside(model, cache, frame):
        cache = adopted(cache, model)
    if not isinstance(cache, DepthCache):
        raise CacheError(
            f"{name}: expected a DepthCache made for this model, got {type(cache).__name__}. One has a slot per visit and delay "
            "lines; use dp.DepthCache(model), or let generate() make it. Prompts as keys (PEFT prefix tuning) are not supported."
        )
    cache.check_owner(model, name)
    if cache.state.length and cache.batch_size not in (-1, batch):
        raise CacheError(f"{name}: holds {cache.batch_size} rows, the call has {batch}.")
    return name, cache


def _is_made_inside(model: DepthModel, cache: object, frame: Frame | None) -> bool:
    """Whether a cache is an empty one that a stock class around the decoder has made, which nobody told it to."""
    if type(cache) is not DynamicCache or cache.get_seq_length():
        return False
    return "." in model._depth.decoder if frame is None else take_cache(dict(frame.arguments))[1] is None


def _others(decoder: nn.Module, names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Further tensors that the captured model takes; whatever else was given is known and says nothing, or is refused."""
    # What stock outer classes hand on to their decoder for the loss and for blocks says nothing here.
    known = {*names, *FOR_LOSSES, *NAMES, *IGNORED, *WORDS}
    tensors: dict[str, Tensor] = {}
    for name, value in given.items():
        if name in IGNORED or name in EMBEDS or name in WORDS or name in FOR_LOSSES:
            continue
        if name not in known:
            refuse_unknown(decoder, {name: value}, known)
        elif name in _TENSORS and isinstance(value, Tensor):
            tensors[name] = value
        elif value is not False:
            images = _BETWEEN if {"deepstack", "vision", "visual"} & {*name.split("_")} else ""
            raise InputError(f"{name}: not supported: {type(decoder).__name__} reads it beside the stream, in its loop over the "
                             f"blocks, which a program replaces.{images} Leave it out, or call dp.restore(model).")
    return tensors


def _refuse_cache(cache: DepthCache | None, name: str, use_cache: object) -> None:
    if cache is not None or use_cache:
        raise InputError(
            f"{name if cache is not None else 'use_cache'}: the rows of this call are packed (position_ids restart inside a row, "
            "or cu_seq_lens or seq_idx say so), and a cache holds one sequence per row. Pass use_cache=False, or one sequence "
            "in each row."
        )


def prompt_of(model: DepthModel, value: Any) -> Tensor | None:
    """Lengths of the rows' prompts, ``[batch]`` or ``[1]``, on a model that asks for them."""
    if value is None:
        return None
    if pad_op(model.depth_program) is None:
        raise InputError("prompt_length: only a model with workspace pads (dp.Pad) asks where the prompt ends. Leave it out.")
    length = torch.as_tensor(value, device=model.device)
    if length.is_floating_point() or length.dtype == torch.bool or length.dim() > 1:
        raise InputError(f"prompt_length: expected an integer or one per row [batch], got {value!r}.")
    return length.view(-1)


def warn_frozen(model: DepthModel) -> None:
    """Warn when training with every new parameter frozen, as PEFT leaves them."""
    if not model.training or not torch.is_grad_enabled():
        return
    parameters = list(model.depth.parameters())
    frozen = parameters and not any(p.requires_grad for p in parameters)
    if frozen and any(p.requires_grad for p in model.parameters()):
        warnings.warn(
            "the new parameters of this transformed model are frozen (PEFT freezes everything it did not add). To "
            "train them with the adapter, pass modules_to_save=['depth'] in the PEFT config, or set "
            "requires_grad_(True) on model.depth and save it, too: no adapter's file holds it.", UserWarning, stacklevel=3,
        )
