"""A decoded token as one CUDA graph: what the compiled step launches, recorded once for the memory that it reads.

A compiled step is some hundred kernels of a few microseconds each; launched one by one they take several times as long as
they run (docs/benchmarks.md, H100).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOST = 4
"""Recordings kept per step: one for each set of rooms, that is for each cache in use."""

Run = Callable[..., Sequence[Tensor]]


class GraphedStep:
    """Calls a compiled step ``(*moving, *fixed) -> results`` by replaying a recording of it.

    Args:
        run: the compiled step; it may be run twice with the same inputs, since it writes one column of its rooms.
        moving: how many of its first inputs change from call to call; they are copied into memory of the recording. The rest
            (rooms, weights) is read and written where it lies.
    """

    def __init__(self, run: Run, moving: int):
        self.run, self.moving = run, moving
        self.kept: OrderedDict[tuple, Recording] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        key = tuple(t.data_ptr() for t in inputs[self.moving :])
        held = self.kept.get(key)
        if held is None:
            while len(self.kept) >= MOST:
                self.kept.popitem(last=False)
            held = self.kept[key] = Recording(self.run, inputs[: self.moving], inputs[self.moving :])
        self.kept.move_to_end(key)
        return held(inputs[: self.moving])


class Recording:
    """One recording of a step."""

    def __init__(self, run: Run, moving: Sequence[Tensor], fixed: Sequence[Tensor]):
        self.static = [t.clone() for t in moving]
        self.replay, self.results = record(lambda: run(*self.static, *fixed))

    def __call__(self, moving: Sequence[Tensor]) -> list[Tensor]:
        for held, t in zip(self.static, moving, strict=True):
            held.copy_(t)
        self.replay()
        # The memory of a replay is written again by the next one.
        return [t.clone() for t in self.results]


def obstacle(device: torch.device) -> str | None:
    """Why a step cannot be recorded there, or None."""
    return None if device.type == "cuda" else f"the model is on {device.type}, and CUDA graphs need a CUDA device"


def record(run: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """What replays the kernels of ``run``, and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is made on first use (handles, workspaces) must not be recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results
