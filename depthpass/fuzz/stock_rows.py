"""Stock rows: the blocks of a stock model one token of one row at a time, attention over a Python list of keys."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from depthpass.fuzz.models import blocks_of, norm_of
from depthpass.ir import Program

NAME = "depthpass_fuzz"
Key = tuple[Tensor, Tensor, int]
"""``(k [kv_heads, dim], v [kv_heads, dim], column)``"""

_running: list[Callable[..., Tensor]] = []
_softmax: list[torch.dtype | None] = []
"""In what dtype the model's own attention function takes the softmax; None = that of the scores."""


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **more):
    if not _running:  # whole rows run to record calls and to apply the head; what the blocks give is not used
        return torch.zeros_like(query[..., : value.shape[-1]]).transpose(1, 2), None
    limits = {"window": more.get("sliding_window"), "chunk": _chunk(module), "softcap": more.get("softcap"),
              "sinks": more.get("s_aux"), "softmax": _softmax[-1],
              "scale": query.shape[-1] ** -0.5 if scaling is None else scaling}
    return _running[-1](query[0, :, 0], key[0, :, 0], value[0, :, 0], limits)[None, None], None


def _chunk(module: Any) -> int | None:
    kinds = getattr(module.config, "layer_types", None)
    chunked = kinds is not None and kinds[module.layer_idx] == "chunked_attention"
    return module.config.attention_chunk_size if chunked else None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def list_attention(model: Any):
    """The stock model with attention over lists for the time of a ``with``."""
    style = model.config._attn_implementation
    _softmax.append(torch.float32 if style == "eager" and model.config.model_type == "gemma2" else None)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(style)
        _softmax.pop()


def read(q: Tensor, keys: Sequence[Key], column: int, limits: dict[str, Any], end: int | None = None) -> Tensor:
    """Softmax attention of one query ``[heads, dim]`` over a list of keys.

    Args:
        end: one past the last column that the query sees; None = its own is the last.
    """
    window, chunk, end = limits["window"], limits["chunk"], column + 1 if end is None else end
    seen = [
        (k, v) for k, v, c in keys
        if c < end and (window is None or abs(c - column) < window) and (chunk is None or c // chunk == column // chunk)
    ]
    if not seen:
        return q.new_zeros(q.shape)
    share = q.shape[0] // seen[0][0].shape[0]
    k, v = (torch.stack(t, 1).repeat_interleave(share, 0) for t in zip(*seen, strict=True))
    scores = torch.einsum("hd,hnd->hn", q, k) * limits["scale"]
    if limits["softcap"] is not None:
        scores = torch.tanh(scores / limits["softcap"]) * limits["softcap"]
    if limits["sinks"] is not None:
        scores = torch.cat((scores, limits["sinks"][:, None]), 1)
    return torch.softmax(scores, -1, dtype=limits["softmax"]).to(v.dtype)[:, None, : len(seen)].matmul(v)[:, 0]


def averaged(model: nn.Module, program: Program) -> nn.Module:
    """The stock model, or a copy with the means that a program starts from."""
    if all(o.kind != "average" for o in program):
        return model
    mean = copy.deepcopy(model)
    with torch.no_grad():
        for o in program:
            if o.kind == "average":
                of = [dict(blocks_of(model)[b].named_parameters()) for b in o["blocks"]]
                for name, p in blocks_of(mean)[o["index"]].named_parameters():
                    p.copy_(torch.stack([block[name] for block in of]).mean(0))
    return mean


def _first(calls: Sequence[tuple[tuple, dict]]) -> Tensor:
    args, kwargs = calls[0]
    return (args[0] if args else kwargs["hidden_states"])[0]


class Row:
    """One row without padding on a stock model whose attention is :func:`list_attention`.

    Args:
        ids: the tokens, workspace pads included, ``[columns]``.
        positions: of the tokens, ``[columns]``.
    """

    def __init__(self, model: nn.Module, ids: Tensor, positions: Tensor) -> None:
        self.model, self.ids, self.positions, self.blocks = model, ids, positions, blocks_of(model)
        self.calls: list[tuple[tuple, dict]] = []
        self._recorded(self.calls, input_ids=ids[None])
        self.embed = _first(self.calls)

    def _recorded(self, calls: list[tuple[tuple, dict]], **given: Tensor) -> None:
        handles = [b.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True) for b in self.blocks]
        try:
            self._forward(**given)
        finally:
            for h in handles:
                h.remove()

    def _forward(self, **given: Tensor) -> Any:
        given = given or {"input_ids": self.ids[None]}
        return self.model(**given, position_ids=self.positions[None], use_cache=False)

    def fed(self, x: Tensor, i: int) -> Tensor:
        """What the first block gets at column i where x stands in place of the token's embedding, ``[width]``."""
        calls: list[tuple[tuple, dict]] = []
        row = torch.stack([x if j == i else torch.zeros_like(x) for j in range(len(self.ids))])
        self._recorded(calls, inputs_embeds=row[None])
        return _first(calls)[i]

    def block(self, index: int, x: Tensor, i: int, attend: Callable[..., Tensor]) -> Tensor:
        """Stock block ``index`` on the token of column i, ``[width]``."""
        args, kwargs = self.calls[index]

        def at(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(at(v) for v in value)
            if isinstance(value, Tensor):
                axis = next((d for d in range(1, value.dim()) if value.shape[d] == len(self.ids)), None)
                return value if axis is None else value.narrow(axis, i, 1)
            return value

        kwargs = {k: at(v) for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "cache")}
        _running.append(attend)
        try:
            out = self.blocks[index](x[None, None], *(at(a) for a in args[1:]), **kwargs)
        finally:
            _running.pop()
        return (out[0] if isinstance(out, tuple) else out)[0, 0]

    def head(self, normed: Tensor) -> Tensor:
        """What the stock model makes of normed streams ``[n, width]``, n up to the row's length."""
        count = len(normed)
        padded = torch.cat((normed, normed.new_zeros(len(self.ids) - count, normed.shape[1])))[None]
        handle = norm_of(self.model).register_forward_hook(lambda m, a, out: padded)
        try:
            return self._forward().logits[0, :count]
        finally:
            handle.remove()
