"""What passes may know of a model, and where the model is that they are told of."""

from __future__ import annotations

from typing import Any

from torch import nn

from depthpass.capture.screen import block_list, find_layers, text_config
from depthpass.errors import UnsupportedModelError
from depthpass.passes.base import Context


def context_of(model: nn.Module) -> Context:
    """What passes may know of a model.

    Raises:
        UnsupportedModelError: it is no decoder of transformers.
    """
    blocks = block_list(model, find_layers(model))
    config: Any = model.config
    text = text_config(model)
    return Context(
        model=type(model).__name__, model_type=config.model_type, blocks=len(blocks), width=text.hidden_size,
        facts={"vocab_size": getattr(text, "vocab_size", None)},
    )


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def in_force(new: Any) -> Any:
    """The new parameters that run: PEFT wraps ``modules_to_save``, and trains a copy for each adapter.

    Raises:
        UnsupportedModelError: several adapters are active.
    """
    if not hasattr(new, "modules_to_save"):
        return new
    active = [a for a in new.active_adapters if a in new.modules_to_save]
    if len(active) > 1:
        raise UnsupportedModelError(
            f"the adapters {', '.join(active)} are active together and each has its own copy of depth. Activate one of them."
        )
    return new.original_module if new.disable_adapters or not active else new.modules_to_save[active[0]]
