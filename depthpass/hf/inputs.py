"""Check and normalise the arguments of a call before any compute: each is honoured or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from depthpass.errors import CacheError, DepthpassError, InputError, did_you_mean
from depthpass.hf.cache import NAMES, DepthCache, take_cache
from depthpass.hf.dense import validity_of
from depthpass.hf.pads import pad_op
from depthpass.hf.table import table_size

if TYPE_CHECKING:
    from depthpass.hf.doors import Frame

_IGNORED = {
    "output_hidden_states", "return_dict", "use_cache", "cache_position", "logits_to_keep", "attention_mask", "position_ids",
}
_REFUSED_FLAGS = ("output_attentions", "output_router_logits")
_EMBEDS = ("input_ids", "inputs_embeds")
_TENSORS = ("token_type_ids", "mm_token_type_ids")


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
        prompt: real tokens of each row's prompt, ``[batch]`` or ``[1]``; None = not told. Only programs with pads ask.
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


def check_outer(model: nn.Module, names: tuple[str, ...], arguments: dict[str, object]) -> None:
    """Check what only the outer class looks at, before its decoder is called.

    Args:
        names: parameters of the stock forward.
        arguments: what the caller gave, by name.

    Raises:
        InputError: an argument cannot be honoured; the message names it.
    """
    given = {k: v for k, v in arguments.items() if v is not None}
    _prompt(model, given.pop("prompt_length", None))
    _refuse_flags(given, model.config)
    take_cache(given)
    known = {*names, "num_items_in_batch", *NAMES, *_IGNORED}
    _refuse_unknown(model, {n: v for n, v in given.items() if n not in known}, known)
    tokens = next((given[n] for n in _EMBEDS if isinstance(given.get(n), Tensor)), None)
    if tokens is None or tokens.dim() < 2:
        return  # the decoder says what is wrong
    keep = _logits_to_keep(names, given, tokens.shape[1])
    if "labels" in given and "logits_to_keep" in names:  # a language model: one label per token
        if keep is not None:
            raise InputError("logits_to_keep: cannot be combined with labels, the loss needs every logit.")
        if (shape := tuple(given["labels"].shape)) != tuple(tokens.shape[:2]):
            raise InputError(f"labels: expected shape {tuple(tokens.shape[:2])}, got {shape}. The model shifts them by itself.")


def _refuse_flags(given: dict[str, object], config) -> None:
    for flag in _REFUSED_FLAGS:
        if given.pop(flag, getattr(config, flag, False)):
            raise InputError(f"{flag}: not available on a transformed model; only the hidden stream leaves a block.")


def _refuse_unknown(model: nn.Module, given: dict[str, object], known: Collection[str]) -> None:
    for name, value in given.items():
        if value is not False:
            raise InputError(f"{name}: a transformed {type(model).__name__} does not know this argument."
                             f"{did_you_mean(name, known)}")


def normalise(
    model: nn.Module, decoder: nn.Module, names: tuple[str, ...], arguments: dict[str, object], frame: Frame | None
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
    _refuse_flags(given, config)
    source = [n for n in _EMBEDS if n in given]
    if len(source) != 1:
        raise InputError(f"expected exactly one of input_ids and inputs_embeds, got {source or 'neither'}.")
    tokens = given[source[0]]
    want = 2 if source[0] == "input_ids" else 3
    if not isinstance(tokens, Tensor):
        raise InputError(f"{source[0]}: expected a tensor, got {type(tokens).__name__}. Tokenize with return_tensors='pt'.")
    if tokens.is_floating_point() != (want == 3):
        raise InputError(f"{source[0]}: expected {'integers' if want == 2 else 'floats'}, got {tokens.dtype}.")
    if tokens.dim() != want or tokens.shape[0] == 0 or tokens.shape[1] == 0:
        raise InputError(
            f"{source[0]}: expected a non-empty tensor of {want} dimensions [batch, tokens{', width' * (want - 2)}], "
            f"got shape {tuple(tokens.shape)}."
        )
    batch, new, device = tokens.shape[0], tokens.shape[1], tokens.device
    cache_name, cache = take_cache(given)
    if frame is not None and frame.cache_name is not None:
        cache_name = frame.cache_name
    if cache is not None:
        if not isinstance(cache, DepthCache):
            raise CacheError(
                f"{cache_name}: expected a DepthCache made for this model, got {type(cache).__name__}. A transformed "
                "model keeps one slot per visit and delay lines; use dp.DepthCache(model), or let generate() make it."
            )
        cache.check_owner(model, cache_name)
        if cache.state.length and cache.batch_size not in (-1, batch):
            raise CacheError(f"{cache_name}: holds {cache.batch_size} rows, the call has {batch}.")
    past = cache.state.tokens if cache is not None else 0
    mask = given.get("attention_mask")
    if isinstance(mask, Mapping):
        mask = given["attention_mask"] = validity_of(mask, config, batch, past, new)
    valid = _validity(mask, batch, past, new, device, cache)
    positions = _positions(model, config, given, valid, batch, past, new, device)
    tensors: dict[str, Tensor] = {source[0]: tokens, "position_ids": positions}
    tensors["attention_mask"] = (
        torch.ones(batch, new, dtype=torch.bool, device=device) if valid is None else valid[:, past:]
    )
    # What stock outer classes hand on to their decoder for the loss and for blocks says nothing here.
    known = {*names, "num_items_in_batch", *NAMES, *_IGNORED}
    for name, value in given.items():
        if name in _IGNORED or name in tensors or name == "num_items_in_batch":
            continue
        if name not in known:
            _refuse_unknown(decoder, {name: value}, known)
        elif name in _TENSORS and isinstance(value, Tensor):
            tensors[name] = value
        elif value is not False:
            raise InputError(f"{name}: not supported on a transformed model.")
    if "position_ids" not in names:
        tensors.pop("position_ids")
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = cache is not None or (bool(getattr(config, "use_cache", False)) and not model.training)
    return_dict = given.get("return_dict", getattr(config, "return_dict", True))
    states = bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
    return Call(
        tensors, valid, past, cache, cache_name, bool(use_cache), bool(return_dict), states, labels, _prompt(model, prompt)
    )


def _prompt(model, value: object) -> Tensor | None:
    if value is None:
        return None
    if pad_op(model.depth_program) is None:
        raise InputError("prompt_length: only a model with workspace pads (dp.Pad) asks where the prompt ends. Leave it out.")
    length = torch.as_tensor(value, device=model.device)
    if length.is_floating_point() or length.dtype == torch.bool or length.dim() > 1:
        raise InputError(f"prompt_length: expected an integer or one per row [batch], got {value!r}.")
    return length.view(-1)


def as_index(keep: object) -> slice | Tensor | None:
    """A ``logits_to_keep`` that has been checked as an index of the token axis; None = all tokens."""
    if isinstance(keep, Tensor):
        return keep
    return slice(-keep, None) if keep else None


def _logits_to_keep(names: tuple[str, ...], given: dict[str, object], new: int) -> slice | Tensor | None:
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


def _validity(
    mask: object, batch: int, past: int, new: int, device: torch.device, cache: DepthCache | None
) -> Tensor | None:
    """Validity of all columns, or None when nothing is padding."""
    before = cache.state.known if cache is not None else None
    if mask is None:
        if before is None:
            return None
        return torch.cat((before, torch.ones(batch, new, dtype=torch.bool, device=device)), 1)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask: expected a 2-D mask [batch, tokens] of 0 and 1, got {shape}. Dense and block masks are "
            "not supported: depthpass makes masks from positions, validity and window."
        )
    if tuple(mask.shape) != (batch, past + new):
        raise InputError(f"attention_mask: expected shape {(batch, past + new)} (cached and new tokens), "
                         f"got {tuple(mask.shape)}.")
    valid = mask.to(device=device, dtype=torch.bool)
    if past:
        old = valid[:, :past]
        if not (bool(old.all()) if before is None else torch.equal(old, before)):
            raise InputError("attention_mask: its part about cached tokens differs from the mask they were cached with.")
    if valid.is_meta or torch._C._functorch.is_batchedtensor(valid):  # nothing can be asked: as if something were padding
        return valid
    if bool(valid.all()):
        return None
    if cache is None:  # with a cache, the row's real tokens may still come
        check_rows(valid)
    return valid


@contextmanager
def shapes_only(tokens: Tensor) -> Iterator[None]:
    """Say why a program cannot run on the meta device: it asks for a value.

    Raises:
        InputError: instead of torch's error about it.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not tokens.is_meta or isinstance(error, DepthpassError):
            raise
        raise InputError(
            "the model is on the meta device, which has shapes and no values, and this program asks for values (which tokens "
            "a route takes, how far to iterate). Use a real device; dp.report and dp.explain need no weights."
        ) from error


