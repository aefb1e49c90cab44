"""The naive way: call the stock model once per group with its own cache, bridges added by hooks.

This is what a fork of a model's code amounts to: every block runs in every group, keys and values grow by
concatenation, the head runs per group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from depthpass.hf.caches.cache import STOCK_NAME


class NaiveGroups:
    """Grouped forward over a stock Llama-shaped model.

    Args:
        model: the stock model.
        bridges: ``(source, destination, down, up)`` with nn.Linear maps.
        group: tokens per group.
        gain: factor of what a bridge carries.
    """

    def __init__(self, model: nn.Module, bridges: list[tuple[int, int, nn.Linear, nn.Linear]], group: int, gain: float = 1.0):
        self.model, self.bridges, self.group, self.gain = model, bridges, group, gain
        self.previous: list[Tensor | None] = []
        self.current: list[Tensor | None] = []

    def _hook(self, block: int):
        def run(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            for i, (_, d, _, up) in enumerate(self.bridges):
                if d == block and self.previous[i] is not None:
                    h = h + up(self.previous[i][:, : h.shape[1]])
            for i, (s, _, down, _) in enumerate(self.bridges):
                if s == block:
                    self.current[i] = self.gain * down(h)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return run

    def logits(self, ids: Tensor) -> Tensor:
        handles = [b.register_forward_hook(self._hook(i)) for i, b in enumerate(self.model.model.layers)]
        self.previous = [None] * len(self.bridges)
        try:
            cache, parts = DynamicCache(config=self.model.config), []
            for a in range(0, ids.shape[1], self.group):
                self.current = [None] * len(self.bridges)
                parts.append(
                    self.model(input_ids=ids[:, a : a + self.group], **{STOCK_NAME: cache}, use_cache=True).logits
                )
                self.previous = self.current
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(parts, 1)
