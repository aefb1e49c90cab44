"""Blocks, embedding and final norm as live modules, where hooks inside them have to see what they compute.

A captured graph calls no modules, so a hook on a module inside a block would never run. A block with such hooks runs as its
stock module instead: the stock forward, with the arguments that the stock decoder gives it for these tokens, and with an
attention call that asks the running visit for its keys, values and masks. Chunks, slots, routes and delays stay what the
program says; a hook sees one call for each visit and chunk.

The stock arguments come from a *shell*: the stock decoder's forward with its blocks replaced by recorders.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_utils import AttentionInterface

from depthpass.capture import Capture, Part
from depthpass.capture.nodes import module_paths
from depthpass.capture.screen import block_list
from depthpass.capture.structure import empty
from depthpass.errors import UnsupportedModelError
from depthpass.hf.calls.doors import call_names
from depthpass.hf.calls.live_factors import Factored
from depthpass.hf.modules.hooks import Hooked, has_hooks, is_controlled
from depthpass.ir.program import writes_slot
from depthpass.lowered.ops import of_one_stream


class _LiveVisit:
    """A visit that a stock block asks for attention, call by call."""

    def __init__(self, visit: Any):
        self.visit, self.count = visit, 0


_live_visit: ContextVar[_LiveVisit | None] = ContextVar("depthpass_live_visit", default=None)


def _visit_attention(module, query, key, value, attention_mask, *args, **kwargs):
    """The attention function of a live block; scale, softcap and window are those of the captured site."""
    live_visit = _live_visit.get()
    assert live_visit is not None
    number, live_visit.count = live_visit.count, live_visit.count + 1
    return live_visit.visit.attend(number, query, key, value, kwargs.get("s_aux")), None


@functools.cache
def _install() -> None:
    """Let stock layers find the running visit; outside of a live block the interface is what it was."""
    stock = AttentionInterface.get_interface

    @functools.wraps(stock)
    def get_interface(self, *args, **kwargs):
        # Dynamo cannot read context variables, and never traces a live block.
        if torch.compiler.is_compiling() or _live_visit.get() is None:
            return stock(self, *args, **kwargs)
        return _visit_attention

    AttentionInterface.get_interface = get_interface


class _Stop(Exception):
    """The shell has seen what it wanted."""


class _Recorder(nn.Module):
    """Stands for a block in a shell."""

    def __init__(self, layer: nn.Module, seen):
        super().__init__()
        self.__dict__["layer"], self.__dict__["seen"] = layer, seen

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args, **kwargs):
        return self.__dict__["seen"](args, kwargs)


class _BlockForward(nn.Module):
    """A block's stock forward as a module of its own, so that its parameters can be replaced for one call."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return _forward(self.block)(self.block, *args, **kwargs)


def _forward(block: nn.Module):
    """A block's stock forward without the checkpoint that newer transformers wrap it in: the visit is inside one already."""
    forward = type(block).forward
    while getattr(getattr(forward, "__code__", None), "co_name", "") == "forward_with_checkpointing":
        forward = forward.__wrapped__
    return forward


