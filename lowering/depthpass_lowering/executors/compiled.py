"""L1 on top of L3: the hand-scheduled token loop with its chunks compiled by Inductor.

The graph of a chunk is cut at its attention calls. A segment reaches from one attention to the next, across blocks and
bridges; segments with equal graphs are compiled once, whatever block, region or model they belong to.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from depthpass_lowering.executors.chunk_loop import Job
from depthpass_lowering.executors.scheduled import Scheduled
from depthpass_lowering.fx_passes.region import ChunkGraph
from depthpass_lowering.fx_passes.sink import sink_bridges_pass
from depthpass_lowering.memo import Once
from depthpass_lowering.products.joint import Segment
from depthpass_lowering.products.segments import Segmented, compile_segment
from depthpass_lowering.products.sink import Sink

MOST_SEGMENTS = 5
"""Different segments of one chunk above which bridges are taken out of them: blocks that differ by their bridges alone would
each be compiled for themselves."""

_SEGMENTS: weakref.WeakValueDictionary[tuple, Segment] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class CompiledChunk:
    """A chunk's graph cut at its calls, each segment compiled on first use.

    Attributes:
        apart: whether bridges are calls of their own instead of parts of segments.
    """

    segmented: Segmented
    apart: bool

    @property
    def segments(self) -> set[Segment]:
        return {what for what, *_ in self.segmented.steps if isinstance(what, Segment)}

    def __call__(self, sink: Sink, *args):
        return self.segmented(*((sink,) if self.apart else ()), *args, lead=(sink,))


@Once
def compiled_graph(graph: ChunkGraph) -> CompiledChunk:
    """What runs a chunk's graph."""
    loop = graph.distributed.loop
    whole = CompiledChunk(Segmented(loop, shared_segment, graph.opaque), False)
    if len(whole.segments) <= MOST_SEGMENTS:
        return whole
    nodes = [n for n in loop.graph.nodes if n.op == "placeholder"]
    params = nodes[len(nodes) - len(graph.params) - len(graph.distributed.axes) :]
    bridges = {n for n, p in zip(params, graph.params) if isinstance(p.owner, str)}
    return CompiledChunk(Segmented(sink_bridges_pass(loop, bridges), shared_segment, graph.opaque + 1), True)


@Once
def compiled_whole(gm: fx.GraphModule) -> Segmented:
    """A captured graph that runs over all tokens at once, its segments compiled for any number of rows and tokens."""
    # Dropout draws what it draws on the other levels.
    options = {"fallback_random": True}
    return Segmented(gm, functools.partial(compile_segment, backend="inductor", options=options))


def shared_segment(gm: fx.GraphModule) -> Segment:
    """The segment of a graph; one for all graphs of the same structure."""
    key = structure(gm)
    segment = _SEGMENTS.get(key)
    if segment is None:
        segment = _SEGMENTS[key] = Segment(gm)
    return segment


def structure(gm: fx.GraphModule) -> tuple:
    """What a graph computes, without the names in it."""
    number = {n: i for i, n in enumerate(gm.graph.nodes)}

    def plain(value: object) -> object:
        if isinstance(value, fx.Node):
            return "node", number[value]
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        if isinstance(value, dict):
            return tuple((k, plain(v)) for k, v in value.items())
        # 1, 1.0 and True are equal, and are not the same argument.
        return type(value), value

    def target(n: fx.Node) -> object:
        if n.op == "get_attr":
            return id(getattr(gm, str(n.target)))
        return None if n.op in ("placeholder", "output") else n.target

    return tuple((n.op, target(n), plain(n.args), plain(n.kwargs)) for n in gm.graph.nodes)


class Compiled(Scheduled):
    """As :class:`~depthpass_lowering.executors.scheduled.Scheduled`, with compiled chunks."""

    name, compiled = "inductor", True

    def chunk_runner(self, job: Job, tokens: int) -> Callable[..., Sequence[Tensor]]:
        # The last chunk of a row may be short: it is not worth a compilation of its own.
        if job.run.context.count > job.region.size != tokens:
            return super().chunk_runner(job, tokens)
        return functools.partial(compiled_graph(job.graph), job.sink)
