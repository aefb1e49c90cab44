"""Whether blocks can be cut, modulated and adapted as a program asks, before any of it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from depthpass.ir.program import Op, Program
from depthpass.lowered.ops import of_one_stream
from depthpass_lowering.visits.cut import cut_for
from depthpass_lowering.visits.parts import graph_of
from depthpass_lowering.visits.running import updates

if TYPE_CHECKING:
    from depthpass.capture import Block


def asks_of_blocks(program: Program) -> tuple[Op, ...]:
    """The ops that need more of a block than to run as a whole."""
    return tuple(
        o for o in program
        if o.kind == "ffn"
        or (o.kind == "block" and (o["part"] != "whole" or o["modulate"] or o["lora"] or not of_one_stream(o)))
    )


def check_visits(ops: Sequence[Op], blocks: Sequence[Block], module: Callable[[str], nn.Module]) -> None:
    """Refuse ops that the captured blocks cannot run.

    Args:
        ops: of :func:`asks_of_blocks`.
        module: new parameters by name.

    Raises:
        LoweringError: naming the block and what was expected of it.
    """
    for o in ops:
        template = blocks[o["index"]].template
        graph = graph_of(template, o)
        if o.kind == "ffn":
            continue
        cut_for(o, graph)
        if o["lora"]:
            updates(o, module(o["lora"]), template.params)
