"""Latent positions (Coconut): pads whose embedding is the final normed state of the token before them.

A call is cut at its latents. Everything before them advances the state at once, each latent by itself, and what follows
them at once again; a state is all that the pieces share, so every program and every level runs as it does without latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthpass.errors import InputError
from depthpass.hf.calls.pads import Layout, pad_op
from depthpass.ir.program import Program

if TYPE_CHECKING:
    from depthpass.hf.calls.inputs import Call
    from depthpass.hf.model import DepthModel

Advance = Callable[["Call", Any, bool], "tuple[Tensor, dict[str, Tensor], Any]"]
"""(new tokens, state, whether the new state is needed) -> the embedded tokens, all streams, the new state."""


def feeds(program: Program) -> bool:
    """Whether a program has latents."""
    o = pad_op(program)
    return o is not None and bool(o["feed"])


def as_embeddings(model: DepthModel, call: Call) -> Call:
    """The call with embeddings instead of ids: a latent is no token.

    Raises:
        InputError: rows have different loop counts, whose pieces do not stand below each other.
    """
    if "length" in model._depth.plan.varies:
        raise InputError("coconut: expected a loop count that does not follow the length of a row, whose latents would run in "
                         "another program than its prompt. Use a number or a range.")
    if "input_ids" not in call.tensors:
        return call
    tensors = dict(call.tensors)
    tensors["inputs_embeds"] = model.get_input_embeddings()(tensors.pop("input_ids"))
    return replace(call, tensors=tensors)


def advance(call: Call, layout: Layout, state: Any, keep: bool, run: Advance) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Advance a state by a call with latents in it; returns what ``run`` does.

    Args:
        call: with places for the latents, from :func:`depthpass.hf.calls.pads.insert`.
        keep: whether the new state is needed.
    """
    total, embedded = layout.pads.shape[1], call.tensors["inputs_embeds"]
    first, *_, last = layout.pads.any(0).nonzero().flatten().tolist() * 2
    ends = [*range(first, last + 2), *([total] if total > last + 1 else [])]
    parts: list[tuple[Tensor, dict[str, Tensor]]] = []
    start = 0
    for end in ends:
        piece = columns(call, start, end)
        if first <= start <= last:
            # The program's output has passed the final norm. Rows whose latents stand elsewhere take their own token.
            fed = parts[-1][1]["output"][:, -1:].to(embedded.dtype)
            piece.tensors["inputs_embeds"] = torch.where(layout.pads[:, start, None, None], fed, embedded[:, start:end])
        hidden, streams, state = run(piece, state, keep or end < total)
        parts.append((hidden, streams))
        start = end
    joined = {name: torch.cat([streams[name] for _, streams in parts], 1) for name in parts[0][1]}
    return torch.cat([hidden for hidden, _ in parts], 1), joined, state


def columns(call: Call, start: int, end: int) -> Call:
    """The columns ``start .. end-1`` of a call as a call behind those before them."""
    tensors = {name: t[:, start:end] for name, t in call.tensors.items()}
    valid = None if call.valid is None else call.valid[:, : call.past + end]
    return replace(call, tensors=tensors, valid=valid, past=call.past + start)
