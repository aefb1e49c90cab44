"""Shares of tokens that routes take, set at run time: nothing is traced, transformed or trained again."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback

from depthpass.annotations import checked
from depthpass.errors import InputError, SpecError
from depthpass.hf.switching.switch import transformed
from depthpass.ir.shares import Ratios, checked_ratios
from depthpass.prompt import at_prompt


def set_ratios(model: nn.Module, ratios: Ratios | None) -> None:
    """Let the routes of a transformed model take other shares of the tokens, from the next call on.

    Args:
        model: a transformed model, also inside PEFT or a distributed wrapper.
        ratios: shares by the routes' labels, or one for each label in program order (``model.depth_program.labels``);
            labels left out, and None for all, go back to what the program says. A top-k route takes a share in [0, 1],
            0 drops the step. Thresholds and choices decide by themselves: 1 lets them, 0 drops the step.

    Raises:
        SpecError: not a transformed model, a program without such routes.
        InputError: an unknown label, a share out of range, or one above that of the route it chooses from.
    """
    runtime = transformed(model, "set_ratios")._depth
    runtime.ratios = {} if ratios is None else checked_ratios(runtime.program, ratios)


@checked("capacity_warmup")
def capacity_warmup(model: nn.Module, progress: float) -> None:
    """Set the shares of all top-k routes between 1 and the program's own, along half a cosine.

    Args:
        model: a transformed model with top-k routes.
        progress: 0 = every token takes every step, 1 = the program's own shares.

    Raises:
        InputError: progress out of [0, 1].
        SpecError: no top-k route.
    """
    if not 0 <= progress <= 1:
        raise InputError(f"progress: expected a number between 0 and 1, got {progress!r}.")
    program = transformed(model, "capacity_warmup").depth_program
    own = {o["label"]: o["capacity"] for o in program if o.kind == "route" and o["rule"] == "topk" and o["label"]}
    if not own:
        raise SpecError("capacity_warmup: expected a program with top-k routes, got one without. Use mode='topk'.")
    left = 0.5 * (1 + math.cos(math.pi * progress))
    set_ratios(model, None if progress == 1 else {k: c + (1 - c) * left for k, c in own.items()})


@at_prompt
class CapacityWarmup(TrainerCallback):
    """Trainer callback: start with all tokens and reach the program's own capacities after ``steps`` steps.

    Args:
        steps: of the optimizer, at least 1.
    """

    @checked("CapacityWarmup")
    def __init__(self, steps: int):
        if steps < 1:
            raise InputError(f"steps: expected an integer of at least 1, got {steps!r}.")
        self.steps = steps

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        capacity_warmup(model, min(1.0, state.global_step / self.steps))
