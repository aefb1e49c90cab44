"""``materialize``: a layer program baked into a plain stock model, weights copied, for tools that know nothing of depthpass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthpass.analysis.cost.stock import _signature
from depthpass.capture.export import find_layers
from depthpass.capture.screen import depth_field
from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.hf.switching.switch import transformed
from depthpass.hf.transform import restore
from depthpass.ir.program import Program

_NUMBERS = ("moe_layers", "mlp_only_layers")
"""Fields of configs that list block numbers; every other list as long as the stack has an entry per block."""


def materialize(model: nn.Module) -> PreTrainedModel:
    """A stock model with one block per visit of the program in force; returns a new model, the given one is untouched.

    Every visit gets a copy of its block's weights, so the result is larger and its copies train apart. ``num_hidden_layers``
    and every per-layer list of the config (``layer_types``, ...) follow the visits. ``save_pretrained`` writes a checkpoint
    that stock transformers loads::

        dp.materialize(dp.transform(model, dp.LayerProgram([0, 1, 2, 1, 2, 3]))).save_pretrained(path)

    Args:
        model: a transformed model; merge PEFT adapters first.

    Raises:
        SpecError: the model is not transformed, or its program is no plain stack of visits with keys of their own; the
            message names what stands in the way.
        UnsupportedModelError: adapters, or a block whose kind its config can only put at certain depths.
    """
    inner = transformed(model, "materialize")
    if any(hasattr(m, "merged_adapters") for m in inner.modules()):
        raise UnsupportedModelError("materialize: expected a model without PEFT layers, got adapters. Call merge_and_unload() "
                                    "first.")
    if inner._depth.plan.varies:
        raise SpecError("materialize: expected fixed loop counts, got some that vary. Call dp.set_loops(model, T) first.")
    layers = stack_of(inner.depth_program, "materialize")
    _warn_size(inner, layers)
    stock = copy.deepcopy(restore(inner))
    path = find_layers(stock)
    blocks = list(cast(nn.ModuleList, stock.get_submodule(path)))
    used: set[int] = set()
    new = []
    for i in layers:
        new.append(copy.deepcopy(blocks[i]) if i in used else blocks[i])
        used.add(i)
    parent, _, name = path.rpartition(".")
    # What a block refers to besides its weights (the config) is the model's own again.
    config = cast(Any, stock).config
    for block in new:
        for module in block.modules():
            if getattr(module, "config", None) is not None:
                module.config = _own(stock, module.config, config)
    for p, block in enumerate(new):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = p
    setattr(stock.get_submodule(parent), name, nn.ModuleList(new))
    rewrite_lists(config, layers, len(blocks))
    same_kinds(type(stock), config, path, new, layers, "materialize")
    return stock


def _warn_size(inner: Any, layers: Sequence[int]) -> None:
    """Say how much larger than the model its stock form is, where blocks repeat."""
    sizes = [sum(p.numel() * p.element_size() for p in b.parameters()) for b in inner.get_submodule(inner._depth.layers)]
    whole = sum(p.numel() * p.element_size() for p in inner.parameters())
    if more := sum(sizes[i] for i in layers) - sum(sizes[i] for i in set(layers)):
        warnings.warn(f"materialize: {len(layers)} visits of {len(set(layers))} blocks become as many blocks, so the model "
                      f"takes {(whole + more) / 2**20:.1f} MiB instead of {whole / 2**20:.1f} MiB. dp.emit stores repeated "
                      "blocks once.", UserWarning, stacklevel=3)


def stack_of(program: Program, who: str) -> tuple[int, ...]:
    """Blocks of a program that is one plain stack.

    Raises:
        SpecError: it is none; ``who`` asks.
    """
    want = "a plain stack of blocks, which is all that a stock model can be"
    if program.ahead is not None:
        raise SpecError(f"materialize: expected {want}, got attention that sees later tokens, which stock code does not run.")
    x = program.ops[0].name
    for o in program.ops[1:-2]:
        if o.kind != "block" or o.args != (x,):
            what = o.kind if o.kind != "block" else f"block {o['index']}, which does not read the visit before it"
            raise SpecError(f"{who}: expected {want}, got {'%' + o.name + ' = ' if o.name else ''}{what}"
                            f"{' of ' + o.note if o.note else ''}.")
        extra = [k for k, _ in o.attrs if k not in ("index", "slot")]
        if extra:
            raise SpecError(f"{who}: expected {want}, got %{o.name} = block {o['index']} with {', '.join(extra)} of "
                            f"{o.note or 'its own'}. Per-visit parameters and shared keys need depthpass.")
        x = o.name
    norm, output = program.ops[-2:]
    if norm.kind != "norm" or norm.args != (x,) or output.args != (norm.name,):
        raise SpecError(f"{who}: expected {want}, got {norm.kind} before the output.")
    return tuple(o["index"] for o in program.visits)


def _own(model: nn.Module, held: Any, config: Any) -> Any:
    """The model's config object of the kind that a copied block holds."""
    for candidate in (config, config.get_text_config(decoder=True)):
        if type(candidate) is type(held):
            return candidate
    raise UnsupportedModelError(f"materialize: a block of {type(model).__name__} holds a {type(held).__name__} that is not "
                                "the model's config.")


