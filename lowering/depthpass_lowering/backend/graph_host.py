"""Runs program ops on a captured Dynamo graph: parameters come as arguments of the call, not from modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from depthpass.capture.captured import Capture, Part, Site, Template
from depthpass.errors import LoweringError
from depthpass_lowering.executors.losses import Pool
from depthpass_lowering.visits.attention import sdpa_attention

Runner = Callable[[fx.GraphModule], Callable]
"""Gives the callable to run a captured graph with: the graph itself, or its compiled segments."""


class GraphHost:
    """One call's :class:`depthpass_lowering.host.Host`.

    It scores: what only a transformed model does (visits with operands of their own, losses) is refused before.

    Args:
        captured: the capture.
        values: parameters and buffers of the model by full name.
        depth: the module that holds the new parameters.
        runner: how graphs are run; None = as they are.
        scheduled: whether token loops may run on chunk graphs instead of through ``runner``.
    """

    adapts, training, style = False, False, "sdpa"

    def __init__(
        self, captured: Capture, values: Mapping[str, Tensor], depth: nn.Module, runner: Runner | None, scheduled: bool = True
    ):
        self.captured, self.values, self.depth = captured, values, depth
        self.scheduled, self.runner = scheduled, runner or (lambda graph: graph)
        self.extras: Sequence[Tensor] = ()
        self.ratios: Mapping[str, float] = {}
        self.pool = Pool()

    def part(self, part: Part, inputs: Mapping[str, Tensor], *streams: Tensor, visit=None):
        """Run the prologue, norm or head."""
        params = [part.constants[p] if p in part.constants else self.values[p] for p in part.params]
        extras = [self.extras[e] for e in part.extras]
        return self.runner(part.graph)(visit, *streams, *extras, *(inputs[i] for i in part.inputs), *params)

    def block(self, index: int, visit, hidden: Tensor, side_inputs: Sequence[Tensor]) -> Tensor:
        template, params = self.bound(index)
        return visit.run(template, hidden, side_inputs, params, self.runner)

    def bound(self, index: int) -> tuple[Template, list[Tensor]]:
        block = self.captured.blocks[index]
        prefix = f"{self.captured.layers}.{index}."
        return block.template, [
            block.constants[p] if p in block.constants else self.values[p[1:] if p.startswith("/") else prefix + p]
            for p in block.template.params
        ]

    def refuses_schedule(self, index: int) -> str | None:
        return None if self.scheduled else "another inner compiler than inductor runs the blocks"

    def recomputes(self, index: int) -> bool:
        return False

    def side_inputs_of(self, index: int) -> tuple[int, ...]:
        return self.captured.blocks[index].side_inputs

    def sites_of(self, index: int) -> tuple[Site, ...]:
        return self.captured.blocks[index].template.sites

    def norm(self, hidden: Tensor) -> Tensor:
        return self.part(self.captured.norm, {}, hidden)

    def logits(self, normed: Tensor) -> Tensor:
        raise LoweringError("exit criteria of logits (kl, entropy) run on transformed models only. Use dp.transform(model, "
                            "spec) instead of the torch.compile backend, or criterion='state'.")

    def module(self, name: str) -> nn.Module:
        return self.depth.get_submodule(name)

    def submodules_of(self, index: int) -> tuple[str, ...]:
        return ()

    def stock_module(self, index: int, path: str) -> nn.Module:
        raise LoweringError(f"block {index}: a graph of torch.compile has no module {path!r} to call.")

    def submodule(self, index: int, path: str, *args: Tensor) -> Tensor:
        return self.stock_module(index, path)(*args)

    def attention(self, index: int, site: Site, q, k, v, mask, causal: bool, sinks) -> Tensor:
        return sdpa_attention(q, k, v, mask, causal, site.scale, site.dropout)


class Columns:
    """Answers the prologue's question for token indices."""

    def __init__(self, count: int):
        self.count = count

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.count, device=device)
