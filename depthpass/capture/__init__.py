"""Capture: from a stock model to FX graphs with named ports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from depthpass.capture.captured import Block, Capture, Part, Site, Template

__all__ = ["Block", "Capture", "Part", "Site", "Template", "capture"]


def capture(model: nn.Module, tensors: dict[str, torch.Tensor], static: Mapping[str, object]) -> Capture:
    """Capture one call signature of a stock model; the model itself is left untouched.

    Args:
        model: a transformers decoder.
        tensors: example tensor inputs; shapes ``[batch, tokens, ...]`` become symbolic.
        static: other keyword arguments, baked into the capture.

    Raises:
        UnsupportedModelError: the model contains something that cannot be treated soundly; says what and where.
        InputError: the example inputs do not fit together.
    """
    from depthpass.capture.attention import signature_names
    from depthpass.capture.export import trace
    from depthpass.capture.outline import outline
    from depthpass.capture.screen import screen
    from depthpass.capture.structure import structural_copy

    screen(model, static)
    if "use_cache" in signature_names(type(model).forward):
        static = {**static, "use_cache": False}
    private = structural_copy(model)
    for module in private.modules():
        # Some models only look at their config, whatever their forward is told.
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    asked: list[torch.Tensor] = []
    return replace(outline(trace(private, tensors, static, asked)), asked=tuple(asked))
