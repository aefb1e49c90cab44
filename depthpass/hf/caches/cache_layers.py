"""A DepthCache as tools of transformers read caches: one layer per KV slot."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._C._nn import _parse_to

from depthpass.errors import CacheError
from depthpass.prompt import in_notebooks

if TYPE_CHECKING:
    from depthpass.hf.caches.cache import DepthCache


def _side(name: str) -> Any:
    """One side of a slot as an attribute that may be assigned."""
    return property(lambda self: self._one(name), lambda self, value: self._assign(name, value))


@in_notebooks
class SlotLayer:
    """The keys and values that one visit has kept: a view, so that what is assigned to it stands in the cache.

    Attributes:
        keys, values: ``[batch, kv_heads, kept columns, dim]``; None before the first token. A slot with a window keeps the
            last columns only, a routed one the columns that were routed to it.
    """

    is_sliding = is_compileable = False
    supports_early_init = False

    def __init__(self, cache: DepthCache, number: int):
        self._cache, self.number = cache, number

    def __repr__(self) -> str:
        return f"SlotLayer(slot={self.number}, keys={None if self.keys is None else tuple(self.keys.shape)})"

    @property
    def _slot(self):
        return self._cache.state.slots.get(self.number)

    def _one(self, name: str) -> Tensor | None:
        slot = self._slot
        if slot is None:
            return None
        tensors = getattr(slot, name)
        if len(tensors) != 1:
            raise CacheError(f"layers[{self.number}].{name}: this block has {len(tensors)} attention calls; read "
                             f"cache.state.slots[{self.number}].{name}, one tensor for each.")
        return tensors[0]

    def _assign(self, name: str, value: Tensor) -> None:
        old = self._one(name)
        if old is None or not isinstance(value, Tensor) or value.shape != old.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CacheError(f"layers[{self.number}].{name}: expected a tensor of shape "
                             f"{None if old is None else tuple(old.shape)}, got {got}.")
        state = self._cache.state
        slots = dict(state.slots)
        # Mapped, so that it forgets the room that its tensors were cut from.
        slots[self.number] = replace(slots[self.number].map(lambda t: t), **{name: (value,)})
        self._cache.state = replace(state, slots=slots)

    keys, values = _side("keys"), _side("values")

    @property
    def is_initialized(self) -> bool:
        return self._slot is not None

    @property
    def is_croppable(self) -> bool:
        slot = self._slot
        return slot is None or (slot.columns is None and not slot.first)

    dtype = property(lambda self: getattr(self.keys, "dtype", None), doc="Of keys and values; None before the first token.")
    device = property(lambda self: getattr(self.keys, "device", None), doc="Where they are; None before the first token.")

    @property
    def max_batch_size(self) -> int:
        return self._cache.batch_size

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length() if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length)

    def _refuse(self, *args: Any, **kwargs: Any):
        raise CacheError("a slot of a DepthCache is changed with the whole cache, whose delay lines belong to it: use the "
                         "method of that name of the cache.")

    update = reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse


def moved(cache: DepthCache, *args: Any, **kwargs: Any):
    """The state of a cache on another device or in another dtype, as ``Tensor.to`` takes them; masks keep their dtype."""
    device, dtype, non_blocking, _ = _parse_to(*args, **kwargs)

    def move(t: Tensor) -> Tensor:
        return t.to(device, dtype if t.is_floating_point() else None, non_blocking)

    return cache.state.map(move)
