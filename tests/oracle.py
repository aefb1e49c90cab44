"""Naive oracles: the stock model token by token, with hooks on its blocks. Slow, and obviously right.

Nothing here uses depthpass: keys and values live in transformers' own cache, one row at a time, without padding.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import zoo
from torch import Tensor, nn
from transformers import DynamicCache


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a stock model."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def random_bridges(width: int, bridges: list[tuple[int, int]], rank: int, seed: int = 1, dtype=torch.float64) -> dict:
    """Random non-zero bridge parameters under their public names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).mul_(0.3).requires_grad_()

    seen = {}
    for s, d in bridges:
        name = f"turboconn.s{s}_d{d}"
        seen[f"{name}.down.weight"], seen[f"{name}.down.bias"] = normal(rank, width), normal(rank)
        seen[f"{name}.up.weight"], seen[f"{name}.up.bias"] = normal(width, rank), normal(width)
    return seen


def turboconn_row(
    model: nn.Module, ids: Tensor, positions: Tensor, bridges: list[tuple[int, int]], group: int, gain: float, p: dict
) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of one row with TurboConn bridges, one token at a time.

    h_d[i] += sum_b Up_b(gain * c_b[i - group]),  c_b[i] = Down_b(h_s[i])   (arXiv 2602.17993)
    """
    captured: dict[tuple[int, int], list[Tensor]] = {b: [] for b in bridges}
    step = 0

    def hook(block: int):
        def run(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            for s, d in bridges:
                if d == block and step - group >= 0:
                    name, c = f"turboconn.s{s}_d{d}", captured[s, d][step - group]
                    h = h + (gain * c) @ p[f"{name}.up.weight"].T + p[f"{name}.up.bias"]
            for s, d in bridges:
                if s == block:
                    name = f"turboconn.s{s}_d{d}"
                    captured[s, d].append(h @ p[f"{name}.down.weight"].T + p[f"{name}.down.bias"])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return run

    with hooked(model, hook):
        cache, logits = DynamicCache(config=model.config), []
        for step in range(len(ids)):
            out = model(
                input_ids=ids[None, step : step + 1], position_ids=positions[None, step : step + 1],
                **{zoo.CACHE: cache}, use_cache=True,
            )
            logits.append(out.logits[0, -1])
    return torch.stack(logits)


@contextmanager
def hooked(model: nn.Module, make):
    """Forward hooks ``make(i)`` on every block for the time of a ``with``."""
    handles = [b.register_forward_hook(make(i)) for i, b in enumerate(blocks_of(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
