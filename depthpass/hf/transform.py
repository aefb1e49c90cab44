"""``transform`` and ``restore``: from a stock model to a transformed one and back."""

from __future__ import annotations

import types

import torch
from torch import nn

from depthpass.capture.export import find_layers, sharing_copy
from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.hf.inputs import position_table
from depthpass.hf.model import PREFIX, DepthModel, Runtime, block_forward, depth_class, stock_copy
from depthpass.hf.parameters import build
from depthpass.ir.program import plain
from depthpass.passes.base import Context
from depthpass.passes.pipeline import apply_spec
from depthpass.schedule.regions import schedule
from depthpass.spec import dump_spec, load_spec

_STYLES = ("sdpa", "eager")


def transform(model: nn.Module, spec, *, chunk: int | None = None) -> nn.Module:
    """Return ``model`` rewired by ``spec``: same class, same parameters, plus the new ones under ``depth.``.

    The given model is left untouched; both share every stock parameter.

    Args:
        model: a transformers decoder (with or without PEFT adapters).
        spec: a pass, a list of passes, or their YAML/JSON form.
        chunk: run serial regions in smaller chunks than the largest legal one (same numbers).

    Raises:
        SpecError, PassError: the spec cannot be applied to this model; nothing has been changed.
        UnsupportedModelError: the model cannot be treated; nothing has been changed.
    """
    inner = _inner(model)
    if isinstance(inner, DepthModel):
        raise SpecError(
            f"this {type(inner).__name__} is already transformed. Call dp.restore(model) first, or pass one list with "
            "all passes."
        )
    passes = load_spec(spec)
    context = context_of(inner)
    program = apply_spec(plain(context.model, context.blocks, context.width), passes, context)
    runtime = Runtime(
        dump_spec(passes), program, schedule(program, chunk), attention_style(inner), find_layers(inner),
        position_table(inner),
    )
    if hasattr(inner, PREFIX):
        raise UnsupportedModelError(f"{type(inner).__name__} already has an attribute {PREFIX!r}.")
    whole = sharing_copy(model)
    made = _inner(whole)
    made.add_module(PREFIX, build(program, next(inner.parameters())))
    made.depth.train(inner.training)
    made.__class__ = depth_class(type(inner))
    made._depth = runtime
    made.config.depthpass = {"spec": runtime.spec, **({} if chunk is None else {"chunk": chunk})}
    for layer in made.get_submodule(runtime.layers):
        layer.forward = types.MethodType(block_forward, layer)
    return whole


def restore(model: nn.Module) -> nn.Module:
    """Return the stock model of a transformed one, sharing its stock parameters (trained ones stay trained).

    Raises:
        SpecError: the model is not transformed.
    """
    inner = _inner(model)
    if not isinstance(inner, DepthModel):
        raise SpecError(f"restore: expected a transformed model, got a stock {type(inner).__name__}.")
    if inner is model:
        return stock_copy(inner)
    whole = sharing_copy(model)
    stock = _inner(whole)
    _replace(whole, stock, stock_copy(stock))
    return whole


def context_of(model: nn.Module) -> Context:
    """What passes may know of a model."""
    config = getattr(model, "config", None)
    layers = find_layers(model)
    text = config.get_text_config(decoder=True)
    return Context(
        model=type(model).__name__, model_type=config.model_type, blocks=len(model.get_submodule(layers)),
        width=text.hidden_size,
    )


def attention_style(model: nn.Module) -> str:
    """The stock attention implementation whose numerics are kept: ``sdpa`` or ``eager``.

    Raises:
        UnsupportedModelError: any other implementation.
    """
    style = model.config._attn_implementation or "eager"
    if style not in _STYLES:
        raise UnsupportedModelError(
            f"attention implementation {style!r}: expected one of {', '.join(_STYLES)}. Load the model with "
            "attn_implementation='sdpa'; depthpass runs attention itself."
        )
    return style


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
                return
    raise UnsupportedModelError("cannot find the transformers model inside its wrapper.")


def new_parameters(model: nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that a transform has added, for an optimizer group of their own."""
    return list(_inner(model).depth.parameters())