def check_rows(valid: Tensor) -> None:
    """Raise InputError when a row of a validity mask has no real token."""
    if empty := (~valid.bool().any(-1)).nonzero().flatten().tolist():
        raise InputError(f"attention_mask: row {empty[0]} is padding only; every row needs at least one real token.")


def _positions(model, config, given, valid, batch: int, past: int, new: int, device: torch.device) -> Tensor:
    value = given.get("position_ids")
    if value is None:
        if config.model_type == "opt" and valid is not None:
            # OPT counts real tokens (its own embedding does so from the mask); all others count columns.
            positions = (valid.long().cumsum(-1) * valid - 1)[:, past:]
            _check_table(model, None, positions)
            return positions
        # A model with a table of positions depends on them itself, and numbers columns as the stock model does.
        if valid is not None and model.depth_program.reads_positions and model._depth.position_table is None:
            return (valid.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
        _check_table(model, past + new - 1, None)
        return torch.arange(past, past + new, device=device)[None].expand(batch, -1).contiguous()
    if value.dim() == 1:
        value = value[None]
    if value.dim() != 2 or value.shape[1] != new or value.shape[0] not in (1, batch):
        raise InputError(f"position_ids: expected shape {(batch, new)} (new tokens only), got {tuple(value.shape)}.")
    if given.get("attention_mask") is None and past == 0 and new > 1 and bool((value.diff(dim=-1) != 1).any()):
        raise InputError(
            "position_ids: restart inside a row (packed sequences) without an attention_mask; packed rows are not "
            "supported. Put one sequence in each row."
        )
    _check_table(model, None, value)
    return value.to(device).expand(batch, -1).contiguous()


def _check_table(model, last: int | None, positions: Tensor | None) -> None:
    size = table_size(model)
    if size is None or (positions is not None and (positions.is_meta or torch._C._functorch.is_batchedtensor(positions))):
        return
    last = int(positions.max()) if positions is not None else last
    if last >= size:
        raise InputError(f"the sequence reaches position {last}, but the model's position table has {size} entries.")


def warn_frozen(model: nn.Module) -> None:
    """Warn when training with every new parameter frozen, as PEFT leaves them."""
    if not model.training or not torch.is_grad_enabled():
        return
    parameters = list(model.depth.parameters())
    frozen = parameters and not any(p.requires_grad for p in parameters)
    if frozen and any(p.requires_grad for p in model.parameters()):
        warnings.warn(
            "the new parameters of this transformed model are frozen (PEFT freezes everything it did not add). To "
            "train them with the adapter, pass modules_to_save=['depth'] in the PEFT config, or set "
            "requires_grad_(True) on model.depth.", UserWarning, stacklevel=3,
        )
