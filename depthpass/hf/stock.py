"""Stock models of transformed ones: copies that share every stock parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depthpass.capture.screen import block_list
from depthpass.capture.structure import structural_copy
from depthpass.hf.calls.doors import DepthDecoder
from depthpass.hf.checkpoints.marks import unmark
from depthpass.hf.modules.hooks import is_controlled
from depthpass.hf.modules.placement import copied, set_forward, sharded_dtypes, unwrapped
from depthpass.hf.runtime import PREFIX

if TYPE_CHECKING:
    from depthpass.hf.model import DepthModel


def drop_wrapped_forward(model: nn.Module) -> None:
    """Remove the forward that accelerate's mixed precision (Trainer with bf16) leaves on a model that it trained.

    It calls the forward of the class the model had then; the next ``prepare`` wraps anew.
    """
    if model.__dict__.pop("_original_forward", None) is not None:
        model.__dict__.pop("forward", None)


def stock_copy(model: DepthModel) -> nn.Module:
    """A stock model that shares every stock parameter of a transformed one."""
    stock = copied(model)
    stock.__class__ = type(model)._stock_class
    drop_wrapped_forward(stock)
    decoder: Any = stock.get_submodule(model._depth.decoder)
    if isinstance(decoder, DepthDecoder):
        decoder.__class__ = type(decoder)._stock_class
        del decoder._depth_door
    # A wrapper that was put around a forward calls the transformed model.
    for module in (stock, decoder, *map(unwrapped, block_list(stock, model._depth.layers))):
        set_forward(module, None)
    del stock._depth
    del stock.depth
    unmark(stock.config)
    if hasattr(stock.config, "depthpass"):
        del stock.config.depthpass
    return stock


def stock_decoder(model: DepthModel, device: torch.device | None = None) -> nn.Module:
    """A stock copy of the inner decoder of a transformed model, for a trace (see :func:`structural_copy`).

    Args:
        device: where its tensors are; None = where they are now.
    """
    path, layers = model._depth.decoder, model._depth.layers
    decoder: Any = structural_copy(
        model.get_submodule(path), leave=("_depth", "_depth_door"), dtypes=sharded_dtypes(model.modules()), device=device
    )
    decoder.__class__ = type(decoder)._stock_class
    decoder._modules.pop(PREFIX, None)
    # What was put around these forwards runs at each call.
    for module in (decoder, *block_list(decoder, layers[len(path) + 1 if path else 0 :])):
        module.__dict__.pop("forward", None)
    for module in decoder.modules():
        if is_controlled(module):
            del module.forward
    return decoder
