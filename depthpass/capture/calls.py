"""Functions that appear in captured graphs in place of capture-time ops. Each asks the running visit."""

from __future__ import annotations

from typing import Protocol

import torch


class Visit(Protocol):
    """What a captured graph may ask of the visit that runs it."""

    def attend(self, site: int, q, k, v, sinks) -> torch.Tensor:
        """Attention call number ``site``: q ``[B, H, C, D]``, k, v of the same tokens -> ``[B, C, H, Dv]``."""
        ...

    def submodule(self, path: str, *args: torch.Tensor) -> torch.Tensor:
        """Call a stock submodule of the block (token-local by contract: mixture-of-experts layers)."""
        ...

    def modulate(self, place: str, x: torch.Tensor) -> torch.Tensor:
        """Scale what a residual branch reads (``read_attention``, ``read_mlp``) or adds (``gate_attention``, ``gate_mlp``)."""
        ...

    def columns(self, device: torch.device) -> torch.Tensor:
        """Column of each token of this call in its row, ``[tokens]``."""
        ...


def attend(visit: Visit, site: int, q, k, v, sinks=None):
    return visit.attend(site, q, k, v, sinks)


def submodule(visit: Visit, path: str, *args):
    return visit.submodule(path, *args)


def modulate(visit: Visit, place: str, x):
    return visit.modulate(place, x)


def columns(visit: Visit, device):
    return visit.columns(device)
