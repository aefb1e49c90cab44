"""The columns of a call: which are real tokens, where they stand, and where sequences start inside packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from depthpass.capture.places import counted_positions
from depthpass.errors import DepthpassError, InputError
from depthpass.hf.caches.cache import DepthCache
from depthpass.hf.calls.packing import WORDS, Packing, check_batched, find_packing
from depthpass.hf.calls.table import table_size

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel


def validity(mask: object, batch: int, past: int, new: int, device: torch.device, cache: DepthCache | None) -> Tensor | None:
    """Validity of all columns, or None when nothing is padding."""
    before = cache.state.known if cache is not None else None
    if mask is None:
        if before is None:
            return None
        return torch.cat((before, torch.ones(batch, new, dtype=torch.bool, device=device)), 1)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask: expected a 2-D mask [batch, tokens] of 0 and 1, got {shape}. Dense and block masks are taken where "
            "they say no more than rows and packed sequences do: causal inside each sequence, with the windows of the model's "
            "layers, of booleans or of 0 and the least number of their dtype."
        )
    if tuple(mask.shape) != (batch, past + new):
        raise InputError(f"attention_mask: expected shape {(batch, past + new)} (cached and new tokens), "
                         f"got {tuple(mask.shape)}.")
    valid = mask.to(device=device, dtype=torch.bool)
    if past:
        old = valid[:, :past]
        if not (bool(old.all()) if before is None else torch.equal(old, before)):
            raise InputError("attention_mask: its part about cached tokens differs from the mask they were cached with.")
    if valid.is_meta or is_batchedtensor(valid):  # nothing can be asked: as if something were padding
        return valid
    if bool(valid.all()):
        return None
    if cache is None:  # with a cache, the row's real tokens may still come
        check_rows(valid)
    return valid


@contextmanager
def shapes_only(tokens: Tensor) -> Iterator[None]:
    """Say why a program cannot run on the meta device or under ``vmap``: it asks for a value; sizes that are symbols are refused.

    Raises:
        InputError: instead of torch's error about it.
    """
    if any(isinstance(n, torch.SymInt) for n in tokens.shape):
        raise InputError("a transformed model runs for sizes that are numbers, and these are symbols. Trace it with make_fx("
                         "tracing_mode='real' or 'fake'), or take dp.restore or dp.materialize of it (docs/huggingface.md).")
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, DepthpassError) or not (tokens.is_meta or str(error).startswith("vmap: It")):
            raise
        raise InputError(
            "the model is on the meta device or under vmap, where nothing has values, and this program asks for some (which "
            "tokens a route takes, how far to iterate). Call it row by row, on a real device; dp.report needs none."
        ) from error


def check_rows(valid: Tensor) -> None:
    """Raise InputError when a row of a validity mask has no real token."""
    if empty := (~valid.bool().any(-1)).nonzero().flatten().tolist():
        raise InputError(f"attention_mask: row {empty[0]} is padding only; every row needs at least one real token.")


def told_positions(given: Mapping[str, object], decoder: Any, batch: int, new: int, device: torch.device) -> Tensor | None:
    """``position_ids`` as given, for every row; None where only places in images are told."""
    value = counted_positions(given.get("position_ids"), decoder)
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise InputError(f"position_ids: expected a tensor {(batch, new)}, got {type(value).__name__}.")
    if value.dim() == 1:
        value = value[None]
    if value.dim() != 2 or value.shape[1] != new or value.shape[0] not in (1, batch):
        raise InputError(f"position_ids: expected shape {(batch, new)} (new tokens only), got {tuple(value.shape)}.")
    return value.to(device).expand(batch, -1)


def packing_of(
    arguments: Mapping[str, object], positions: Tensor | None, valid: Tensor | None, past: int, shape: tuple[int, int],
    device: torch.device,
) -> Packing | None:
    """Where sequences start inside the rows of a call."""
    gaps = arguments.get("attention_mask") is not None or past > 0
    if positions is not None and is_batchedtensor(positions):
        check_batched(positions, gaps)
        positions = None
    real = None if valid is None else valid[:, past:]
    if real is not None and (real.is_meta or is_batchedtensor(real)):
        return None
    return find_packing({n: arguments[n] for n in WORDS if n in arguments}, positions, real, gaps, shape, device)


def positions_of(
    model: DepthModel, config: Any, told: Tensor | None, packing: Packing | None, valid: Tensor | None, batch: int, past: int,
    new: int, device: torch.device,
) -> Tensor:
    """Positions of the new tokens, ``[batch, new]``: as told, or as the stock model numbers them."""
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


def _check_table(model: DepthModel, last: int | None, positions: Tensor | None) -> None:
    size = table_size(model)
    if size is None or (positions is not None and (positions.is_meta or is_batchedtensor(positions))):
        return
    reached = int(positions.max()) if positions is not None else last
    if reached is not None and reached >= size:
        raise InputError(f"the sequence reaches position {reached}, but the model's position table has {size} entries.")
