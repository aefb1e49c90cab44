"""What a stock model costs, part by part: its blocks, what stands before them, the final norm and the head.

Blocks that are alike (same modules, same sizes, same entries in every per-layer list of the config) are traced once:
the model is shortened to one block of each kind, captured, and each block gets the count of its kind. The numbers equal
those of the full model; a 32-block config takes as long as one with as many blocks as there are kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import sympy as sp
import torch
from torch import nn

from depthpass.analysis.cost.flops import Count, Experts, count, in_attention
from depthpass.analysis.cost.symbols import AttentionSite, B, n
from depthpass.capture.screen import depth_field
from depthpass.errors import UnsupportedModelError
from depthpass.prompt import at_prompt


@dataclass(frozen=True)
class Weights:
    """Weights that one run of a part reads.

    Attributes:
        dense: elements that every run reads, norms and biases included.
        expert: elements of all experts together; a run reads those that some token is routed to.
        experts, chosen: number of experts, and how many each token takes.
    """

    dense: int
    expert: int = 0
    experts: int = 0
    chosen: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.expert

    def read(self, rows: float) -> float:
        """Elements read by a run of so many tokens; experts as expected when every token chooses uniformly."""
        if not self.expert:
            return self.dense
        return self.dense + self.expert * (1 - (1 - self.chosen / self.experts) ** rows)


@dataclass(frozen=True)
class PartCost:
    """One part of a stock model.

    Attributes:
        name: ``embed``, ``block 3``, ``norm`` or ``head``.
        count: FLOPs and activation bytes, symbolic in B and n.
        weights: what a run of it reads.
        kind: blocks with the same kind are alike.
        matrices: (rows, columns) of its linear maps by path: what a per-visit LoRA updates.
    """

    name: str
    count: Count
    weights: Weights
    kind: int = 0
    matrices: tuple[tuple[str, int, int], ...] = ()

    def parts(self) -> tuple[PartCost, PartCost]:
        """A block's attention, with everything else that stands around it, and its feed-forward network."""
        gemm = self.count.gemm_flops
        network = self.weights.expert + sum(a * b for path, a, b in self.matrices if not in_attention(path))
        dense = network - self.weights.expert
        none = {"projection": sp.Integer(0)}
        return (
            replace(self, count=replace(self.count, gemm_flops={c: e for c, e in gemm.items() if c != "mlp"}, expert_calls=()),
                    weights=Weights(self.weights.dense - dense), matrices=()),
            replace(self, count=Count({**none, "mlp": gemm.get("mlp", sp.Integer(0))}, expert_calls=self.count.expert_calls),
                    weights=replace(self.weights, dense=dense), matrices=()),
        )

    @cached_property
    def kv_width(self) -> int:
        """Elements that one token adds to the KV slot of a visit."""
        return sum(s.kv_width for s in self.count.sites)

    @cached_property
    def gemm_flops_per_token(self) -> sp.Expr:
        """FLOPs of the matrix multiplies outside attention per token; free of B and n."""
        return sp.cancel(sum(self.count.gemm_flops.values(), sp.Integer(0)) / (B * n))


