"""Visits of a part of a block: its attention without the feed-forward network, and the network by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from depthpass.capture.captured import Template
from depthpass.errors import LoweringError
from depthpass.ir.program import Op
from depthpass_lowering.fx_passes.halves import Halves, halves
from depthpass_lowering.fx_passes.modulate import modulated
from depthpass_lowering.host import Host


def graph_of(template: Template, o: Op) -> fx.GraphModule:
    """The graph that an op runs of a block's template: all of it, with its branches modulated, or one half.

    Raises:
        LoweringError: the block is not made of residual branches as that needs.
    """
    if o.kind == "block" and o["modulate"] is not None:
        try:
            return modulated(template)
        except LoweringError as error:
            raise LoweringError(f"block {o['index']} cannot be modulated (timestep, scales): {error} Leave this block out of the "
                                "modulated visits.") from None
    if o.kind == "block" and o["part"] == "whole":
        return template.graph
    both = _halves_of(template, o)
    return both.attention if o.kind == "block" else both.ffn


def beside(template: Template, o: Op) -> bool:
    """Whether the feed-forward branch of an op's block reads the block's input, as its attention does."""
    return _halves_of(template, o).beside


def _halves_of(template: Template, o: Op) -> Halves:
    try:
        return halves(template)
    except LoweringError as error:
        raise LoweringError(f"block {o['index']} cannot be cut between its attention and its feed-forward network: {error} Leave "
                            "this block out.") from None


class FfnVisit:
    """Runs the feed-forward branch of a block, as a visit runs the block: through its module, so that hooks and sharding
    see it.

    Args:
        read: what the branch reads, ``[batch, tokens, width]``.
    """

    def __init__(self, op: Op, host: Host, read: Tensor):
        self.op, self.host, self.index, self.read = op, host, op["index"], read

    def run(self, template: Template, hidden: Tensor, side_inputs: Sequence[Tensor], params, runner=None) -> Tensor:
        graph = graph_of(template, self.op)
        return (runner or (lambda graph: graph))(graph)(self, hidden, self.read.to(hidden.device), *params)

    def adapt(self, names: Sequence[str], tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def submodule(self, path: str, *args: Tensor) -> Tensor:
        return self.host.submodule(self.index, path, *args)

    def columns(self, device: torch.device) -> Tensor:
        raise AssertionError("a feed-forward network does not know its column")