def rewrite_lists(config: Any, layers: Sequence[int], blocks: int) -> None:
    """Depth and per-layer lists of a config after a layer program."""
    common = vars(PreTrainedConfig())
    for settings in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if getattr(settings, depth_field(settings), None) != blocks:
            continue
        lists = {
            k: v for k, v in vars(settings).items()
            if isinstance(v, list | tuple) and k not in common and not k.endswith("token_id") and not k.startswith("_")
        }
        # Caches of transformers go by num_hidden_layers, also where it counts the blocks of an encoder that is not there.
        for field in {depth_field(settings), "num_hidden_layers"}:
            setattr(settings, field, len(layers))
        for name, values in lists.items():
            if name in _NUMBERS:
                setattr(settings, name, [p for p, i in enumerate(layers) if i in values])
            elif len(values) == blocks:
                setattr(settings, name, [values[i] for i in layers])


def same_kinds(stock: type, config: Any, path: str, blocks: Sequence[nn.Module], layers: Sequence[int], who: str) -> None:
    """Refuse blocks that stock code would build differently from a config.

    Args:
        blocks: what stands at each depth.
        layers: their numbers in the model.

    Raises:
        UnsupportedModelError: naming the depth; ``who`` asks.
    """
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModelError(f"{who}: scale_attn_by_inverse_layer_idx makes a block depend on its place; a copy "
                                    "elsewhere would compute something else.")
    config = copy.deepcopy(config)
    if isinstance(config.dtype, str):  # as a save leaves it; Apertus makes tensors of it
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        fresh = stock(config)
    for p, (mine, theirs) in enumerate(zip(blocks, fresh.get_submodule(path), strict=True)):
        a, b = (_shape(m) for m in (mine, theirs))
        if a != b:
            different = next((x[0] or type(mine).__name__ for x, y in zip(a, b) if x != y), "its modules")
            raise UnsupportedModelError(
                f"{who}: visit {p} is block {layers[p]}, but from its config {stock.__name__} would build another "
                f"kind of block there (it differs in {different}). This architecture fixes what stands at which depth."
            )


def _shape(block: nn.Module) -> tuple:
    """Kind of a block: classes, settings and shapes, without dtypes and what transformers notes on modules for itself."""
    return tuple(
        (name, cls, tuple((k, v) for k, v in plain if not k.startswith("_") and k != "gradient_checkpointing"),
         tuple((k, s) for k, s, _ in shapes))
        for name, cls, plain, shapes in _signature(block)
    )
