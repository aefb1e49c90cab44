"""``DepthCache``: the state of a transformed model behind transformers' ``Cache`` interface."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin

from depthpass.capture.attention import signature_names
from depthpass.errors import CacheError, InputError
from depthpass.hf.caches.cache_layers import SlotLayer, moved
from depthpass.hf.caches.residual import ResidualSlots, check_bits, packed_state
from depthpass.hf.modules.context import inner_model
from depthpass.prompt import in_notebooks

if TYPE_CHECKING:
    from depthpass_lowering.state import State

    from depthpass.ir.program import Program

NAMES = ("past_key_values", "cache")
"""Names of the cache argument: transformers 5.24 renamed the first to the second. A transformed model takes both."""

STOCK_NAME = next(n for n in NAMES if n in signature_names(vars(GenerationMixin)["prepare_inputs_for_generation"]))
"""The name that the installed transformers uses: of its stock models and of what ``generate`` hands to a model."""


def take_cache(arguments: dict[str, Any]) -> tuple[str, Any]:
    """Take the cache out of a call's arguments: the name it was given under, and the cache or None.

    Raises:
        InputError: two caches were given.
    """
    caches = {n: c for n in NAMES if (c := arguments.pop(n, None)) is not None}
    if len({id(c) for c in caches.values()}) > 1:
        raise InputError(f"{' and '.join(caches)}: expected one cache, got two (prompts as keys are not supported). Pass one.")
    return next(iter(caches.items()), (NAMES[0], None))


@in_notebooks
class DepthCache(Cache):
    """KV slots and delay lines of one batch of rows, for one transformed model.

    ``generate`` makes one by itself; make one by hand to score or decode step by step::

        cache = dp.DepthCache(model)
        out = model(input_ids=prompt, past_key_values=cache, use_cache=True)
        out = model(input_ids=next_token, past_key_values=cache, use_cache=True)

    Args:
        model: the transformed model the cache is for. Another model, or the same model after ``restore``, refuses it.
        record: keep whole delay lines instead of the last tokens only, so that :meth:`crop` works.
        residual_bits: keep the keys and values of later visits of a block as so many bits (4 or 2) per number of their
            difference from the first visit's. That is an approximation, and what is decoded depends on how tokens are split
            into calls (a call sees its own keys whole); :attr:`residual_error` says how large. None = whole.
    """

    residual_bits: int | None = None

    def __init__(self, model, record: bool = False, residual_bits: int | None = None):
        super().__init__(layers=[])
        from depthpass_lowering.state import State

        # Inside a PEFT wrapper it is still the transformed model that runs, and asks whose cache this is; so it is for its
        # decoder.
        model = inner_model(model)
        model = getattr(model, "depth_model", model)
        if not hasattr(model, "depth_program"):
            raise CacheError(
                f"DepthCache: expected a transformed model, got {type(model).__name__}. Call dp.transform(model, spec) "
                "first."
            )
        self._owner: weakref.ref | None = weakref.ref(model)
        self.state: State = State(record=record)
        self.program: Program | None = None
        check_bits(residual_bits)
        self.residual_bits, self._errors = residual_bits, {}

    @property
    def residual_error(self) -> dict[int, float]:
        """Root mean square of what packing lost, over that of the keys and values, by slot; so far."""
        sums = {number: seen.tolist() for number, seen in sorted(self._errors.items())}
        return {number: (lost / whole) ** 0.5 if whole else 0.0 for number, (lost, whole) in sums.items()}

    def opened(self, program: Program) -> State:
        """The state for a call of ``program``.

        Raises:
            InputError: ``residual_bits`` was given, and the program visits no block twice.
        """
        state = self.state
        if torch.is_grad_enabled():
            # A line of a prompt that was read in inference mode cannot be saved for the backward pass; its copy can.
            state = replace(state, lines={n: t.clone() if t.is_inference() else t for n, t in state.lines.items()})
        return state if self.residual_bits is None else packed_state(state, program, self.residual_bits, self._errors)

    def __repr__(self) -> str:
        kv, lines = self.state.nbytes()
        return (
            f"DepthCache(tokens={self.state.tokens}, slots={len(self.state.slots)}, "
            f"delay_lines={len(self.state.lines)}, kv_bytes={kv}, delay_line_bytes={lines})"
        )

    def check_owner(self, model, name: str) -> None:
        """Raise CacheError unless the cache was made for ``model``; ``name`` is the argument it was given as.

        A cache that was loaded from a file belongs to the first model that takes it (which :meth:`check_program` checks).
        """
        if self._owner is None:
            self._owner = weakref.ref(model)
        if self._owner() is not model:
            raise CacheError(
                f"{name}: this DepthCache belongs to another model. Make one with dp.DepthCache(model), "
                "or let generate() make it."
            )

    def check_program(self, now: Program, name: str) -> None:
        """Raise CacheError unless the program that runs now has filled the cache."""
        filled = self.program
        if self.state.length and filled is not None and filled is not now and filled != now:
            raise CacheError(
                f"{name}: this DepthCache holds {self.state.length} tokens of another program of this model "
                f"({len(filled.visits)} visits, {len(filled.slots)} slots; now {len(now.visits)} visits, "
                f"{len(now.slots)} slots): the model was switched after it was filled, or its loop count is drawn or follows "
                "the row's tokens. Switch back, fix the count with dp.using, or make a new cache with dp.DepthCache(model) "
                "and run the prompt again."
            )

    def keep(self, program: Program, state: State) -> None:
        """Take the state that a call of ``program`` has left."""
        if isinstance(state.slots, ResidualSlots):
            state.slots.settle()
        self.program, self.state = program, state

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def layers(self) -> list[SlotLayer]:
        """One view per slot, in the order of the slots: ``cache.layers[i].keys``."""
        return [SlotLayer(self, number) for number in sorted(self.state.slots)]

    @layers.setter
    def layers(self, value: list) -> None:
        if value:
            raise CacheError("layers: a DepthCache is filled by its model, not by hand.")

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Keys and values of every slot."""
        return iter([(layer.keys, layer.values) for layer in self.layers])

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        layer = self.layers[index]
        return layer.keys, layer.values

    def to(self, *args, **kwargs) -> DepthCache:
        """Move keys, values and delay lines to a device or dtype, as ``Tensor.to`` does; returns the cache."""
        self.state = moved(self, *args, **kwargs)
        return self

    def __copy__(self) -> DepthCache:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict) -> DepthCache:
        copied = self.__copy__()
        memo[id(self)] = copied
        copied.state = copy.deepcopy(self.state, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # A file holds the state and what filled it: not the model, nor the room that slots grow into.
        return {**self.__dict__, "_owner": None, "state": self.state.map(torch.clone)}

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.state.tokens + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.state.tokens

    def __len__(self) -> int:
        return len(self.state.slots)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state.length > 0

    @property
    def is_sliding(self) -> list[bool]:
        # Never empty: for an empty cache, generate would take all of it to be linear attention, which counts no tokens.
        return [False] * max(len(self.state.slots), 1)

    is_linear = is_dummy = is_sliding

    @property
    def is_croppable(self) -> bool:
        return all(s.columns is None and not s.first for s in self.state.slots.values())

    @property
    def batch_size(self) -> int:
        slots = self.state.slots
        return next(iter(slots.values())).keys[0].shape[0] if slots else -1

    max_batch_size = batch_size

    def update(self, *args, **kwargs):
        raise CacheError(
            "DepthCache is written by the transformed model itself, one slot per visit; a stock attention layer cannot "
            "use it."
        )

    def offload(self, *args, **kwargs):
        raise CacheError(
            "a DepthCache stays whole, its delay lines beside its keys and values: move it with cache.to(device), or keep later "
            "visits' keys in few bits with dp.DepthCache(model, residual_bits=4)."
        )

    prefetch = offload

    def reset(self) -> None:
        """Forget everything."""
        self.state = type(self.state)(record=self.state.record)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row ``beam_idx[i]`` (beam search)."""
        self.state = self.state.map(lambda t: t.index_select(0, beam_idx.to(t.device)))
        self._reopen()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times in place."""
        self.state = self.state.map(lambda t: t.repeat_interleave(repeats, 0))
        self._reopen()

    def activate_past_recording(self) -> None:
        """Keep whole delay lines from now on, so that later tokens can be taken back."""
        if not self.state.record:
            self.state = replace(self.state, record=True, since=self.state.length)

    def crop(self, max_length: int) -> None:
        """Drop the newest tokens: ``-max_length`` of them when negative, all after the first ``max_length`` when positive.

        Zero drops nothing, as in transformers; :meth:`reset` drops everything.

        Raises:
            CacheError: the delay lines no longer hold the tokens before the new end.
        """
        have = self.state.tokens
        new = have + max_length if max_length <= 0 else max_length
        if new >= have:
            return
        if new < 0:
            raise CacheError(f"crop: cannot drop {-max_length} of {have} tokens.")
        from depthpass_lowering.state import crop

        self.state = crop(self.state, new + self.state.length - have)
        self._reopen()

    def _reopen(self) -> None:
        """Bind residuals to their slots again after every tensor was replaced."""
        if self.residual_bits is not None and self.program is not None and self.state.slots:
            self.state = self.opened(self.program)


def adopted(cache: Any, model: Any) -> DepthCache:
    """An empty cache of transformers as one of a transformed model: the same object, whoever holds it."""
    cache.__class__ = DepthCache
    cache.__dict__.clear()
    cache.__init__(model)
    return cache
