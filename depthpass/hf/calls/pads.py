"""Workspace tokens: where a call puts the pads of a program, and what the caller never sees of them.

The pads of a program stand between prompt and answer (or where the program says), in positions of their own: a prompt of n
tokens, m pads in n .. n+m-1, then the answer from n+m on. The first call on a cache (or the only call) is the one with the
prompt and gets them; later calls find them in the cache. Everything a caller gives or gets (ids, masks, positions, labels,
logits, lengths) is about real tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from depthpass.errors import InputError, SpecError
from depthpass.hf.calls.table import table_size
from depthpass.ir.program import Op, Program

if TYPE_CHECKING:
    from depthpass.hf.calls.inputs import Call
    from depthpass.hf.model import DepthModel

IGNORED_LABEL = -100
FOR_LOSSES = ("num_items_in_batch", "shift_labels", "ignore_index")  # what stock losses take besides labels


@dataclass(frozen=True)
class Layout:
    """Where the pads of one call stand.

    Attributes:
        source: the caller's column that each column of the call holds, ``[batch, n + m]``; of a pad the prompt's last one.
        pads: which columns are pads, ``[batch, n + m]`` bool.
        outputs: the column that each of the caller's columns gets its outputs from, ``[batch, n]``: its own, and of the
            prompt's last one the last pad.
        fill: which columns before and after a row hold nothing, ``[batch, n + m]`` bool: they only put the pads of all rows
            below each other; None = there are none.
    """

    source: Tensor
    pads: Tensor
    outputs: Tensor
    fill: Tensor | None = None

    @classmethod
    def of(cls, split: Tensor, new: int, count: int) -> Layout:
        """``count`` pads before column ``split[row]`` of rows of ``new`` columns."""
        split = split[:, None]
        columns = torch.arange(new + count, device=split.device)[None]
        pads = (columns >= split) & (columns < split + count)
        source = torch.where(columns < split, columns, torch.where(pads, split - 1, columns - count))
        kept = torch.arange(new, device=split.device)[None]
        return cls(source, pads, torch.where(kept < split - 1, kept, kept + count))

    @classmethod
    def aligned(cls, split: Tensor, new: int, count: int) -> Layout:
        """As :meth:`of`, with every row moved so that the pads of all rows stand in the same columns."""
        before = int(split.max())
        total = before + count + new - int(split.min())
        split = split[:, None]
        columns = torch.arange(total, device=split.device)[None]
        pads = ((columns >= before) & (columns < before + count)).expand(len(split), -1)
        own = torch.where(columns < before, columns - before + split, columns - before - count + split)
        fill = ~pads & ((own < 0) | (own >= new))
        source = torch.where(pads, split - 1, own).clamp(0, new - 1)
        kept = torch.arange(new, device=split.device)[None]
        outputs = kept - split + before + torch.where(kept < split - 1, 0, count)
        return cls(source, pads, outputs, fill if total > new + count else None)

    def spread(self, x: Tensor, pad: Tensor | float | bool) -> Tensor:
        """A value per column, ``[batch, n, ...]``, with ``pad`` at the pads."""
        index = self.source.reshape(*self.source.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        values = x.gather(1, index)
        mask = self.pads.reshape(*self.pads.shape, *[1] * (x.dim() - 2))
        return torch.where(mask, torch.as_tensor(pad, dtype=x.dtype, device=x.device), values)

    def trim(self, stream: Tensor) -> Tensor:
        """``[batch, n + m, ...]`` -> ``[batch, n, ...]``."""
        index = self.outputs.reshape(*self.outputs.shape, *[1] * (stream.dim() - 2))
        return stream.gather(1, index.expand(-1, -1, *stream.shape[2:]))


def pad_op(program: Program) -> Op | None:
    """The op that says how many pads a program has, or None."""
    return next((o for o in program if o.kind == "pad"), None)


def check_pads(o: Op, config) -> None:
    """Check what the pads of a program need of the model.

    Raises:
        SpecError: no token for them, or one beyond the vocabulary.
    """
    if not o["feed"]:
        pad_token(o, config)
    size = config.get_text_config(decoder=True).vocab_size
    if o["behind"] is not None and o["behind"] >= size:
        raise SpecError(f"{'coconut' if o['feed'] else 'pad'}.after: expected a token below the vocabulary's {size}, got "
                        f"{o['behind']}.")


def pad_token(o: Op, config) -> int:
    """The token whose embedding the pads have.

    Raises:
        SpecError: neither the pass nor the config says.
    """
    if o["token"] is not None:
        size = config.get_text_config(decoder=True).vocab_size
        if o["token"] >= size:
            raise SpecError(f"pad.token: expected a token below the vocabulary's {size}, got {o['token']}.")
        return o["token"]
    token = config.get_text_config(decoder=True).pad_token_id
    if token is None:
        raise SpecError("pad.token: expected a token whose embedding the pads have, got none, and the config has no "
                        "pad_token_id. Write dp.Pad(tokens, token=...); a token that the data never uses may be trained.")
    return token


def check_places(model: DepthModel, program: Program, call: Call) -> None:
    """Refuse a call whose rows have no place for the program's pads, before anything is captured or run.

    Raises:
        InputError: it is not clear where the prompt ends, the row does not fit into the model's position table with its pads,
            or the call has an argument that says nothing about pads.
    """
    o = pad_op(program)
    if o is None:
        return
    positions, size = call.tensors.get("position_ids"), table_size(model)
    if positions is not None and size is not None and (reached := int(positions.max()) + o["tokens"]) >= size:
        raise InputError(f"the sequence reaches position {reached} with its workspace pads, but the model's position table has "
                         f"{size} entries.")
    if _goes_on(call):
        if call.prompt is not None:
            raise InputError("prompt_length: the prompt came in an earlier call, with its pads. Leave it out.")
        return
    if other := call.tensors.keys() - {"input_ids", "inputs_embeds", "position_ids", "attention_mask"}:
        raise InputError(f"{min(other)}: a model with workspace pads does not know what to give the pads for it. Leave it "
                         "out.")
    if positions is not None and positions.dim() > 2:
        raise InputError("position_ids: a model with workspace pads does not know their places among those of images. Use a "
                         "program without dp.Pad.")
    for part in [call] if call.packing is None else map(call.of, call.packing.rows(None)):
        _split(o, part)


def _goes_on(call: Call) -> bool:
    """Whether the pads are in the cache already."""
    return call.cache is not None and bool(call.cache.state.length)


def insert(model: DepthModel, program: Program, call: Call) -> tuple[Call, Layout | None]:
    """A call that :func:`check_places` has let through with the program's pads in place, in the columns and positions of the
    state."""
    o = pad_op(program)
    if o is None:
        return call, None
    if _goes_on(call):
        return _after(o["tokens"], call), None
    name = "input_ids" if "input_ids" in call.tensors else "inputs_embeds"
    new, count = call.tensors[name].shape[1], o["tokens"]
    # Behind a row there may only be nothing where no later call goes on with it: windows count columns.
    aligned = o["feed"] and not call.use_cache
    layout = (Layout.aligned if aligned else Layout.of)(_split(o, call), new, count)
    tensors = dict(call.tensors)
    tensors[name] = _tokens(model, o, tensors[name], layout)
    mask = layout.spread(tensors["attention_mask"], True)
    tensors["attention_mask"] = mask if layout.fill is None else mask & ~layout.fill
    if "position_ids" in tensors:
        # Pads go on counting where the prompt ends; what follows comes after them.
        tensors["position_ids"] = tensors["position_ids"].gather(1, layout.source) + layout.pads.long().cumsum(-1)
    valid = tensors["attention_mask"].bool() if call.valid is not None or layout.fill is not None else None
    return replace(call, tensors=tensors, valid=valid, ids=None), layout


def _after(count: int, call: Call) -> Call:
    """A call on top of a cache that has the pads: later columns and positions, a mask with pads."""
    assert call.cache is not None
    state, new, tensors = call.cache.state, call.tensors["attention_mask"].shape[1], dict(call.tensors)
    if "position_ids" in tensors:
        tensors["position_ids"] = tensors["position_ids"] + count
    valid = None
    if call.valid is not None:
        before = state.valid
        if before is None:
            before = torch.ones(len(call.valid), state.length, dtype=torch.bool, device=call.valid.device)
        valid = torch.cat((before, call.valid[:, call.past :]), 1)
        assert valid.shape[1] == state.length + new
    return replace(call, tensors=tensors, valid=valid, past=state.length)


def _split(o: Op, call: Call) -> Tensor:
    """The column before which each row's pads go, ``[batch]``: where the program says, else after the prompt: as told, else
    before the first label, else after all tokens."""
    real = call.tensors["attention_mask"].bool()
    rank, total = real.long().cumsum(-1), real.sum(-1)
    if o["at"] is not None or o["behind"] is not None:
        return _said(o, call, real, rank, total)
    length = total
    if call.prompt is not None:
        length = call.prompt.expand(len(real)) if len(call.prompt) == 1 else call.prompt
        if length.shape != total.shape or bool(((length < 1) | (length > total)).any()):
            raise InputError(f"prompt_length: expected between 1 and the row's number of real tokens {total.tolist()}, got "
                             f"{length.tolist()}.")
    elif call.labels is not None and call.labels.shape == real.shape:
        length = _unlabelled(call.labels, real, total)
    return (rank < length[:, None]).sum(-1) + 1


def _said(o: Op, call: Call, real: Tensor, rank: Tensor, total: Tensor) -> Tensor:
    """The column after the row's first so many tokens, or after its first token of that id.

    Raises:
        InputError: a row does not have it.
    """
    who = "coconut" if o["feed"] else "pad"
    if o["at"] is not None:
        if short := (total < o["at"]).nonzero().flatten().tolist():
            raise InputError(f"{who}.after: expected rows of at least {o['at']} real tokens, got {int(total[short[0]])} in row "
                             f"{short[0]}. Set another place; if {o['at']} is a token, write after='token:{o['at']}'.")
        return (rank < o["at"]).sum(-1) + 1
    if call.ids is None:
        raise InputError(f"{who}.after: expected input_ids, in which token {o['behind']} can be found, got inputs_embeds. Say "
                         "the place as a number of real tokens.")
    marks = (call.ids == o["behind"]) & real
    if without := (~marks.any(-1)).nonzero().flatten().tolist():
        raise InputError(f"{who}.after: expected the token {o['behind']} in every row, got none in row {without[0]}.")
    return marks.long().argmax(-1) + 1


def _unlabelled(labels: Tensor, real: Tensor, total: Tensor) -> Tensor:
    """Real tokens of each row before the first one with a label."""
    asked = (labels != IGNORED_LABEL) & real
    started = asked.long().cumsum(-1) > 0
    length = torch.where(asked.any(-1), (real & ~started).sum(-1), total)
    remedy = ("Set the labels of the prompt to -100 and no others, or say where the prompt ends with prompt_length (an "
              "integer, or one per row).")
    if whole := (length == 0).nonzero().flatten().tolist():
        raise InputError(f"labels: row {whole[0]} has a label at its first token, so no prompt that workspace pads could follow. "
                         f"{remedy}")
    if gaps := (started & real & ~asked).any(-1).nonzero().flatten().tolist():
        raise InputError(f"labels: row {gaps[0]} has tokens without a label after the first one with a label, so it is not clear "
                         f"where the prompt ends. {remedy}")
    return length


def _tokens(model: DepthModel, o: Op, tokens: Tensor, layout: Layout) -> Tensor:
    if o["feed"]:  # filled in one by one
        return layout.spread(tokens, 0.0)
    token = pad_token(o, model.config)
    if tokens.dim() == 2:
        return layout.spread(tokens, token)
    embedded = model.get_input_embeddings()(torch.tensor(token, device=tokens.device))
    return layout.spread(tokens, embedded.to(tokens.dtype))