class Live:
    """What runs live in one call.

    Args:
        hooked: where the hooks are.
        past: columns of the state before this call.

    Attributes:
        hidden: what the live embedding made of the tokens, ``[batch, tokens, width]``.
    """

    hidden: Tensor

    def __init__(self, decoder: Any, layers: str, captured: Capture, hooked: Hooked, tensors: Mapping[str, Tensor],
                 past: int, cache: object):
        _install()
        self.decoder, self.layers, self.captured, self.hooked, self.past = decoder, layers, captured, hooked, past
        self.names = call_names(type(decoder)._stock_class)
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        inputs: dict[str, Any] = {n: t for n, t in tensors.items() if n in self.names}
        if "position_ids" not in self.names and past:
            inputs[next(n for n in ("cache", "past_key_values") if n in self.names)] = cache
        blocks = block_list(decoder, layers)

        def seen(args, kwargs):
            if not self.calls:
                self.hidden = args[0] if args else kwargs["hidden_states"]
            self.calls.append((args, kwargs))
            if len(self.calls) == len(blocks):
                raise _Stop
            return self.hidden

        with contextlib.suppress(_Stop):
            self._shell([seen] * len(blocks), inputs)
        self.count = self.hidden.shape[1]
        after = _paths(captured.norm) - {""}
        self.norms = any(has_hooks(m) for n, m in decoder.named_modules() if n in after)

    def of_rows(self, rows: Tensor) -> Live:
        """The same for some of the rows."""
        batch, picked = len(self.hidden), copy.copy(self)

        def pick(x):
            return x.index_select(0, rows) if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == batch else x

        picked.hidden, picked.calls = pick(self.hidden), pytree.tree_map(pick, self.calls)
        return picked

    def _shell(self, seen: Sequence, inputs: Mapping[str, Any], quiet: frozenset[nn.Module] = frozenset()):
        """Run the stock decoder's forward with recorders for its blocks.

        Args:
            quiet: modules whose hooks are left out.
        """
        stock = type(self.decoder)._stock_class
        shell = _twin(self.decoder, quiet, keep=True)
        shell.__class__ = stock
        path, _, name = self.layers.rpartition(".")
        owner = shell
        for part in filter(None, path.split(".")):
            inner = _twin(owner._modules[part], quiet, keep=True)
            owner._modules[part] = inner
            owner = inner
        blocks = block_list(self.decoder, self.layers)
        owner._modules[name] = nn.ModuleList(map(_Recorder, blocks, seen))
        off = {"use_cache": False} if "use_cache" in self.names else {}
        return stock.forward(shell, **inputs, **off)

    def block(self, layer: nn.Module, visit: Any, params: Sequence[Tensor], bound: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """Run a block as a module; the visit's own parameters stand in for those it is bound to.

        Raises:
            UnsupportedModelError: the visit runs a part of the block's graph, which a module does not have.
        """
        op, index = (visit.members[0] if hasattr(visit, "members") else visit).op, visit.index
        # A module has its keys and queries from one stream; a visit without keys of its own leaves the module's unused.
        partly = op.kind == "ffn" or op["part"] != "whole"
        if partly or (writes_slot(op) is not None and not of_one_stream(op)):
            what = ("one part of it alone" if partly else "keys of another stream" if op["memory"] else
                    "queries of some tokens and keys of all")
            raise UnsupportedModelError(
                f"block {index} has hooks on modules inside it, and a visit with {what}, which change what the block computes "
                "inside. Register the hooks on the block or on the model, or remove them."
            )
        args, kwargs = self.calls[index]
        rows = hidden.shape[0]
        args, kwargs = pytree.tree_map(lambda x: self._cut(x, visit, rows, index), (args, kwargs))
        kwargs = {n: None if "mask" in n else x for n, x in kwargs.items()}
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs["hidden_states"] = hidden
        template, factored = self.captured.blocks[index].template, None
        if op["modulate"] is not None:
            factored = Factored(layer, template, visit)
            layer = factored.block
        live_visit = _LiveVisit(visit)
        before = _live_visit.set(live_visit)
        try:
            changed = {f"block.{n}": p for n, p, old in zip(template.params, params, bound) if p is not old}
            if changed:
                out = torch.func.functional_call(_BlockForward(layer), changed, args, kwargs)
            else:
                out = _forward(layer)(layer, *args, **kwargs)
        finally:
            _live_visit.reset(before)
        if factored is not None:
            factored.check()
        sites = len(template.sites)
        if live_visit.count != sites:
            raise UnsupportedModelError(
                f"block {index} ({type(layer).__name__}) has hooks on modules inside it, but as a module it does not find its "
                f"attention through transformers' AttentionInterface ({live_visit.count} of {sites} calls). Register the hooks "
                "on the block or on the model."
            )
        return out[0] if isinstance(out, tuple | list) else out

    def _cut(self, x: Any, visit: Any, rows: int, index: int) -> Any:
        """An argument of a stock block for the tokens of a visit."""
        if not isinstance(x, Tensor):
            # A cache is the program's own.
            return None if hasattr(x, "get_seq_length") else x
        if x.dim() > 3:  # a mask, which the visit has of its own
            return None
        axis = self._token_axis(x, index)
        members = getattr(visit, "members", None)
        first = visit if members is None else members[0]
        if axis is not None:
            x = x.narrow(axis, first.span.start - self.past, first.span.count)
            if (route := getattr(first, "route", None)) is not None:
                if axis == 0:
                    raise UnsupportedModelError(f"block {index} reads a per-token table without a batch dimension, so its "
                                                "tokens cannot be routed where it runs as a module.")
                x = route.table(x, axis)
                if first.rows is not None:
                    x = x.index_select(0, first.rows)
        if members is not None and axis not in (None, 0) and x.shape[0] not in (1, rows):
            x = torch.cat([x] * len(members))
        return x

    def _token_axis(self, x: Tensor, index: int) -> int | None:
        if self.count not in x.shape:
            return None
        if x.dim() >= 2 and x.shape[1] == self.count and (x.dim() == 3 or not x.is_floating_point() or x.shape[0] != self.count):
            return 1
        if x.dim() < 3 and x.shape[0] == self.count and (x.dim() == 1 or x.shape[1] != self.count):
            return 0
        if self.count == 1:
            return None
        raise UnsupportedModelError(f"block {index} has hooks on modules inside it and gets a table of shape {tuple(x.shape)} "
                                    f"for {self.count} tokens, whose token axis is not clear. Use another number of tokens.")

    def norm(self, hidden: Tensor) -> Tensor:
        """What the stock decoder makes of the last block's stream: ``[batch, k, width]`` -> the same."""
        blocks, shape = block_list(self.decoder, self.layers), hidden.shape[:2]
        first = [lambda args, kwargs: hidden] * len(blocks)
        after = _paths(self.captured.norm)
        quiet = frozenset(m for n, m in self.decoder.named_modules() if n not in after)
        given: dict[str, Any] = {"inputs_embeds": hidden}
        if "position_ids" in self.names:
            given["position_ids"] = torch.arange(shape[1], device=hidden.device).expand(shape)
        if "attention_mask" in self.names:
            given["attention_mask"] = torch.ones(shape, dtype=torch.bool, device=hidden.device)
        return self._shell(first, given, quiet)[0]


def warn_parts(model: Any, counts: Mapping[int, int]) -> None:
    """Say once that hooks see parts of a row.

    Args:
        counts: calls of each block with hooks in one call of the model.
    """
    if max(counts.values(), default=0) < 2 or model._depth.said_parts:
        return
    model._depth.said_parts = True
    index, times = next((i, n) for i, n in counts.items() if n > 1)
    warnings.warn(
        f"hooks on or in block {index} were called {times} times in one call of the model: once for each visit and each chunk of "
        f"tokens of a token loop ({_schedule(model)}). What a hook sees is one visit of one chunk, not the row.",
        UserWarning, stacklevel=2,
    )


def _schedule(model: Any) -> str:
    chunks = sorted({r.chunk for r in model.depth_schedule.serial_regions if r.chunk})
    visits = f"{len(model.depth_program.visits)} visits of {model.depth_program.blocks} blocks"
    return visits + (f", chunks of {', '.join(map(str, chunks))}" if chunks else "")


def _twin(module: nn.Module, quiet: frozenset[nn.Module], keep: bool = False) -> Any:
    """A module of the same class, tensors and submodules; without hooks of its own, and those of ``quiet`` without theirs."""
    twin = empty(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = {
        n: _twin(m, quiet) if m is not None and quiet and not isinstance(m, nn.ModuleList) and m in quiet else m
        for n, m in module._modules.items()
    }
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = type(module.__dict__[name])()
    if keep or is_controlled(module):
        twin.__dict__.pop("forward", None)
    return twin


def with_tables(hooked: Hooked, decoder: nn.Module, captured: Capture, blocks: int) -> Hooked:
    """The same hooks, with all blocks live where modules have some that make what blocks get besides their stream.

    A captured block is given the captured tables (of rotary embeddings, ...), and a live one what the live modules make.
    """
    if not hooked.outer or not any(has_hooks(decoder.get_submodule(path)) for path in _paths(captured.tables) - {""}):
        return hooked
    return replace(hooked, inside=frozenset(range(blocks)))


def _paths(part: Part) -> frozenset[str]:
    """Modules of the decoder whose ops are in a captured part."""
    return frozenset(path for node in part.graph.graph.nodes for path in module_paths(node))
