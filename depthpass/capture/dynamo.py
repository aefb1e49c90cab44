"""Capture the graph that Dynamo hands to a ``torch.compile`` backend: the same :class:`Capture` as of a module.

The parameters are arguments of the graph; they are told from the caller's tensors by being the very objects that the
model holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from depthpass.capture import attention as _ops  # noqa: F401  (defines the marker ops)
from depthpass.capture.captured import Capture
from depthpass.capture.dense_masks import DenseMask, evaluate, recognise
from depthpass.capture.functional import functionalise
from depthpass.capture.outline import outline
from depthpass.capture.ports import CACHE, block_of, mark_ports
from depthpass.capture.retrace import argument_names, relative_stacks, retrace
from depthpass.capture.screen import find_layers, screen
from depthpass.capture.tidy import tidy
from depthpass.capture.traced import Traced
from depthpass.errors import UnsupportedModelError

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_VIEWS = {
    torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default,
    torch.ops.aten.clone.default, torch.ops.aten.contiguous.default, torch.ops.aten.expand.default,
    torch.ops.aten.slice.Tensor, torch.ops.aten.unsqueeze.default,
}


@dataclass(frozen=True, eq=False)
class DynamoCapture:
    """A captured Dynamo graph and the meaning of its arguments.

    Attributes:
        capture: the model.
        parameters: position of each parameter and buffer of the model among the arguments, by full name.
        inputs: position of each other tensor, by the name that the capture's parts use.
        labels: what the caller calls each of these inputs, for messages.
        valid: the input that says which tokens are real, ``[batch, tokens]``; None = all are.
        positions: an input that starts another sequence wherever it does not count up by one; None = no such.
        tokens: an input and its dimension that runs over the tokens.
        rows: number of rows that the graph is fixed to; None = any.
    """

    capture: Capture
    parameters: dict[str, int]
    inputs: dict[str, int]
    labels: dict[str, str]
    valid: str | None
    positions: str | None
    tokens: tuple[str, int]
    rows: int | None


def capture_graph(gm: fx.GraphModule, arguments: Sequence[object], model: nn.Module) -> DynamoCapture:
    """Capture a graph of a whole forward pass, alone or with code around it (a loss).

    Args:
        gm: Dynamo's graph, parameters lifted.
        arguments: the values it is compiled for; parameters are those of ``model``.
        model: the transformers decoder that the graph runs.

    Raises:
        UnsupportedModelError: the graph is only a part of the model, holds a KV cache, fixes the number of tokens, or
            contains something that cannot be treated soundly.
    """
    screen(model, {})
    config: Any = model.config
    style = config._attn_implementation
    if style != "sdpa":
        raise UnsupportedModelError(
            f"attention implementation {style!r}: expected 'sdpa' in a torch.compile graph, where attention is found by its "
            "op. Load the model with attn_implementation='sdpa' (or call model.set_attn_implementation('sdpa')), or use "
            "dp.transform(model, spec)."
        )
    layers = find_layers(model)
    labels = argument_names([n for n in gm.graph.nodes if n.op == "placeholder"])
    module = retrace(gm)
    graph = module.graph
    kinds, parameters, inputs = _bind(graph, arguments, labels, model)
    tidy(module)
    relative_stacks(graph, layers)
    _sizes_from_inputs(graph, inputs)
    graph.eliminate_dead_code()
    count = len(list(model.get_submodule(layers).children()))
    mark_ports(graph, layers, count, config.get_text_config(decoder=True).hidden_size)
    batch, tokens, held = _sizes(graph, inputs)
    masks = _take_attention(graph, batch, tokens, layers, held[0])
    graph.eliminate_dead_code()
    functionalise(module, frozenset(inputs))
    output = next(n for n in graph.nodes if n.op == "output")
    spec = pytree.tree_structure(tuple(output.args[0]))
    captured = outline(Traced(module, kinds, {}, (), spec, layers, count, whole_rows=True))
    valid, positions = _one(masks, "valid"), _one(masks, "positions")
    return DynamoCapture(
        captured, parameters, inputs, {name: labels[i] for name, i in inputs.items()}, valid and valid.name,
        positions and positions.name, (held[0].name, held[1]), int(batch) if batch.is_Integer else None,
    )


def _bind(
    graph: fx.Graph, arguments: Sequence[object], labels: Sequence[str], model: nn.Module
) -> tuple[dict[str, tuple[InputKind, str | None]], dict[str, int], dict[str, int]]:
    """Tell the model's parameters and buffers from the caller's tensors: kinds, parameters and inputs by name."""
    names = _names(model)
    kinds: dict[str, tuple[InputKind, str | None]] = {}
    parameters: dict[str, int] = {}
    inputs: dict[str, int] = {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for i, (node, value, label) in enumerate(zip(placeholders, arguments, labels, strict=True)):
        node.meta["argument"] = label
        if isinstance(value, Tensor) and id(value) in names:
            name = node.meta["parameter"] = names[id(value)]
            kinds[node.name] = (InputKind.PARAMETER if isinstance(value, nn.Parameter) else InputKind.BUFFER, name)
            parameters[name] = i
            continue
        node._rename(label)
        kinds[node.name] = (InputKind.USER_INPUT, None)
        if isinstance(value, Tensor):
            inputs[node.name] = i
    return kinds, parameters, inputs


def _names(model: nn.Module) -> dict[int, str]:
    """Full name of each parameter and buffer, by identity; the first name of tied ones."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), name)
    return names


