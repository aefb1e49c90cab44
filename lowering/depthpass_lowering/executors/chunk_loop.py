"""The token loop of a serial region, scheduled by hand: chunks as graphs, keys in place, a backward loop of its own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from depthpass.capture.captured import Site
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, writes_slot
from depthpass.lowered.program import LoweredRegion
from depthpass.schedule.regions import Region
from depthpass_lowering.executors.dropout import RandomState, draws
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.executors.stand_ins import SunkHost, own_scopes
from depthpass_lowering.executors.taped import TapedChunks, taped_graph
from depthpass_lowering.fx_passes.region import ChunkGraph, chunk_graph
from depthpass_lowering.fx_passes.sink import sink_pass
from depthpass_lowering.host import Host
from depthpass_lowering.memo import Once
from depthpass_lowering.products.packed import LEAST_USES
from depthpass_lowering.products.sink import Sink
from depthpass_lowering.state.buffers import Buffer, Use
from depthpass_lowering.state.slots import Slot, Span, push_delay, read_delay, read_group, spans
from depthpass_lowering.visits.attention import Masks
from depthpass_lowering.visits.running import RunningVisit

_GRAPHS: weakref.WeakKeyDictionary[Region, dict[tuple, ChunkGraph]] = weakref.WeakKeyDictionary()


def graph_of(run: Run, region: LoweredRegion) -> ChunkGraph:
    """The graph of one chunk of a region, made once for the blocks it runs on."""
    templates = tuple(id(run.host.bound(o["index"])[0]) for o in region.calls)
    kinds = tuple(type(run.host.module(name)) for o in region.program_ops for name in own_scopes(o))
    key = id(run.program), templates, kinds, region.outputs  # the graph keeps program and templates: their ids stay theirs
    kept = _GRAPHS.setdefault(region.scheduled, {})
    if key not in kept:
        kept[key] = chunk_graph(region, run.program, run.types, run.host)
    return kept[key]


@Once
def sunk_graph(graph: ChunkGraph) -> fx.GraphModule:
    """A chunk's graph with sunk weight gradients."""
    return sink_pass(graph.distributed.loop)


def recomputes(host: Host, region: LoweredRegion) -> bool:
    """Whether the activations of a region are to be computed again in the backward pass."""
    return torch.is_grad_enabled() and any(host.recomputes(o["index"]) for o in region.calls)


class ChunkRunner(Protocol):
    """The executor of a job, as far as its loop knows it."""

    compiled: bool

    def chunk_runner(self, job: Job, tokens: int) -> Callable[..., Sequence[Tensor]]: ...


