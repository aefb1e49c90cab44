"""Routing statistics of one call: which tokens each step took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.errors import InputError
from depthpass.hf.switching.switch import transformed
from depthpass.ir.verify import infer
from depthpass.prompt import at_prompt


@at_prompt
@dataclass(frozen=True, eq=False)
class Routing:
    """Where the tokens of one call went.

    Attributes:
        taken: by tap name (without ``.taken``), which tokens the route took, ``[batch, tokens]`` bool.
        share: the same as shares of the real tokens.
        depth: block visits that each token took, ``[batch, tokens]``; 0 for pads.
        valid: real tokens, ``[batch, tokens]``.
    """

    taken: Mapping[str, Tensor]
    share: Mapping[str, float]
    depth: Tensor
    valid: Tensor


def routing_of(model: nn.Module, outputs: Any, attention_mask: Tensor | None = None) -> Routing:
    """Routing statistics from the outputs of a model whose routed pass has ``taps=True``.

    Args:
        outputs: what the model returned.
        attention_mask: of the same tokens, ``[batch, tokens]``; None = all real.

    Raises:
        InputError: outputs without the taps, or a mask of another shape.
    """
    program = transformed(model, "routing_of").depth_program
    routes = {t.args[0]: t["name"] for t in program.taps if program.defs[t.args[0]].kind == "route"}
    taps = getattr(outputs, "taps", {})
    missing = [o.name for o in program if o.kind == "route" and routes.get(o.name) not in taps]
    if missing or not routes:
        raise InputError("routing_of: expected outputs with taps of every route, got none for "
                         f"{', '.join('%' + m for m in missing) or 'a program without routes'}. Give the pass taps=True, and "
                         "the outputs of this model.")
    taken = {name.removesuffix(".taken"): taps[name] for name in routes.values()}
    like = next(iter(taken.values()))
    valid = torch.ones_like(like) if attention_mask is None else attention_mask.bool()
    if valid.shape != like.shape:
        raise InputError(f"attention_mask: expected shape {tuple(like.shape)}, that of the outputs, got {tuple(valid.shape)}.")
    taken = {name: t & valid for name, t in taken.items()}
    share = {name: float(t.sum() / valid.sum()) for name, t in taken.items()}
    types, depth = infer(program), torch.zeros(like.shape, dtype=torch.long, device=like.device)
    for o in program.visits:
        route = types[o.name].tokens
        depth += valid if route is None else taken[routes[route].removesuffix(".taken")]
    return Routing(taken, share, depth, valid)