@at_prompt
@dataclass(frozen=True)
class ModelCost:
    """What a stock model costs, symbolic in B and n.

    Attributes:
        model: class name.
        width, vocabulary: of the hidden stream and of the logits.
        dtype: of the weights; bytes are counted in it.
        embed, norm, head: the parts around the blocks.
        blocks: one entry per physical block.
        parameters: elements of all distinct parameters; tied ones count once.
    """

    model: str
    width: int
    vocabulary: int
    dtype: torch.dtype
    embed: PartCost
    blocks: tuple[PartCost, ...]
    norm: PartCost
    head: PartCost
    parameters: int

    @property
    def itemsize(self) -> int:
        """Bytes per weight."""
        return self.dtype.itemsize

    @property
    def parts(self) -> tuple[PartCost, ...]:
        return (self.embed, *self.blocks, self.norm, self.head)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Ops that are not understood and count nothing."""
        return tuple(dict.fromkeys(u for p in self.parts for u in p.count.uncounted))


def model_cost(model: nn.Module) -> ModelCost:
    """Cost of a stock model, on the meta device or with weights; nothing runs and the model is left untouched.

    Args:
        model: a stock transformers decoder.

    Raises:
        UnsupportedModelError: the model cannot be captured; says what stands in the way.
    """
    from depthpass.capture import capture
    from depthpass.capture.export import find_layers

    layers = find_layers(model)
    kinds = block_kinds(model, layers)
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    short = shortened(_meta_copy(model), layers, chosen)
    captured = capture(short, example_inputs(short), {})
    tensors = {**dict(short.named_parameters(remove_duplicate=False)), **dict(short.named_buffers())}
    full = _block_list(model, layers)
    counted = {
        kinds[i]: _count_block(captured.blocks[at], full[i], tensors, captured.width) for at, i in enumerate(chosen)
    }
    blocks = tuple(
        PartCost(f"block {i}", counted[kind], _weights(full[i], counted[kind]), kind, _matrices(full[i]))
        for i, kind in enumerate(kinds)
    )
    embeddings = cast(Any, model).get_input_embeddings().weight.shape[0]
    around = {
        part: _count_part(part, getattr(captured, name), tensors, captured.width)
        for part, name in (("embed", "prologue"), ("norm", "norm"), ("head", "head"))
    }
    head = around["head"].count.gemm_flops.get("head", sp.Integer(0))
    outputs = sp.cancel(head / (2 * B * n * captured.width))
    return ModelCost(
        type(model).__name__, captured.width, int(outputs) if outputs.is_Integer and outputs > 0 else int(embeddings),
        next(model.parameters()).dtype, around["embed"], blocks, around["norm"], around["head"],
        sum({id(p): p.numel() for p in model.parameters()}.values()),
    )


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs to capture a model with: ids, their mask, and positions where the forward takes them."""
    from depthpass.capture.attention import signature_names

    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    taken = signature_names(type(model).forward)
    return {k: torch.ones_like(ids) for k in ("input_ids", "attention_mask", "position_ids") if k in taken}