class Job:
    """One region of one forward pass: its loop, buffers and sink.

    Attributes:
        graph: one chunk of the loop.
        recompute: whether activations are dropped and computed again in the backward pass, chunk by chunk.
        draws: whether a chunk draws random numbers, which it then has to draw again.
    """

    def __init__(
        self, executor: ChunkRunner, run: Run, region: LoweredRegion, inputs: Mapping[str, Tensor], parameters: dict[int, Tensor]
    ):
        self.executor, self.run, self.region, self.names = executor, run, region, list(inputs)
        self.parameters = parameters
        self.graph = graph_of(run, region)
        self.recompute = recomputes(run.host, region)
        self.draws = self.recompute and any(draws(run.host, o["index"]) for o in region.calls)
        uses = -(-run.context.count // region.size)
        self.sink = Sink(max(uses, LEAST_USES) if executor.compiled else uses)
        self.buffers: dict[int, list[Buffer]] = {}
        self.weights: Sequence[Tensor] = ()  # what its last loop has read
        self.taped: TapedChunks | None = None
        self.chain: Tensor | None = None  # of its last chunk, through which all chunks go back

    @property
    def wanted(self) -> tuple[str, ...]:
        return self.region.outputs

    def loop(self, inputs: Mapping[str, Tensor], leaves: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
        """The chunk loop; ``leaves`` replaces parameters by their detached stand-ins."""
        self.sink.leaves = {id(t) for t in (leaves or {}).values()}
        loop = Loop(self, SunkHost(self.run.host, self.sink, leaves or {}))
        self.weights = loop.params
        return loop.over(inputs)

    def slot(self, number: int, sites: Sequence[Site]) -> list[Buffer]:
        if number not in self.buffers:
            before, c = self.run.state.slots.get(number), self.run.context
            self.buffers[number] = [
                Buffer(
                    None if before is None else (before.keys[i], before.values[i]), c.start + c.count,
                    0 if before is None else before.first,
                )
                for i in range(len(sites))
            ]
        return self.buffers[number]

    def release(self) -> None:
        """Let go of what only the forward loop needs: graph-bearing tensors that would keep the graph alive."""
        self.sink.products.forget()
        self.chain, self.weights = None, ()
        self.forget_tokens()
        for line in self.region.lines:
            self.run.state.lines.pop(line.name, None)
        if self.taped is not None:
            self.taped.release()
            self.taped = None
            del self.run  # chunks that run again keep their visits, these the job, and the run holds what the region hands out

    def forget_tokens(self) -> None:
        """Begin a new chain of uses of every buffer."""
        for buffers in self.buffers.values():
            for buffer in buffers:
                buffer.token = None

    def store(self) -> None:
        """Hand the buffers over as slots, for a later call or region."""
        rings = {o["slot"]: self.run.ring(o) for o in self.region.visits}
        for number, buffers in self.buffers.items():
            keys, values = zip(*(b.held() for b in buffers), strict=True)
            slot = Slot(keys, values)
            ring = rings.get(number)
            self.run.state.slots[number] = slot if ring is None else slot.last(ring)


class Loop:
    """The chunk loop of a job: runs visits on buffers and answers a chunk's graph.

    Attributes:
        lines: the delay lines that the running chunk reads.
        span: the running chunk.
    """

    def __init__(self, job: Job, host: SunkHost):
        self.job, self.host, self.run = job, host, job.run
        self.lines: dict[str, Tensor] = {}
        self.span: Span | None = None
        self.params = [host.parameter(p) for p in job.graph.params]

    def over(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The streams that the region hands out, over all tokens."""
        job, graph, run, c = self.job, self.job.graph, self.run, self.run.context
        cut = spans(c.start, c.count, c.valid, None, job.region.size, job.region.groups)
        sizes = [span.count for span in cut]
        streams = [inputs[name].split(sizes, 1) for name in graph.streams]
        tables = [self._pieces(c.side_inputs[i], c.side_axes[i], sizes) for i in graph.side_inputs]
        known = self._known(sizes)
        done: dict[str, list[Tensor]] = {name: [] for name in job.wanted}
        taped = job.taped = self._taped([parts[0] for parts in known], [parts[0] for parts in streams])
        chain = run.hidden.new_empty(0)
        for i, span in enumerate(cut):
            chunk = _Chunk(self, span, [t[i] for t in tables], job.executor.chunk_runner(job, span.count))
            lines = {d.name: self._differentiable(run.line(d.name, d.tokens)) for d in job.region.lines}
            tensors = [*(parts[i] for parts in streams), *(parts[i] for parts in known)]
            if taped is None and job.recompute:
                *values, chain = Recomputed.apply(
                    chunk, tuple(lines), len(lines) + len(tensors), *lines.values(), *tensors,
                    chain, *self.host.leaves.values(),
                )
            elif taped is not None:
                self.lines, self.span = lines, span
                delays = {name: self.delayed(name, None) for name in taped.graph.delays}
                count = len(graph.streams)
                values, chain = taped.run(
                    (None, *chunk.visits), tensors[:count], (*chunk.masks, *chunk.tables), tensors[count:], delays, chain
                )
            else:
                values = chunk.run(lines, tensors)
            results = dict(zip(graph.results, values, strict=True))
            for d in job.region.lines:
                source = results[d.source] if d.source in results else inputs[d.source].split(sizes, 1)[i]
                run.state.lines[d.name] = push_delay(lines[d.name], source, d.tokens, span, run.state.record)
            for name, parts in done.items():
                parts.append(results[name])
        job.chain = chain
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in done.items()}

    def _taped(self, known: Sequence[Tensor], streams: Sequence[Tensor]) -> TapedChunks | None:
        """The loop's chunks on a graph with its backward pass; None where autograd has to see their ops."""
        job, hidden = self.job, self.run.hidden
        if job.executor.compiled or torch.is_autocast_enabled(hidden.device.type):
            return None
        if any(t.dtype != hidden.dtype for t in streams):
            return None
        if any(type(p) not in (Tensor, nn.Parameter) for p in self.params):
            return None  # quantised or sharded: what such a weight can do is its own affair
        grad = torch.is_grad_enabled()
        taped = taped_graph(job.graph, self.params, [grad and t.requires_grad for t in known], hidden.dtype, grad)
        if taped is None:
            return None
        like = hidden.new_empty(hidden.shape[0] * min(job.region.size, hidden.shape[1]), 1)
        return TapedChunks(taped, self.params, job.sink, like, job.recompute, job.draws)

    @staticmethod
    def _differentiable(line: Tensor) -> Tensor:
        """A delay line that needs a gradient in every chunk, also in the first one: chunks are compiled alike."""
        return line if line.requires_grad or not torch.is_grad_enabled() else line.detach().requires_grad_()

    def _known(self, sizes: list[int]) -> list[Sequence[Tensor]]:
        """What the graph knows before the loop, cut into chunks."""
        distributed = self.job.graph.distributed
        if distributed.before is None:
            return []
        values = distributed.before(*(self.run.context.side_inputs[i] for i in self.job.graph.side_inputs), *self.params)
        return [self._pieces(t, axis, sizes) for t, axis in zip(values, distributed.axes, strict=True)]

    def _pieces(self, t: Tensor, axis: int | None, sizes: list[int]) -> Sequence[Tensor]:
        parts = [t] * len(sizes) if axis is None else t.split(sizes, axis)
        # Compiled segments want the strides of the shape; each would copy for itself.
        return [p.contiguous() for p in parts] if self.job.executor.compiled else parts

    def visits(self, span: Span) -> list[_BufferedVisit]:
        masks = Masks(span.start, span.count, self.run.context.valid_until(span.start + span.count), self.run.hidden.device)
        return [_BufferedVisit(o, self.host, self.job, span, masks) for o in self.job.graph.visits]

    def absences(self, span: Span) -> list[Tensor | None]:
        """Per mask of the graph where its values are present, ``[batch or 1, tokens, 1]``; None = everywhere."""
        masks, compiled, hidden = [], self.job.executor.compiled, self.run.hidden
        for absent in self.job.graph.absents:
            if span.rank is not None:
                there = span.rank >= absent
            elif span.start >= absent and not compiled:
                there = None
            else:
                # Made on the device: a copy from the host could not be recorded in a CUDA graph.
                there = torch.arange(span.start, span.start + span.count, device=hidden.device)[None] >= absent
            if there is not None:
                there = there[..., None]
                there = there.expand(hidden.shape[0], -1, -1).contiguous() if compiled else there
            masks.append(there)
        return masks

    # Calls of the graph.

    @property
    def running(self) -> Span:
        """The running chunk."""
        assert self.span is not None
        return self.span

    def delayed(self, name: str, source: Tensor | None) -> Tensor:
        o = self.run.program.defs[name]
        if o["group"] is not None:
            return read_group(self.lines[name], source, o["group"], self.running)
        return read_delay(self.lines[name], source, o["tokens"], self.running)

    def call(self, name: str, streams: Sequence[Tensor]) -> Tensor:
        o = self.run.program.defs[name]
        (scope,) = own_scopes(o)
        return OPS[o.kind].apply(self.host.module(scope), o, streams)


class _Chunk:
    """One chunk of a loop, run once, or once more in the backward pass.

    Args:
        tables: the chunk's side inputs.
        runner: runs the graph.
    """

    def __init__(self, loop: Loop, span: Span, tables: Sequence[Tensor], runner: Callable[..., Sequence[Tensor]]):
        self.loop, self.span, self.tables, self.runner = loop, span, tables, runner
        # Every visit of a chunk shares its masks.
        self.visits, self.masks = loop.visits(span), loop.absences(span)

    def run(self, lines: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The graph's results.

        Args:
            lines: delay lines by name.
            tensors: the chunk of each stream, then of what is known before the loop.
        """
        loop, streams = self.loop, len(self.loop.job.graph.streams)
        loop.lines, loop.span = dict(lines), self.span
        results = self.runner(loop, *self.visits, *tensors[:streams], *self.masks, *self.tables, *loop.params, *tensors[streams:])
        loop.lines = {}
        return results


class Recomputed(torch.autograd.Function):
    """A chunk whose activations are not kept: the backward pass runs it again (gradient checkpointing).

    Keys and values stay in their buffers, so a chunk needs nothing but its streams and delay lines. The chain makes later
    chunks go first, whose gradients of this chunk's keys have to be there.
    """

    @staticmethod
    def forward(ctx, chunk: _Chunk, names: tuple[str, ...], count: int, *tensors: Tensor):
        device = tensors[0].device.type if tensors else "cpu"
        ctx.chunk, ctx.names, ctx.count = chunk, names, count
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.save_for_backward(*tensors)
        ctx.random = RandomState.now(tensors) if chunk.loop.job.draws else None
        lines = dict(zip(names, tensors))
        return (*chunk.run(lines, tensors[len(names) : count]), tensors[count].new_empty(0))

    @staticmethod
    def backward(ctx, *grads):
        chunk, names, count = ctx.chunk, ctx.names, ctx.count
        tensors = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:count]]
        chunk.loop.job.forget_tokens()
        device, dtype, enabled = ctx.autocast
        again = contextlib.nullcontext() if ctx.random is None else ctx.random.again()
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled), again:
            values = chunk.run(dict(zip(names, inputs)), inputs[len(names) :])
        pairs = [(v, g) for v, g in zip(values, grads) if v.requires_grad and g is not None]
        leaves = tensors[count + 1 :]
        trained = [t for t in (*inputs, *leaves) if t.requires_grad]
        computed = iter(torch.autograd.grad([v for v, _ in pairs], trained, [g for _, g in pairs], allow_unused=True))
        chunk.loop.job.forget_tokens()
        gradients = [next(computed) if t.requires_grad else None for t in (*inputs, *leaves)]
        return (None, None, None, *gradients[:count], grads[-1].new_zeros(0), *gradients[count:])


class _BufferedVisit(RunningVisit):
    """A visit whose slots are buffers."""

    def __init__(self, op: Op, host: SunkHost, job: Job, span: Span, masks: Masks):
        self.op, self.host, self.job, self.span, self.masks = op, host, job, span, masks
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.hidden = None

    def enter(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden

    def commit(self) -> None:
        """Buffers are written by the attention itself."""

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        site, keys, own = self.sites[number], self.op["keys"], writes_slot(self.op)
        window = site.window if self.op["gate"] is None else min(self.op["window"], site.window or self.op["window"])
        if keys is None:
            return self._use(self.op["slot"], number, window, True)(q, k, v, sinks)
        near = None if own is None else self._use(own, number, window, True)(q, k, v, sinks)
        far = self._use(keys, number, site.window, False)(q, k, v, sinks)
        return far if near is None else self.mix(q, self.hidden, far, near)

    def attend_taped(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None):
        """As :meth:`attend` of a visit without a gate: the result, and what its backward pass needs."""
        return self.use(number).taped(q, k, v, sinks)

    def use(self, number: int) -> Use:
        """The attention of a visit without a gate."""
        keys = self.op["keys"]
        slot, write = (self.op["slot"], True) if keys is None else (keys, False)
        return self._use(slot, number, self.sites[number].window, write)

    def _use(self, slot: int, number: int, window: int | None, write: bool) -> Use:
        site, masks = self.sites[number], self.masks
        # Nothing of the visit itself: the options are kept until the backward pass, and the visit knows the whole run.
        options = {
            "q_start": self.span.start, "valid": masks.valid, "row_start": masks.row_start if site.chunk else None,
            "scale": site.scale, "window": window, "chunk": site.chunk, "softcap": site.softcap,
        }
        return Use(self.job.slot(slot, self.sites)[number], self.span.start, self.span.count, write, options)
