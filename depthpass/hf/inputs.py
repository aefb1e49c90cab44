"""Check and normalise the arguments of a call before any compute: each is honoured or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from depthpass.errors import CacheError, DepthpassError, InputError, did_you_mean
from depthpass.hf.ahead import cached, refuse_shifted_loss
from depthpass.hf.cache import NAMES, DepthCache, take_cache
from depthpass.hf.dense import made_of_packed_rows, validity_of
from depthpass.hf.packing import WORDS, Packing, Rows, check_batched, find_packing
from depthpass.hf.pads import IGNORED_LABEL, pad_op
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
    known = {*names, "num_items_in_batch", *NAMES, *_IGNORED, *WORDS}
    _refuse_unknown(model, {n: v for n, v in given.items() if n not in known}, known)
    tokens = next((given[n] for n in _EMBEDS if isinstance(given.get(n), Tensor)), None)
    if tokens is None or tokens.dim() < 2:
        return  # the decoder says what is wrong
    keep = _logits_to_keep(names, given, tokens.shape[1])
    if "labels" in given and "logits_to_keep" in names:  # a language model: one label per token
        refuse_shifted_loss(model.depth_program)
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
        # Outer classes that know no such keywords do not hand them on.
        given = {n: frame.arguments[n] for n in WORDS if frame.arguments.get(n) is not None} | given
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
    told = _told_positions(given, batch, new, device)
    mask = given.get("attention_mask")
    if isinstance(mask, Mapping):
        # Masks of packed rows are made where there is no 2-D mask.
        rows = None if past or told is None else find_packing({}, told, None, False, (batch, new), device)
        packed = rows is not None and made_of_packed_rows(mask, config, rows.starts)
        mask = given["attention_mask"] = None if packed else validity_of(mask, config, batch, past, new)
    valid = _validity(mask, batch, past, new, device, cache)
    packing = _packing(given, told, valid, past, (batch, new), device)
    positions = _positions(model, config, told, packing, valid, batch, past, new, device)
    tensors: dict[str, Tensor] = {source[0]: tokens, "position_ids": positions}
    tensors["attention_mask"] = (
        torch.ones(batch, new, dtype=torch.bool, device=device) if valid is None else valid[:, past:]
    )
    # What stock outer classes hand on to their decoder for the loss and for blocks says nothing here.
    known = {*names, "num_items_in_batch", *NAMES, *_IGNORED, *WORDS}
    for name, value in given.items():
        if name in _IGNORED or name in tensors or name in WORDS or name == "num_items_in_batch":
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
    if packing is not None:
        _refuse_cache(cache, cache_name, use_cache)
        use_cache = False
    if model.depth_program.ahead is not None:
        use_cache = cached(model.depth_program, cache, cache_name, use_cache, valid, past)
    if use_cache is None:
        use_cache = cache is not None or (bool(getattr(config, "use_cache", False)) and not model.training)
    return_dict = given.get("return_dict", getattr(config, "return_dict", True))
    states = bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
    prompt = _prompt(model, prompt)
    if packing is not None and prompt is not None and len(prompt) not in (1, len(packing.first)):
        raise InputError(f"prompt_length: expected one number, or one for each of the {len(packing.first)} sequences in the "
                         f"packed rows, got {len(prompt)}.")
    return Call(
        tensors, valid, past, cache, cache_name, bool(use_cache), bool(return_dict), states, labels, prompt, packing,
        given.get("input_ids"),
    )


def _refuse_cache(cache: DepthCache | None, name: str, use_cache: object) -> None:
    if cache is not None or use_cache:
        raise InputError(
            f"{name if cache is not None else 'use_cache'}: the rows of this call are packed (position_ids restart inside a row, "
            "or cu_seq_lens or seq_idx say so), and a cache holds one sequence per row. Pass use_cache=False, or one sequence "
            "in each row."
        )


def without_crossing(model: nn.Module, names: tuple[str, ...], arguments: dict[str, object]) -> Tensor | None:
    """Labels of packed rows for a loss that shifts them: none at the start of a sequence, which no token predicts.

    Args:
        names: parameters of the stock forward.
        arguments: what the caller gave, by name; checked by :func:`check_outer`.

    Returns:
        ``[batch, tokens]``, or None where the labels stand as they are.
    """
    labels = arguments.get("labels")
    tokens = next((arguments[n] for n in _EMBEDS if isinstance(arguments.get(n), Tensor)), None)
    if not isinstance(labels, Tensor) or tokens is None or "logits_to_keep" not in names:
        return None
    given = {n: v for n, v in arguments.items() if v is not None}
    batch, new = tokens.shape[:2]
    _, cache = take_cache(dict(given))
    mask = given.get("attention_mask")
    past = cache.state.tokens if isinstance(cache, DepthCache) else 0
    valid = _validity(mask, batch, past, new, tokens.device, cache) if isinstance(mask, Tensor) and mask.dim() == 2 else None
    packing = _packing(given, _told_positions(given, batch, new, tokens.device), valid, past, (batch, new), tokens.device)
    return None if packing is None else labels.masked_fill(packing.starts.to(labels.device), IGNORED_LABEL)


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


def _told_positions(given: Mapping[str, object], batch: int, new: int, device: torch.device) -> Tensor | None:
    """``position_ids`` as given, for every row."""
    value = given.get("position_ids")
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise InputError(f"position_ids: expected a tensor {(batch, new)}, got {type(value).__name__}.")
    if value.dim() == 1:
        value = value[None]
    if value.dim() != 2 or value.shape[1] != new or value.shape[0] not in (1, batch):
        raise InputError(f"position_ids: expected shape {(batch, new)} (new tokens only), got {tuple(value.shape)}.")
    return value.to(device).expand(batch, -1)


def _packing(
    given: Mapping[str, object], positions: Tensor | None, valid: Tensor | None, past: int, shape: tuple[int, int],
    device: torch.device,
) -> Packing | None:
    """Where sequences start inside the rows of a call."""
    gaps = given.get("attention_mask") is not None or past > 0
    if positions is not None and torch._C._functorch.is_batchedtensor(positions):
        check_batched(positions, gaps)
        positions = None
    real = None if valid is None else valid[:, past:]
    if real is not None and (real.is_meta or torch._C._functorch.is_batchedtensor(real)):
        return None
    return find_packing({n: given[n] for n in WORDS if n in given}, positions, real, gaps, shape, device)


def _positions(
    model, config, told: Tensor | None, packing: Packing | None, valid, batch: int, past: int, new: int, device: torch.device
) -> Tensor:
    if told is not None:
        _check_table(model, None, told)
        return told.contiguous()
    if packing is not None:
        _check_table(model, None, packing.positions)
        return packing.positions
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
