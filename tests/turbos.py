"""Stock and transformed models whose weights are large enough that every block and every bridge moves the output."""

from __future__ import annotations

import functools

import torch
import zoo
from torch import nn

import depthpass as dp

BRIDGES = [(2, 0), (2, 1)]
GROUP = 3


def enliven(module: nn.Module, seed: int = 0, std: float = 0.25, least: int = 2) -> nn.Module:
    """Random values of a size that matters, for every parameter of at least so many dimensions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() >= least:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return module


def spec(**overrides) -> dp.TurboConn:
    return dp.TurboConn(**{"bridges": BRIDGES, "group": GROUP, "rank": 6, **overrides})


def turbo_of(stock: nn.Module, **overrides) -> nn.Module:
    """A transformed model with random bridges."""
    turbo = dp.transform(stock, spec(**overrides))
    enliven(turbo.depth, seed=1, least=1)
    return turbo


def stock_of(name: str, layers: int = 3, **overrides) -> nn.Module:
    return enliven(zoo.model(name, layers, **overrides))


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A stock model and its transformed one: the same objects in every test, so do not change them."""
    stock = stock_of(name)
    return stock, turbo_of(stock)


def transformed(name: str, spec, dtype: torch.dtype = torch.float64, **overrides) -> nn.Module:
    """A transformed model of an architecture, in which every parameter moves the output."""
    model = dp.transform(enliven(zoo.model(name, dtype=dtype, **overrides), std=0.2), spec)
    enliven(model.depth, seed=1, least=1)
    return model
