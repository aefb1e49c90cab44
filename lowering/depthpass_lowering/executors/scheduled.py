"""L3: serial regions with a hand-scheduled backward pass.

Forward: keys and values go into static buffers in place. Backward: a reverse loop computes activation gradients only;
key and value gradients are accumulated in place, and every weight gradient is one product after the loop. The result
equals the eager level up to the order of summation.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from depthpass.capture.direct import direct
from depthpass.errors import LoweringError
from depthpass.log import fallback
from depthpass.lowered.build import unschedulable_ops
from depthpass.lowered.program import LoweredRegion
from depthpass.schedule.regions import Region
from depthpass_lowering.executors.base import Executor, note
from depthpass_lowering.executors.chunk_loop import Job, recomputes, sunk_graph
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.executors.region_function import as_one_node, carries, uncarried
from depthpass_lowering.executors.stand_ins import region_parameters
from depthpass_lowering.executors.transforms import unschedulable


class Scheduled(Executor):
    """Serial regions by the hand-written schedule where it is legal.

    Attributes:
        strict: whether what it cannot run is an error instead of left to the eager level.
        compiled: whether chunks run compiled code: then every chunk is given masks in one shape, and weights are packed
            however short the row is.
    """

    name = "scheduled"
    compiled = False

    def __init__(self, strict: bool = True):
        self.strict = strict

    def level(self, run: Run, region: Region) -> tuple[str, str | None]:
        reason = self.refuse(run, region)
        if reason is not None and self.strict:
            raise LoweringError(
                f"lowering {self.name!r} cannot run this call: {reason}. Use lowering='auto' to fall back to 'eager'."
            )
        if reason is not None:
            blocks = ", ".join(str(o["index"]) for o in region.calls)
            fallback(f"the token loop of blocks {blocks} runs op by op (level 'eager'), because {reason}", asked=self.compiled)
        elif run.context.count <= region.size and not (self.compiled and torch.is_grad_enabled()):
            # Nothing recurs: the stock graphs as they are, to their bits; without gradients the eager level writes in place, too.
            reason = "one chunk" if torch.is_grad_enabled() else "one chunk without gradients"
        return (self.name, None) if reason is None else ("eager", reason)

    def region(self, run: Run, region: LoweredRegion) -> dict[str, Tensor]:
        if region.level == "eager":
            return super().region(run, region)
        inputs = run.streams(region)
        note(run, region, region.level, region.reason, recomputed=recomputes(run.host, region), padded=self.padding(run, region))
        if not torch.is_grad_enabled():
            job = Job(self, run, region, inputs, {})
            streams = job.loop(inputs)
            job.store()
            return streams
        return self.trained(run, region, inputs)

    def padding(self, run: Run, region: LoweredRegion) -> int:
        """Columns of nobody that are put behind the rows."""
        return 0

    def trained(self, run: Run, region: LoweredRegion, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The streams that a region hands out, as one node of the outer graph."""
        if run.hidden.is_cuda and not self.strict:
            _warn_slow()
        return as_one_node(Job(self, run, region, inputs, region_parameters(region, run.host)), inputs)

    def chunk_runner(self, job: Job, tokens: int) -> Callable[..., Sequence[Tensor]]:
        """What runs the graph of a chunk of so many tokens."""
        return functools.partial(direct(sunk_graph(job.graph)), job.sink)

    def refuse(self, run: Run, region: Region) -> str | None:
        """Why a region cannot be hand-scheduled in this call, or None."""
        if reason := unschedulable(run.hidden) or unschedulable_ops(run.program, region):
            return reason
        grad, host = torch.is_grad_enabled(), run.host
        if grad:
            if carries(run) and (reason := uncarried(run, region)):
                return reason
            used = {i for o in region.visits for i in host.side_inputs_of(o["index"])}
            if any(run.context.side_inputs[i].requires_grad for i in used):
                return "a side input of the blocks is trained"
        for o in region.calls:
            if reason := host.refuses_schedule(o["index"]):
                return reason
            if grad and any(s.dropout for s in host.sites_of(o["index"])):
                return "attention dropout is on"
        return None


@functools.cache
def _warn_slow() -> None:
    """Once per process: on a GPU the loop waits for Python."""
    warnings.warn(
        "lowering='auto' trains a token loop on this GPU kernel by kernel, which on an H100 at the Llama-3.2-1B shape took 7 to "
        "15 times as long as lowering='cudagraph' (docs/benchmarks.md). Use dp.transform(..., lowering='cudagraph') where rows "
        "have a few lengths; lowering='scheduled' runs as now, without this warning.", UserWarning, stacklevel=2,
    )
