"""What a capture is: a stock model as prologue, block templates, final norm and head, with named ports."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from depthpass.capture.nodes import graph_module


@dataclass(frozen=True)
class Site:
    """One attention call of a block.

    Attributes:
        path: module path of the attention module inside its block, e.g. ``self_attn``.
        scale, softcap, dropout: as the stock layer passes them; softcap None = none.
        window: a query sees keys at most ``window - 1`` columns back; None = all.
        chunk: attention stays inside chunks of this many columns, counted from the row's first real token.
        sinks: whether the layer passes a sink logit per head.
        heads, kv_heads, key_dim, value_dim: sizes of one call.
    """

    path: str
    scale: float
    softcap: float | None
    dropout: float
    window: int | None
    chunk: int | None
    sinks: bool
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, eq=False)
class Template:
    """The graph of a block, shared by all blocks with equal graphs.

    ``graph(visit, hidden, *side_inputs, *params)`` returns the hidden stream. ``visit`` answers the calls of
    :mod:`depthpass.capture.calls`; hidden is ``[batch, tokens, width]``.

    Attributes:
        side_inputs: number of side inputs (rotary tables, ...).
        params: names relative to the block, in the order of the graph's inputs.
        sites: attention calls in the order of their index.
    """

    graph: fx.GraphModule
    side_inputs: int
    params: tuple[str, ...]
    sites: tuple[Site, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """A physical block: a template, and what it is bound to.

    Attributes:
        side_inputs: index of each side input among the prologue's outputs.
        constants: values of parameters that are no module attributes (lifted constants), by name.
    """

    template: Template
    side_inputs: tuple[int, ...]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """Prologue, norm or head: ``graph(visit, *streams, *inputs, *params)``.

    Attributes:
        inputs: names of the call's own tensor arguments that it reads.
        params: full parameter or buffer names, in the order of the graph's inputs.
        extras: indices of the prologue outputs that it reads.
        constants: lifted constants by name.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    extras: tuple[int, ...] = ()
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Capture:
    """A captured stock model.

    Attributes:
        prologue: ``-> (hidden, *outputs)``; outputs are the side inputs of blocks and extras of the head.
        side_axes: token axis of each prologue output; None = carries no token axis.
        blocks: one entry per physical block.
        norm: from the last block to the base model's ``last_hidden_state``.
        head: the rest; returns the flat outputs of the model.
        layers: module path of the list of blocks.
        out_spec: tree of the outputs.
        own_backwards: functions of the model whose gradients the graphs do not have.
        asked: tensors beside parameters and buffers whose values the graphs hold as numbers (``item()``).
    """

    prologue: Part
    side_axes: tuple[int | None, ...]
    blocks: tuple[Block, ...]
    norm: Part
    head: Part
    layers: str
    width: int
    out_spec: pytree.TreeSpec
    own_backwards: tuple[str, ...] = ()
    asked: tuple[torch.Tensor, ...] = ()

    @functools.cached_property
    def tables(self) -> Part:
        """The prologue without the embedding, ``-> outputs``: for callers that have embedded the tokens themselves."""
        part, graph = self.prologue, fx.Graph()
        graph.output(tuple(graph.graph_copy(part.graph.graph, {})[1:]))  # type: ignore[index]
        # Nobody sees the embedding, so nothing has to be asserted of it.
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op == "call_function":
                graph.erase_node(node)
        places = [n for n in graph.nodes if n.op == "placeholder"]
        first = len(places) - len(part.params)
        used = [bool(n.users) for n in places[first:]]
        for node, kept in zip(places[first:], used):
            if not kept:
                graph.erase_node(node)
        return replace(part, graph=graph_module(part.graph, graph), params=tuple(itertools.compress(part.params, used)))

    @property
    def templates(self) -> tuple[Template, ...]:
        """The distinct templates in order of first use."""
        return tuple(dict.fromkeys(b.template for b in self.blocks))
