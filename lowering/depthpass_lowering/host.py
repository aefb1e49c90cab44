"""What the lowering asks of the modules a program runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from depthpass.capture.captured import Capture, Site, Template

if TYPE_CHECKING:
    from depthpass_lowering.executors.losses import Pool
    from depthpass_lowering.visits.parts import FfnVisit
    from depthpass_lowering.visits.running import RunningVisit
    from depthpass_lowering.visits.stacked import StackedVisit


class Host(Protocol):
    """The stock modules a program runs on; implemented by the Hugging Face layer and by the compiler backend.

    Attributes:
        captured: the capture that its blocks run on.
        adapts: whether it can run visits with operands of their own (LoRA, modulation).
        training: whether the model trains: noise is drawn, balanced routers move.
        style: whose attention it runs: ``sdpa``, or a stock attention function.
        ratios: shares of tokens by route label that replace those of the program.
        pool: where the runs of one call add up their losses.
    """

    captured: Capture
    adapts: bool
    training: bool
    style: str
    ratios: Mapping[str, float]
    pool: Pool

    def block(
        self, index: int, visit: RunningVisit | StackedVisit | FfnVisit, hidden: Tensor, side_inputs: Sequence[Tensor]
    ) -> Tensor: ...

    def side_inputs_of(self, index: int) -> tuple[int, ...]: ...

    def sites_of(self, index: int) -> tuple[Site, ...]: ...

    def norm(self, hidden: Tensor) -> Tensor: ...

    def logits(self, normed: Tensor) -> Tensor:
        """The stock head of a normed stream, of any of the tokens."""
        ...

    def module(self, name: str) -> nn.Module:
        """A new module of the program, by its name under ``depth.``."""
        ...

    def submodule(self, index: int, path: str, *args: Tensor) -> Tensor: ...

    def bound(self, index: int) -> tuple[Template, list[Tensor]]:
        """Template of a block and the tensors it is bound to, in the order of the graph's inputs."""
        ...

    def submodules_of(self, index: int) -> tuple[str, ...]:
        """Paths of the stock submodules that a block's graph calls."""
        ...

    def stock_module(self, index: int, path: str) -> nn.Module: ...

    def refuses_schedule(self, index: int) -> str | None:
        """Why a block must run as a module (hooks), or None."""
        ...

    def recomputes(self, index: int) -> bool:
        """Whether a block's activations are to be computed again in the backward pass (gradient checkpointing)."""
        ...

    def attention(self, index: int, site: Site, q, k, v, mask, causal: bool, sinks) -> Tensor: ...