def _sizes_from_inputs(graph: fx.Graph, inputs: dict[str, int]) -> None:
    """Read sizes off the tensors that have them, instead of from arguments of their own."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "placeholder" or not isinstance(size := node.meta["val"], torch.SymInt) or not node.users:
            continue
        held = next(
            ((n, d) for n in graph.nodes if n.op == "placeholder" and n.name in inputs
             for d, s in enumerate(n.meta["val"].shape) if isinstance(s, torch.SymInt) and s.node.expr == size.node.expr),
            None,
        )
        if held is None:
            raise UnsupportedModelError(
                f"the graph takes the number {node.meta['argument']} = {size} as an argument, and no tensor has this size; "
                "expected numbers to be constants or sizes. Pass it as a tensor."
            )
        with graph.inserting_after(last):
            read = graph.call_function(torch.ops.aten.sym_size.int, held)
        read.meta["val"] = size
        node.replace_all_uses_with(read)


def _sizes(graph: fx.Graph, inputs: dict[str, int]) -> tuple[sympy.Expr, sympy.Symbol, tuple[fx.Node, int]]:
    """The sizes of the hidden stream, and an input that has the tokens as a dimension."""
    enter = next(n for n in graph.nodes if n.target is torch.ops.depthpass.enter.default)
    shape = enter.meta["val"].shape
    batch, tokens = (s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in shape[:2])
    if not isinstance(tokens, sympy.Symbol):
        dense = [n for n in graph.nodes if n.op == "placeholder" and n.name in inputs and n.meta["val"].dim() > 3]
        if dense:
            raise UnsupportedModelError(
                f"{dense[0].meta['argument']}: expected [batch, tokens], got shape {tuple(dense[0].meta['val'].shape)}. "
                "Dense masks are not supported: masks are made from the validity of each token."
            )
        raise UnsupportedModelError(
            f"the number of tokens is fixed to {tokens} in this graph; expected a dynamic sequence dimension, along which "
            "the tokens are cut into chunks. Leave out dynamic=False and mark_static, or call "
            "torch._dynamo.maybe_mark_dynamic(tensor, 1) on every input. A row of a single token is always fixed: pad it "
            "to two."
        )
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == tokens:
                    return batch, tokens, (node, dim)
    raise UnsupportedModelError("no argument of the graph runs over the tokens; compile the model itself.")


def _take_attention(
    graph: fx.Graph, batch: sympy.Expr, tokens: sympy.Symbol, layers: str, anchor: fx.Node
) -> list[DenseMask]:
    """Replace every attention op by a ``depthpass::attend`` site; the masks as they were recognised."""
    known: dict[fx.Node | None, DenseMask] = {None: DenseMask(None, None)}
    used = []
    sites = [n for n in graph.nodes if n.target is _SDPA]
    if not sites:
        raise UnsupportedModelError(
            "the graph has no scaled_dot_product_attention op; expected attn_implementation='sdpa'. Use dp.transform(model, "
            "spec) for models that compute attention by themselves."
        )
    for node in sites:
        where = f"block {block_of(node, layers)}"
        q, k, v, mask, dropout, causal, scale, grouped = _arguments(node)
        if mask is None and causal is not True:
            raise UnsupportedModelError(
                f"{where}: {node.name} attends without a mask and with is_causal={causal}; expected causal attention."
            )
        if k.meta["val"].shape[2] != q.meta["val"].shape[2]:
            raise UnsupportedModelError(f"{where}: {node.name} has more keys than queries: {CACHE}")
        if mask is not None and mask not in known:
            known[mask] = recognise(mask, batch, tokens, where)
        kind = known[mask]
        used.append(kind)
        if not grouped:
            sizes = {tokens: 3} | ({} if batch.is_Integer else {batch: 2})
            k, v = (_unrepeated(x, q.meta["val"].shape[1], sizes) for x in (k, v))
        scale = float(scale) if scale is not None else q.meta["val"].shape[-1] ** -0.5
        with graph.inserting_before(node):
            call = graph.call_function(
                torch.ops.depthpass.mask.default, (anchor, kind.window or -1, kind.chunk or -1)
            )
            # [batch, tokens, heads, dim], as the stock layers hand it on; the op gives the two middle ones swapped.
            args = (q, k, v, call, None, scale, 0.0, float(dropout))
            site = graph.call_function(torch.ops.depthpass.attend.default, args)
            back = graph.call_function(torch.ops.aten.transpose.int, (site, 1, 2))
        value = node.meta["val"]
        call.meta["val"] = value.new_empty(anchor.meta["val"].shape, dtype=torch.bool)
        site.meta = {**node.meta, "val": value.transpose(1, 2).contiguous()}
        back.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(back)
        graph.erase_node(node)
    return used


def _arguments(node: fx.Node) -> list:
    """Arguments of an attention op in the order of its schema, defaults filled in."""
    target: Any = node.target
    schema = target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args)) | dict(node.kwargs)
    return [given.get(a.name, a.default_value) for a in schema]


def _unrepeated(repeated: fx.Node, heads: int, sizes: dict[Any, int]) -> fx.Node:
    """Keys before each head was repeated for the query heads that share it, or the node itself."""
    source = repeated
    while source.target in _VIEWS and isinstance(source.args[0], fx.Node):
        source = source.args[0]
        shape = source.meta["val"].shape
        if len(shape) == 4 and isinstance(shape[1], int) and 0 < shape[1] < heads and heads % shape[1] == 0:
            small = [int(s.node.expr.xreplace(sizes)) if isinstance(s, torch.SymInt) else s for s in shape]
            sample = torch.arange(float(torch.Size(small).numel())).view(small)
            with unset_fake_temporarily(), _disable_current_modes():
                same = torch.equal(
                    evaluate(repeated, {source: sample}, sizes), sample.repeat_interleave(heads // small[1], 1)
                )
            return source if same else repeated
    return repeated


def _one(masks: list[DenseMask], field: str) -> fx.Node | None:
    """The argument that all masks agree on."""
    values = {getattr(m, field) for m in masks}
    if len(values) > 1:
        names = sorted("none" if n is None else str(n.meta.get("argument", n.name)) for n in values)
        raise UnsupportedModelError(
            f"blocks take padding from different arguments ({', '.join(names)}); expected the same attention_mask in all."
        )
    return values.pop()
