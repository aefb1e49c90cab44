"""Parts of a model's program, run by themselves on states of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthpass.hf.caches.cache import NAMES, DepthCache
from depthpass.hf.calls.doors import call_names
from depthpass.hf.calls.head import apply_head, logits_of
from depthpass.hf.calls.host import StockHost, depth_module
from depthpass.hf.calls.inputs import normalise, warn_frozen
from depthpass.hf.calls.running import embedded
from depthpass.hf.decoding.drafts import Part
from depthpass.hf.modules.placement import gather_new

if TYPE_CHECKING:
    from depthpass_lowering.state import State


class Runner:
    """Advances states of parts of a model's program."""

    def __init__(self, model: Any):
        self.model = model
        self.decoder = model.get_submodule(model._depth.decoder)
        self.names = call_names(type(self.decoder)._stock_class)
        self.captured: Any = None
        warn_frozen(model)
        gather_new(depth_module(model))

    def advance(self, part: Part, ids: Tensor, mask: Tensor | None, state: State, entry: Tensor | None = None):
        """Streams by name and the state behind some tokens.

        Args:
            ids: the new tokens, ``[batch, n]``.
            mask: real tokens, of this call's and earlier columns at least; None = all.
            entry: the stream that takes the embedding's place.
        """
        from depthpass_lowering.executors.eager import run

        model, end = self.model, state.length + ids.shape[1]
        cache = DepthCache(model, record=True)
        cache.state = state
        given: dict[str, Any] = {"input_ids": ids, "use_cache": True, NAMES[0]: cache}
        if mask is not None:
            given["attention_mask"] = mask[:, :end]
            if "position_ids" in self.names:
                given["position_ids"] = (mask[:, :end].long().cumsum(-1) - 1).clamp(min=0)[:, state.length :]
        call = normalise(model, self.decoder, self.names, given, None)
        captured = self.captured = model._captured(call, self.names)
        host = StockHost(model, captured, ())
        hidden, side_inputs = embedded(model, host, call)
        rung = model._depth.lowering
        ran = run(part.schedule, host, hidden if entry is None else entry, side_inputs, captured.side_axes, state, call.valid,
                  True, part.types, "auto" if rung in ("inductor", "cudagraph") else rung)
        return ran.streams, ran.state

    def logits(self, streams: dict[str, Tensor], last: int) -> Tensor:
        """Logits of the last so many tokens, in float32 as ``generate`` reads them."""
        normed = streams["output"][:, -last:]
        return logits_of(apply_head(self.model, self.captured, normed), "draft", "another model").to(torch.float32)


def cropped(state: State, length: int) -> State:
    """A state after its first columns, which grows again in the memory it has.

    Only for states whose later columns nobody reads any more.
    """
    from depthpass_lowering.state import Place, crop

    if state.length == length:
        return state
    shorter = crop(state, length)
    for number, slot in shorter.slots.items():
        places = state.slots[number].places
        if places is None or any(p is None for p in places):
            continue
        drop = state.length - length
        ends = tuple(Place(p.room, p.end - drop) for p in places if p is not None)
        for place in ends:
            place.room.used = min(place.room.used, place.end)
        shorter.slots[number] = replace(slot, places=ends)
    return shorter