def _meta_copy(model: nn.Module) -> nn.Module:
    """A private copy whose parameters and buffers have shapes only; tied ones stay tied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def block_kinds(model: nn.Module, layers: str) -> tuple[int, ...]:
    """A number per block; equal numbers for blocks that compute the same function of their weights.

    Two blocks are alike when their module trees have the same classes, the same plain attributes (``layer_idx`` aside)
    and parameters of the same shapes, and when every per-layer list of the config agrees on them.
    """
    blocks = _block_list(model, layers)
    lists = [values for values in _per_layer_lists(model, len(blocks)).values()]
    seen: dict[object, int] = {}
    kinds = []
    for i, block in enumerate(blocks):
        key = (*_signature(block), tuple(repr(values[i]) for values in lists))
        kinds.append(seen.setdefault(key, len(seen)))
    return tuple(kinds)


def _signature(block: nn.Module) -> tuple:
    rows = []
    for name, module in block.named_modules():
        plain = tuple(sorted(
            (k, repr(v)) for k, v in vars(module).items()
            if k not in ("layer_idx", "training") and isinstance(v, int | float | str | bool | tuple | None)
        ))
        shapes = tuple((k, tuple(p.shape), str(p.dtype)) for k, p in module.named_parameters(recurse=False))
        rows.append((name, type(module).__qualname__, plain, shapes))
    return tuple(rows)


def _per_layer_lists(model: nn.Module, blocks: int) -> dict[str, Sequence]:
    """Lists of the config with an entry per block; a list of all block numbers says nothing about a block."""
    config = cast(Any, model).config.get_text_config(decoder=True)
    return {k: v for k, v in vars(config).items()
            if isinstance(v, list | tuple) and len(v) == blocks and list(v) != list(range(blocks))}


def shortened(model: nn.Module, layers: str, keep: Sequence[int]) -> nn.Module:
    """Keep some blocks of a private copy: the list of blocks, the number of blocks and every per-layer list."""
    blocks = _block_list(model, layers)
    total = len(blocks)
    shorter = nn.ModuleList([blocks[i] for i in keep])
    lists = {k: [v[i] for i in keep] for k, v in _per_layer_lists(model, total).items()}
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    texts = {id(t): t for t in (c.get_text_config(decoder=True) for c in configs.values())}
    for text in (t for t in texts.values() if getattr(t, depth_field(t), None) == total):
        setattr(text, depth_field(text), len(keep))
        for name, values in lists.items():
            setattr(text, name, values)
    parent, _, name = layers.rpartition(".")
    setattr(model.get_submodule(parent), name, shorter)
    for i, block in enumerate(shorter):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = i
    return model


def _block_list(model: nn.Module, layers: str) -> list[nn.Module]:
    return list(cast(nn.ModuleList, model.get_submodule(layers)))


def _count_block(block: Any, module: nn.Module, tensors: Mapping[str, torch.Tensor], width: int) -> Count:
    template = block.template
    held: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    root = {f"/{k}": t for k, t in tensors.items()}
    sites = [AttentionSite(s.heads, s.kv_heads, s.key_dim, s.value_dim, s.window, s.chunk) for s in template.sites]
    shapes, buffers = _inputs(template.params, {**root, **held, **block.constants}, width)
    return count(template.graph, inputs=shapes, sites=sites, experts=expert_sizes(module), buffers=buffers)


def _inputs(
    params: Sequence[str], tensors: Mapping[str, torch.Tensor], width: int
) -> tuple[dict[str, Sequence[object]], list[str]]:
    """Shapes of the placeholders of a captured graph, and which of them are no parameters."""
    shapes: dict[str, Sequence[object]] = {"hidden": (B, n, width)}
    buffers = []
    for name in params:
        if name not in tensors:
            raise UnsupportedModelError(f"cost: a graph reads {name!r}, expected a parameter or buffer of the model.")
        placeholder = "p_" + name.replace(".", "_").replace("/", "root_")
        shapes[placeholder] = tuple(tensors[name].shape)
        if not isinstance(tensors[name], nn.Parameter):
            buffers.append(placeholder)
    return shapes, buffers


def expert_sizes(module: nn.Module) -> dict[str, Experts]:
    """Expert layers below a module: those that hold their matrices stacked, ``[experts, in, out]``."""
    sizes = {}
    for path, inner in module.named_modules():
        stacked = [p for p in inner.parameters(recurse=False) if p.dim() == 3]
        if stacked:
            experts = stacked[0].shape[0]
            sizes[path] = Experts(sum(p.numel() for p in stacked) // experts, experts)
    return sizes


def _matrices(block: nn.Module) -> tuple[tuple[str, int, int], ...]:
    from depthpass.hf.modules.parameters import linear_maps

    return tuple((path, *cast(Any, m).weight.shape) for path, m in linear_maps(block))


def _weights(module: nn.Module, counted: Count) -> Weights:
    total = sum(p.numel() for p in module.parameters())
    stacked = expert_sizes(module)
    if not stacked or not counted.expert_calls:  # none, or traced through: then every expert runs on every token
        return Weights(total)
    expert = sum(e.weights * e.experts for e in stacked.values())
    return Weights(total - expert, expert, next(iter(stacked.values())).experts, max(counted.expert_calls))


def _count_part(part: str, captured: Any, tensors: Mapping[str, torch.Tensor], width: int) -> PartCost:
    held = {**tensors, **captured.constants}
    shapes, buffers = _inputs(captured.params, held, width)
    shapes |= {"in_" + name: (B, n) for name in captured.inputs}
    counted = count(captured.graph, part=part, inputs=shapes, buffers=buffers)
    weights = [held[p] for p in captured.params if isinstance(held[p], nn.Parameter)]
    return PartCost(part, counted, Weights(sum(w.numel() for w in weights)))
