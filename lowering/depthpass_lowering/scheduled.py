"""L3: serial regions with a hand-scheduled backward pass.

Forward: keys and values go into static buffers in place. Backward: a reverse loop computes activation gradients only;
key and value gradients are accumulated in place, and every weight gradient is one product after the loop. The result
equals the eager rung up to the order of summation.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from depthpass.capture.direct import direct
from depthpass.capture.model import Site
from depthpass.errors import LoweringError
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, writes_slot
from depthpass.lowered.build import unschedulable_ops
from depthpass.lowered.program import LoweredRegion
from depthpass.schedule.regions import Region
from depthpass_lowering.attention import Masks
from depthpass_lowering.buffers import Buffer, Use
from depthpass_lowering.dropout import RandomState, draws
from depthpass_lowering.eager import Run
from depthpass_lowering.executor import Executor, note
from depthpass_lowering.first_order import first_order
from depthpass_lowering.fx_passes.region import ChunkGraph, Parameter, chunk_graph
from depthpass_lowering.fx_passes.sink import sink_pass
from depthpass_lowering.host import Host
from depthpass_lowering.products import LEAST_USES
from depthpass_lowering.sink import Sink, sunk_linear
from depthpass_lowering.state import Slot, Span, push_delay, read_delay, spans
from depthpass_lowering.transforms import unschedulable
from depthpass_lowering.visits import RunningVisit

_GRAPHS: weakref.WeakKeyDictionary[Region, dict[tuple, ChunkGraph]] = weakref.WeakKeyDictionary()
_SUNK: weakref.WeakKeyDictionary[ChunkGraph, fx.GraphModule] = weakref.WeakKeyDictionary()


def graph_of(run: Run, region: LoweredRegion) -> ChunkGraph:
    """The graph of one chunk of a region, made once for the blocks it runs on."""
    source = region.source
    templates = tuple(id(run.host.bound(o["index"])[0]) for o in region.visits)
    kinds = tuple(type(run.host.module(name)) for o in source.ops for name in _scope(o))
    # The graph keeps program and templates, so that their ids stay theirs.
    key = (id(run.program), templates, kinds, region.outputs)
    kept = _GRAPHS.setdefault(source, {})
    if key not in kept:
        kept[key] = chunk_graph(source, run.program, run.types, run.host, region.outputs)
    return kept[key]


def sunk_graph(graph: ChunkGraph) -> fx.GraphModule:
    """A chunk's graph with sunk weight gradients, made once."""
    if graph not in _SUNK:
        _SUNK[graph] = sink_pass(graph.distributed.loop)
    return _SUNK[graph]


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
        if reason is None and run.context.count <= region.chunk and not torch.is_grad_enabled():
            # Nothing to go back over, and the eager level writes keys in place as well.
            reason = "one chunk without gradients"
        return (self.name, None) if reason is None else ("eager", reason)

    def region(self, run: Run, region: LoweredRegion) -> dict[str, Tensor]:
        if region.level == "eager":
            return super().region(run, region)
        inputs = {a: run.env[a] for a in region.inputs}
        note(run, region, region.level, region.reason, recomputed=recomputes(run.host, region), padded=self.padding(run, region))
        if not torch.is_grad_enabled():
            job = Job(self, run, region, inputs, {})
            found = job.loop(inputs)
            job.store()
            return found
        return self.trained(run, region, inputs)

    def padding(self, run: Run, region: LoweredRegion) -> int:
        """Columns of nobody that are put behind the rows."""
        return 0

    def trained(self, run: Run, region: LoweredRegion, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The streams that a region hands out, as one node of the outer graph."""
        if run.hidden.is_cuda and not self.strict:
            _warn_slow()
        parameters = region_parameters(region, run.host)
        job = Job(self, run, region, inputs, parameters)
        found = RegionFunction.apply(job, len(parameters), *parameters.values(), *inputs.values())
        return dict(zip(region.outputs, found))

    def chunk_runner(self, job: Job, tokens: int) -> Callable[..., Sequence[Tensor]]:
        """What runs the graph of a chunk of so many tokens."""
        return functools.partial(direct(sunk_graph(job.graph)), job.sink)

    def refuse(self, run: Run, region: Region) -> str | None:
        """Why a region cannot be hand-scheduled in this call, or None."""
        if reason := unschedulable(run.hidden) or unschedulable_ops(run.program, region):
            return reason
        grad, host = torch.is_grad_enabled(), run.host
        if grad:
            if run.context.keep:
                return "a cache is kept while gradients are recorded"
            if run.state.length:
                return "gradients are recorded on top of a cache"
            used = {i for o in region.visits for i in host.sides_of(o["index"])}
            if any(run.context.sides[i].requires_grad for i in used):
                return "a side input of the blocks is trained"
        for o in region.visits:
            if reason := host.refuses_schedule(o["index"]):
                return reason
            if grad and any(s.dropout for s in host.sites_of(o["index"])):
                return "attention dropout is on"
        return None


def recomputes(host: Host, region: LoweredRegion) -> bool:
    """Whether the activations of a region are to be computed again in the backward pass."""
    return torch.is_grad_enabled() and any(host.recomputes(o["index"]) for o in region.visits)


@functools.cache
def _warn_slow() -> None:
    """Once per process: on a GPU the loop waits for Python."""
    warnings.warn(
        "lowering='auto' trains a token loop on this GPU kernel by kernel, which on an H100 at the Llama-3.2-1B shape took 7 to "
        "15 times as long as lowering='cudagraph' (docs/benchmarks.md). Use dp.transform(..., lowering='cudagraph') where rows "
        "have a few lengths; lowering='scheduled' runs as now, without this warning.", UserWarning, stacklevel=2,
    )


class Job:
    """One region of one forward pass: its loop, buffers and sink.

    Attributes:
        graph: one chunk of the loop.
        recompute: whether activations are dropped and computed again in the backward pass, chunk by chunk.
        draws: whether a chunk draws random numbers, which it then has to draw again.
    """

    def __init__(
        self, executor: Scheduled, run: Run, region: LoweredRegion, inputs: Mapping[str, Tensor], parameters: dict[int, Tensor]
    ):
        self.executor, self.run, self.region, self.names = executor, run, region, list(inputs)
        self.parameters = parameters
        self.graph = graph_of(run, region)
        self.recompute = recomputes(run.host, region)
        self.draws = self.recompute and any(draws(run.host, o["index"]) for o in region.visits)
        uses = -(-run.context.count // region.chunk)
        self.sink = Sink(max(uses, LEAST_USES) if executor.compiled else uses)
        self.buffers: dict[int, list[Buffer]] = {}

    @property
    def wanted(self) -> tuple[str, ...]:
        return self.region.outputs

    def loop(self, inputs: Mapping[str, Tensor], leaves: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
        """The chunk loop; ``leaves`` replaces parameters by their detached stand-ins."""
        return Loop(self, SunkHost(self.run.host, self.sink, leaves or {})).over(inputs)

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
        self.forget_tokens()
        for line in self.region.lines:
            self.run.state.lines.pop(line.name, None)

    def forget_tokens(self) -> None:
        """Begin a new chain of uses of every buffer."""
        for buffers in self.buffers.values():
            for buffer in buffers:
                buffer.token = None

    def store(self) -> None:
        """Hand the buffers over as slots, for a later call or region."""
        rings = {o["slot"]: self.run.ring(o) for o in self.region.visits}
        for number, buffers in self.buffers.items():
            slot = Slot(tuple(b.k for b in buffers), tuple(b.v for b in buffers))
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
        cut = spans(c.start, c.count, c.valid, None, job.region.chunk)
        sizes = [span.count for span in cut]
        streams = [inputs[name].split(sizes, 1) for name in graph.streams]
        tables = [self._pieces(c.sides[i], c.side_axes[i], sizes) for i in graph.sides]
        known = self._known(sizes)
        done: dict[str, list[Tensor]] = {name: [] for name in job.wanted}
        chain = None
        for i, span in enumerate(cut):
            chunk = _Chunk(self, span, [t[i] for t in tables], job.executor.chunk_runner(job, span.count))
            lines = {d.name: self._differentiable(run.line(d.name, d.tokens)) for d in job.region.lines}
            given = [*(parts[i] for parts in streams), *(parts[i] for parts in known)]
            if job.recompute:
                *values, chain = Recomputed.apply(
                    chunk, tuple(lines), len(lines) + len(given), *lines.values(), *given,
                    run.hidden.new_empty(0) if chain is None else chain, *self.host.leaves.values(),
                )
            else:
                values = chunk.run(lines, given)
            results = dict(zip(graph.results, values, strict=True))
            for d in job.region.lines:
                source = results[d.source] if d.source in results else inputs[d.source].split(sizes, 1)[i]
                run.state.lines[d.name] = push_delay(lines[d.name], source, d.tokens, span, run.state.record)
            for name, parts in done.items():
                parts.append(results[name])
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in done.items()}

    @staticmethod
    def _differentiable(line: Tensor) -> Tensor:
        """A delay line that needs a gradient in every chunk, also in the first one: chunks are compiled alike."""
        return line if line.requires_grad or not torch.is_grad_enabled() else line.detach().requires_grad_()

    def _known(self, sizes: list[int]) -> list[Sequence[Tensor]]:
        """What the graph knows before the loop, cut into chunks."""
        distributed = self.job.graph.distributed
        if distributed.before is None:
            return []
        values = distributed.before(*(self.run.context.sides[i] for i in self.job.graph.sides), *self.params)
        return [self._pieces(t, axis, sizes) for t, axis in zip(values, distributed.axes, strict=True)]

    @staticmethod
    def _pieces(t: Tensor, axis: int | None, sizes: list[int]) -> Sequence[Tensor]:
        return [t] * len(sizes) if axis is None else t.split(sizes, axis)

    def visits(self, span: Span) -> list[_BufferedVisit]:
        masks = Masks(span.start, span.count, self.run.context.valid_until(span.start + span.count), self.run.hidden.device)
        return [_BufferedVisit(o, self.host, self.job, span, masks) for o in self.job.graph.visits]

    def absences(self, span: Span) -> list[Tensor | None]:
        """Per mask of the graph where its values are present, ``[batch or 1, tokens, 1]``; None = everywhere."""
        found, compiled, hidden = [], self.job.executor.compiled, self.run.hidden
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
            found.append(there)
        return found

    # Calls of the graph.

    def delayed(self, name: str, source: Tensor | None) -> Tensor:
        return read_delay(self.lines[name], source, self.run.program.defs[name]["tokens"], self.span)

    def call(self, name: str, streams: Sequence[Tensor]) -> Tensor:
        o = self.run.program.defs[name]
        return OPS[o.kind].apply(self.host.module(OPS[o.kind].scope(o)), o, streams)


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

    def run(self, lines: Mapping[str, Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
        """The graph's results.

        Args:
            lines: delay lines by name.
            given: the chunk of each stream, then of what is known before the loop.
        """
        loop, streams = self.loop, len(self.loop.job.graph.streams)
        loop.lines, loop.span = dict(lines), self.span
        found = self.runner(
            loop, *self.visits, *given[:streams], *self.masks, *self.tables, *loop.params, *given[streams:]
        )
        loop.lines = {}
        return found


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
        given = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:count]]
        chunk.loop.job.forget_tokens()
        device, dtype, enabled = ctx.autocast
        again = contextlib.nullcontext() if ctx.random is None else ctx.random.again()
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled), again:
            values = chunk.run(dict(zip(names, given)), given[len(names) :])
        pairs = [(v, g) for v, g in zip(values, grads) if v.requires_grad and g is not None]
        leaves = tensors[count + 1 :]
        wanted = [t for t in (*given, *leaves) if t.requires_grad]
        found = iter(torch.autograd.grad([v for v, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        chunk.loop.job.forget_tokens()
        made = [next(found) if t.requires_grad else None for t in (*given, *leaves)]
        return (None, None, None, *made[:count], grads[-1].new_zeros(0), *made[count:])


class _BufferedVisit(RunningVisit):
    """A visit whose slots are buffers."""

    def __init__(self, op: Op, host: SunkHost, job: Job, span: Span, masks: Masks):
        self.op, self.host, self.job, self.span, self.masks = op, host, job, span, masks
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.made = {}
        self.hidden = None

    def enter(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden

    def commit(self) -> None:
        """Buffers are written by the attention itself."""

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        site, keys = self.sites[number], self.op["keys"]
        own = keys is None or self.op["gate"] is not None
        near = None
        if own:
            window = site.window if self.op["gate"] is None else min(self.op["window"], site.window or self.op["window"])
            near = self._use(writes_slot(self.op), number, window, True)(q, k, v, sinks)
        if keys is None:
            return near
        far = self._use(keys, number, site.window, False)(q, k, v, sinks)
        return far if near is None else self.mix(q, self.hidden, far, near)

    def _use(self, slot: int, number: int, window: int | None, write: bool) -> Use:
        site, masks = self.sites[number], self.masks
        # Nothing of the visit itself: the options are kept until the backward pass, and the visit knows the whole run.
        options = {
            "q_start": self.span.start, "valid": masks.valid, "row_start": masks.row_start if site.chunk else None,
            "scale": site.scale, "window": window, "chunk": site.chunk, "softcap": site.softcap,
        }
        return Use(self.job.slot(slot, self.sites)[number], self.span.start, self.span.count, write, options)


class SunkHost:
    """A host whose parameters are stand-ins and whose products sink their weight gradients."""

    def __init__(self, host, sink: Sink, leaves: dict[int, Tensor]):
        self.host, self.sink, self.leaves = host, sink, leaves
        self.modules: dict[str, nn.Module] = {}

    def leaf(self, parameter: Tensor) -> Tensor:
        return self.leaves.get(id(parameter), parameter)

    def parameter(self, p: Parameter) -> Tensor:
        """The stand-in for a parameter of a chunk's graph."""
        if isinstance(p.owner, int):
            return self.leaf(self.host.bound(p.owner)[1][p.at])
        return self.leaf(getattr(self.host.module(p.owner), p.at))

    def module(self, name: str) -> nn.Module:
        if name not in self.modules:
            self.modules[name] = stand_in(self.host.module(name), self.leaf, self.sink)
        return self.modules[name]

    def submodule(self, index: int, path: str, *args: Tensor) -> Tensor:
        key = f"{index}/{path}"
        if key not in self.modules:
            self.modules[key] = stand_in(self.host.stock_module(index, path), self.leaf, self.sink)
        return self.modules[key](*args)

    def __getattr__(self, name: str):
        return getattr(self.host, name)


def stand_in(module: nn.Module, leaf, sink: Sink | None = None) -> nn.Module:
    """A shallow copy of a module tree that reads other parameters; the module itself is not touched."""
    if sink is not None and type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks:
        return _LinearStandIn(leaf(module.weight), None if module.bias is None else leaf(module.bias), sink)
    made = copy.copy(module)
    made.__dict__ = dict(module.__dict__)
    made._parameters = {k: None if p is None else leaf(p) for k, p in module._parameters.items()}
    made._modules = {k: None if m is None else stand_in(m, leaf, sink) for k, m in module._modules.items()}
    return made


class _LinearStandIn(nn.Module):
    """A linear map on given tensors, its weight gradient sunk."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sink: Sink):
        super().__init__()
        # Under their usual names: a wrapper such as LoRA looks at the weight of the layer it wraps.
        self.weight, self.bias = weight, bias
        self.sink = sink

    def forward(self, x: Tensor) -> Tensor:
        return sunk_linear(self.sink, x, self.weight, self.bias)


def region_parameters(region: LoweredRegion, host: Host) -> dict[int, Tensor]:
    """Every parameter the region's ops read, once each, by id."""
    found: dict[int, Tensor] = {}
    for o in (lowered.op for lowered in region.ops):
        if o.kind == "block":
            tensors = list(host.bound(o["index"])[1])
            for path in host.submodules_of(o["index"]):
                tensors += host.stock_module(o["index"], path).parameters()
            if o["gate"]:
                tensors += host.module(o["gate"]).parameters()
        else:
            tensors = [t for name in _scope(o) for t in host.module(name).parameters()]
        found |= {id(t): t for t in tensors if t.requires_grad}
    return found


def _scope(o: Op) -> tuple[str, ...]:
    """The module of a token-local op's own parameters, if it has one."""
    return OPS[o.kind].scopes(o) if OPS[o.kind].meaning is not None else ()


class RegionFunction(torch.autograd.Function):
    """A whole serial region as one node of the outer graph, so that hooks on parameters fire once, with the total."""

    @staticmethod
    def forward(ctx, job: Job, count: int, *tensors: Tensor):
        leaves = {key: t.detach().requires_grad_() for key, t in zip(job.parameters, tensors[:count])}
        streams = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors[count:]]
        with torch.enable_grad():
            out = job.loop(dict(zip(job.names, streams)), leaves)
        outs = [out[name] for name in job.wanted]
        # The job knows the run and the run will hold this node's outputs: keeping it here would be a cycle that no
        # collector sees. The backward pass needs the sink alone.
        job.release()
        ctx.sink, ctx.outs, ctx.leaves, ctx.streams = job.sink, outs, leaves, streams
        return tuple(o.detach() for o in outs)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        if ctx.outs is None:
            raise RuntimeError("backward through a hand-scheduled region a second time: its activations are freed. Run "
                               "forward again, or use lowering='eager' with retain_graph=True.")
        sink, leaves, streams = ctx.sink, ctx.leaves, ctx.streams
        pairs = [(o, g) for o, g in zip(ctx.outs, grads) if o.requires_grad and g is not None]
        sources = [*leaves.values(), *streams]
        found = torch.autograd.grad(
            [o for o, _ in pairs], sources, [g for _, g in pairs], allow_unused=True
        )
        ctx.outs = ctx.streams = ctx.leaves = None
        sunk = sink.finish()
        weights = []
        for leaf, g in zip(leaves.values(), found):
            extra = sunk.get(id(leaf))
            weights.append(g if extra is None else extra if g is None else g + extra)
        return (None, None, *weights, *found[len(leaves) :])
