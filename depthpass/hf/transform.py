"""``transform`` and ``restore``: from a stock model to a transformed one and back."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from depthpass.capture.attention import attention_style
from depthpass.capture.export import find_layers
from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.hf.auto import mark
from depthpass.hf.doors import DepthDecoder, Door, decoder_class, decoder_path
from depthpass.hf.host import block_forward, depth_module
from depthpass.hf.model import DepthModel, depth_class, not_reentrant
from depthpass.hf.pads import check_pads, pad_op
from depthpass.hf.parameters import build
from depthpass.hf.placement import copied, home, is_dispatched, own_forward, set_forward, unwrapped
from depthpass.hf.plans import Plans, plan
from depthpass.hf.runtime import PREFIX, Runtime
from depthpass.hf.stock import drop_wrapped_forward, stock_copy
from depthpass.hf.table import position_table
from depthpass.hf.watch import drop_capturing_hooks
from depthpass.hf.weights import check_weights, retire, start_weights
from depthpass.passes.base import Context
from depthpass.schedule.fixed_point import FixedPoint, load_schedule
from depthpass.spec import load_spec


def transform(
    model: nn.Module,
    spec,
    *,
    chunk: int | None = None,
    lowering: str = "auto",
    stack: bool = True,
    schedule: str | FixedPoint = "sequential",
    tol: float | None = None,
    max_sweeps: int | None = None,
    window: int | None = None,
    exact: bool | None = None,
) -> nn.Module:
    """Return ``model`` rewired by ``spec``: same class, same parameters, plus the new ones under ``depth.``.

    The given model is left untouched; both share every stock parameter, except those that the spec gives new values
    (averages) or retires (frozen aliases).

    Args:
        model: a transformers decoder (with or without PEFT adapters).
        spec: a pass, a list of passes, or their YAML/JSON form.
        chunk: run serial regions in smaller chunks than the largest legal one (same numbers).
        lowering: how serial regions run. ``eager``: op by op. ``scheduled``: keys and values in place, weight gradients
            in one product after the loop; an error where that is not possible. ``auto``: scheduled where possible.
        stack: run visits of one block that do not wait for each other as one call when decoding (same numbers).
        schedule: ``sequential``: serial regions chunk by chunk. ``fixed_point``, or a
            :class:`~depthpass.schedule.fixed_point.FixedPoint`: by sweeps over all tokens at once; same numbers unless
            ``tol`` or ``exact=False`` asks for others. Each output then has ``output.sweeps``: what was run, by region.
        tol, max_sweeps, window, exact: the fields of :class:`~depthpass.schedule.fixed_point.FixedPoint`, for
            ``schedule="fixed_point"``.

    Raises:
        SpecError, PassError: the spec cannot be applied to this model; nothing has been changed.
        UnsupportedModelError: the model cannot be treated; nothing has been changed.
        LoweringError: the program can be reported but not run yet; nothing has been changed.
    """
    inner = _inner(model)
    if isinstance(inner, DepthModel | DepthDecoder):
        raise SpecError(
            f"this {type(inner).__name__} is already transformed. Call dp.restore(model) first, or pass one list with "
            "all passes."
        )
    from depthpass_lowering.executors.levels import check_level

    from depthpass.hf.save import own_class

    policy = load_schedule(schedule, tol=tol, max_sweeps=max_sweeps, window=window, exact=exact)
    runtime = prepare(inner, spec, chunk, stack)
    runtime.lowering, runtime.fixed_point = check_level(lowering), policy
    whole = copied(model)
    made = _inner(whole)
    made.__class__ = depth_class(type(inner))
    drop_wrapped_forward(made)
    install(made, runtime)
    start_weights(made.get_submodule(runtime.layers), runtime.program, made.depth)
    made.config.depthpass = runtime.config() | own_class(type(made)._stock_class)
    mark(made.config)
    return whole


def prepare(model: nn.Module, spec, chunk: int | None, stack: bool = True) -> Runtime:
    """Everything that can fail, before anything is changed.

    Raises:
        SpecError, PassError, UnsupportedModelError, LoweringError: as :func:`transform`.
    """
    passes = load_spec(spec)
    context = context_of(model)
    attention_style(model)
    if hasattr(model, PREFIX):
        raise UnsupportedModelError(f"{type(model).__name__} already has an attribute {PREFIX!r}.")
    layers = find_layers(model)
    check_distinct(model, layers)
    decoder = decoder_path(model, layers)
    for module in (model, model.get_submodule(decoder), *model.get_submodule(layers)):
        module = unwrapped(module)
        if own_forward(module) is not None and "_original_forward" not in module.__dict__:
            raise UnsupportedModelError(
                f"this {type(module).__name__} has a forward of its own that its class does not know (patched by another "
                "library); a transformed model would not run it. Undo the patch first."
            )
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            not_reentrant(module._gradient_checkpointing_func)
    made = plan(passes, context, chunk, stack)
    if (pads := pad_op(made.program)) is not None:
        check_pads(pads, model.config)
    check_weights(model.get_submodule(layers), made.program)
    return Runtime(Plans(made), layers, decoder, position_table(model.get_submodule(decoder)))


def check_distinct(model: nn.Module, layers: str) -> None:
    """Refuse a list in which one block object stands twice: a program says such things by its visits.

    Raises:
        SpecError: naming the layer program that means the same.
    """
    places: dict[int, int] = {}
    order = [places.setdefault(id(b), len(places)) for b in model.get_submodule(layers)]
    if len(places) < len(order):
        raise SpecError(
            f"{layers} holds {len(order)} entries but {len(places)} different blocks: one block object stands there twice. "
            f"Keep each block once (and num_hidden_layers={len(places)}) and say the order with dp.LayerProgram({order})."
        )


def install(model: nn.Module, runtime: Runtime) -> None:
    """Give a model, already of a transformed class, its new parameters and its blocks' forward."""
    like = next(model.parameters())
    if is_dispatched(model):
        # Beside the streams, whatever is offloaded; on a model that is dispatched later they go where its map says.
        like = torch.empty(0, dtype=like.dtype, device=home(model))
    model.add_module(PREFIX, build(runtime.plan.largest, like, model))
    model.depth.train(model.training)
    model._depth = runtime
    drop_capturing_hooks(model)
    decoder: Any = model.get_submodule(runtime.decoder)
    if decoder is not model:
        decoder.__class__ = decoder_class(type(decoder))
        decoder._depth_door = Door(model)
    for module in (model, decoder):
        if "_hf_hook" in module.__dict__:
            set_forward(module, None)
    for layer in map(unwrapped, model.get_submodule(runtime.layers)):
        # Not a bound method: pickle would look it up by name on the layer.
        set_forward(layer, functools.partial(block_forward, layer))


