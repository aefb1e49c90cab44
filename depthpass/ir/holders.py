"""Modules that hold the new parameters of token-local ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from depthpass.ir.definitions import OpDef, Param


class Held(nn.Module):
    """The parameters of a token-local op; applied to its streams it is the op."""

    def __init__(self, meaning: Callable[..., Tensor], parameters: Mapping[str, Param], like: Tensor):
        super().__init__()
        self.meaning, self.names = meaning, tuple(parameters)
        for name, p in parameters.items():
            start = like.new_empty(p.shape)
            if not start.is_meta:
                start.fill_(p.fill) if p.fill is not None else start.normal_(0.0, p.init) if p.init else start.zero_()
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, *streams: Tensor, **constants: Any) -> Tensor:
        return self.meaning(*streams, **constants, **{name: getattr(self, name) for name in self.names})


def holder_of(definition: OpDef, declared: Mapping[str, Param], like: Tensor) -> nn.Module:
    """The module of a token-local op's parameters, initialised.

    Args:
        declared: by their names inside the module.
        like: gives dtype and device.
    """
    if definition.holder is not None:
        return definition.holder(declared, like)
    assert definition.meaning is not None, "an op without a meaning has no module"
    with torch.no_grad():
        return Held(definition.computed, declared, like.detach())
