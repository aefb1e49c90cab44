"""What a transformed model looks like at a prompt: what it is and what to ask it; ``print`` shows its modules."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from depthpass.prompt import WIDTH, as_html


class Shown:
    """Mixin in front of a module: ``repr`` is a card of a few lines, ``str`` the tree of modules."""

    def card(self) -> str:
        """The card."""
        raise NotImplementedError

    def __str__(self) -> str:
        return nn.Module.__repr__(self)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        # As part of another module's tree (PEFT's wrappers) the tree goes on.
        return str(self) if sys._getframe(1).f_code is nn.Module.__repr__.__code__ else self.card()

    def _repr_html_(self) -> str:
        return as_html(self.card())


def model_card(model: Any, name: str) -> str:
    """The card of a transformed model.

    Args:
        name: of its class.
    """
    runtime = model._depth
    program, plan = runtime.program, runtime.plan
    sizes = {id(p): p.numel() for p in model.parameters()}
    new = sum(p.numel() for p in model.depth.parameters())
    serial = [(r.chunk, len(r.visits)) for r in plan.schedule.serial_regions]
    loops = "; ".join(f"{visits} of them token by token in chunks of {chunk}" for chunk, visits in serial)
    first = next(model.parameters())
    dtype = str(first.dtype).removeprefix("torch.")
    rows = [
        ("spec", ", ".join(p.describe() for p in plan.passes)),
        ("visits", f"{len(program.visits)} of {program.blocks} blocks" + (f", {loops}" if loops else "")),
        ("parameters", f"{sum(sizes.values()):,}, of them {new:,} new"),
        ("weights", f"{dtype} on {first.device}, in {'training' if model.training else 'eval'} mode"),
        ("more", "print(model): modules; model.depth_program: what runs; dp.report(model): depth and cost; dp.restore(model)"),
    ]
    return "\n".join(line[:WIDTH] for line in [f"{name}, transformed by depthpass", *(f"  {k:<12}{v}" for k, v in rows)])