def restore(model: nn.Module) -> nn.Module:
    """Return the stock model of a transformed one, sharing its stock parameters (trained ones stay trained).

    Raises:
        SpecError: the model is not transformed.
    """
    inner = _inner(model)
    if isinstance(inner, DepthDecoder):
        raise SpecError(f"restore: expected a whole transformed model, got the decoder of one; pass the "
                        f"{type(inner.depth_model).__name__} it belongs to.")
    if not isinstance(inner, DepthModel):
        raise SpecError(f"restore: expected a transformed model, got a stock {type(inner).__name__}.")
    if inner is model:
        return _revived(stock_copy(inner), inner)
    whole = copied(model)
    stock = _inner(whole)
    _replace(whole, stock, _revived(stock_copy(stock), inner))
    return whole


def _revived(stock: nn.Module, made: DepthModel) -> nn.Module:
    """The stock model with retired blocks that train again if the others do."""
    blocks = stock.get_submodule(made._depth.layers)
    if any(p.requires_grad for p in blocks.parameters()):
        retire(blocks, made.depth_program, frozen=False)
    return stock


def context_of(model: nn.Module) -> Context:
    """What passes may know of a model."""
    config = getattr(model, "config", None)
    layers = find_layers(model)
    text = config.get_text_config(decoder=True)
    return Context(
        model=type(model).__name__, model_type=config.model_type, blocks=len(model.get_submodule(layers)),
        width=text.hidden_size, facts={"vocab_size": getattr(text, "vocab_size", None)},
    )


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
    return list(depth_module(_inner(model)).parameters())
