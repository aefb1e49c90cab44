"""Prepare and install: what a spec means for a model, and what a model of a transformed class gets."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from depthpass.capture.screen import block_list, find_layers, screen_modules
from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.hf.calls.doors import Door, decoder_class, decoder_path
from depthpass.hf.calls.host import block_forward
from depthpass.hf.calls.pads import check_pads, pad_op
from depthpass.hf.calls.table import position_table
from depthpass.hf.modules.checkpointing import not_reentrant
from depthpass.hf.modules.context import context_of
from depthpass.hf.modules.hooks import drop_capturing_hooks
from depthpass.hf.modules.parameters import build
from depthpass.hf.modules.placement import home, is_dispatched, own_forward, set_forward, unwrapped
from depthpass.hf.modules.weights import check_weights
from depthpass.hf.plans import Plans, check_runnable
from depthpass.hf.runtime import PREFIX, Runtime
from depthpass.plan import compile_spec
from depthpass.spec import SpecLike, load_spec


def prepare(model: nn.Module, spec: SpecLike, chunk: int | None, stack: bool = True) -> Runtime:
    """Everything that can fail, before anything is changed.

    Raises:
        SpecError, PassError, UnsupportedModelError, LoweringError: as :func:`transform`.
    """
    passes = load_spec(spec)
    context = context_of(model)
    if hasattr(model, PREFIX):
        raise UnsupportedModelError(f"{type(model).__name__} already has an attribute {PREFIX!r}.")
    layers = find_layers(model)
    check_distinct(model, layers)
    decoder = decoder_path(model, layers)
    screen_modules(model.get_submodule(decoder))
    for module in (model, model.get_submodule(decoder), *block_list(model, layers)):
        module = unwrapped(module)
        if own_forward(module) is not None and "_original_forward" not in module.__dict__:
            raise UnsupportedModelError(
                f"this {type(module).__name__} has a forward of its own that its class does not know (patched by another "
                "library); a transformed model would not run it. Undo the patch first."
            )
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            not_reentrant(cast("Callable", module._gradient_checkpointing_func))
    plan = check_runnable(compile_spec(passes, context, chunk=chunk, stack=stack))
    if (pads := pad_op(plan.program)) is not None:
        check_pads(pads, model.config)
    check_weights(block_list(model, layers), plan.program)
    return Runtime(Plans(plan), layers, decoder, position_table(model.get_submodule(decoder)))


def check_distinct(model: nn.Module, layers: str) -> None:
    """Refuse a list in which one block object stands twice: a program says such things by its visits.

    Raises:
        SpecError: naming the layer program that means the same.
    """
    places: dict[int, int] = {}
    order = [places.setdefault(id(b), len(places)) for b in block_list(model, layers)]
    if len(places) < len(order):
        raise SpecError(
            f"{layers} holds {len(order)} entries but {len(places)} different blocks: one block object stands there twice. "
            f"Keep each block once (and num_hidden_layers={len(places)}) and say the order with dp.LayerProgram({order})."
        )


def install(model: Any, runtime: Runtime) -> None:
    """Give a model, already of a transformed class, its new parameters and its blocks' forward."""
    warnings.filterwarnings("ignore", r"Unexpected keyword arguments \['depthpass'\]")  # PEFT's, of adapters that go around it
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
    for layer in map(unwrapped, block_list(model, runtime.layers)):
        # Not a bound method: pickle would look it up by name on the layer.
        set_forward(layer, functools.partial(block_forward, layer))
