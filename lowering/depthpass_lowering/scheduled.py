"""L3: serial regions with a hand-scheduled backward pass.

Forward: keys and values go into static buffers in place. Backward: a reverse loop computes activation gradients only;
key and value gradients are accumulated in place, and every weight gradient is one product after the loop. The result
equals the eager rung up to the order of summation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from depthpass.capture.model import Site, Template
from depthpass.errors import LoweringError
from depthpass.ir.program import Op, writes_slot
from depthpass.schedule.regions import Region
from depthpass_lowering.attention import Masks
from depthpass_lowering.buffers import Buffer, Use
from depthpass_lowering.eager import Run
from depthpass_lowering.fx_passes.sink import sink_linears_pass
from depthpass_lowering.sink import Sink, sunk_linear
from depthpass_lowering.state import Slot, Span
from depthpass_lowering.visits import RunningVisit

_SUNK: weakref.WeakKeyDictionary[Template, fx.GraphModule] = weakref.WeakKeyDictionary()


def sunk_graph(template: Template) -> fx.GraphModule:
    """The template's graph with sunk weight gradients, made once per template."""
    if template not in _SUNK:
        _SUNK[template] = sink_linears_pass(template.graph)[0]
    return _SUNK[template]


class ScheduledRun(Run):
    """As :class:`~depthpass_lowering.eager.Run`, serial regions by the hand-written schedule where it is legal."""

    def _region(self, region: Region, reads: Sequence[str], results: frozenset[str]) -> None:
        if not region.serial or self.refuse(region) is not None:
            return super()._region(region, reads, results)
        if self.count <= region.chunk and not torch.is_grad_enabled():
            # One chunk and nothing to go back over: the eager rung writes keys in place as well.
            return super()._region(region, reads, results)
        wanted = [o.name for o in region.ops if o.name in results]
        inputs = {a: self.env[a] for o in region.ops for a in o.args if a in self.env}
        if not torch.is_grad_enabled():
            job = Job(self, region, inputs, wanted, {})
            self.env |= job.loop(inputs)
            job.store()
            return None
        self.env |= self._trained(region, inputs, wanted)
        return None

    def _trained(self, region: Region, inputs: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
        """The wanted streams of a region, as one node of the outer graph."""
        parameters = region_parameters(region, self.host)
        job = Job(self, region, inputs, wanted, parameters)
        return dict(zip(wanted, RegionFunction.apply(job, len(parameters), *parameters.values(), *inputs.values())))

    def sunk_host(self, job: Job, leaves: dict[int, Tensor]) -> SunkHost:
        """What runs the blocks of a job's token loop."""
        return SunkHost(self.host, job.sink, leaves)

    def refuse(self, region: Region) -> str | None:
        """Why a region cannot be hand-scheduled in this call, or None."""
        if torch.is_grad_enabled():
            if self.keep:
                return "a cache is kept while gradients are recorded"
            if self.state.length:
                return "gradients are recorded on top of a cache"
            used = {i for o in region.visits for i in self.host.sides_of(o["index"])}
            if any(self.sides[i].requires_grad for i in used):
                return "a side input of the blocks is trained"
        for o in region.visits:
            if len(o.args) == 2:
                return f"only routed tokens ask block {o['index']}"
            if o["lora"]:
                return f"block {o['index']} has a LoRA of its own for each visit"
            if o["past"] is not None:
                return f"block {o['index']} reads the keys of earlier calls in another visit's slot"
            if o["modulate"]:
                return f"block {o['index']} is modulated by its visit"
            if reason := self.host.refuses_schedule(o["index"]):
                return reason
            if torch.is_grad_enabled() and any(s.dropout for s in self.host.sites_of(o["index"])):
                return "attention dropout is on"
        here = {writes_slot(o) for o in region.visits}
        for o in self.program.visits:
            if o["keys"] is not None and (o in region.visits) != (o["keys"] in here):
                return f"block {o['index']} shares the keys of slot {o['keys']} across the border of the token loop"
        unknown = {o.kind for o in region.ops} - {"block", "linear", "delay", "add", "scale", "mul", "act", "weigh", "rms"}
        return f"op {min(unknown)} in a serial region" if unknown else None


class StrictScheduledRun(ScheduledRun):
    """As :class:`ScheduledRun`, but a region that cannot be hand-scheduled is an error."""

    def refuse(self, region: Region) -> str | None:
        reason = super().refuse(region)
        if reason is not None:
            raise LoweringError(
                f"lowering 'scheduled' cannot run this call: {reason}. Use lowering='auto' to fall back to 'eager'."
            )
        return None


class Job:
    """One region of one forward pass: its loop, buffers and sink."""

    def __init__(self, run: Run, region: Region, inputs, wanted: list[str], parameters: dict[int, Tensor]):
        self.run, self.region, self.wanted, self.names = run, region, wanted, list(inputs)
        self.parameters = parameters
        self.sink = Sink(uses=-(-run.count // region.chunk))
        self.buffers: dict[int, list[Buffer]] = {}

    def loop(self, inputs: dict[str, Tensor], leaves: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
        """The chunk loop; ``leaves`` replaces parameters by their detached stand-ins."""
        run = self.run
        inner = _Loop(run, run.sunk_host(self, leaves or {}), self)
        return inner._loop(self.region, inputs, set(self.wanted), keep=False)

    def slot(self, number: int, sites: Sequence[Site]) -> list[Buffer]:
        if number not in self.buffers:
            before = self.run.state.slots.get(number)
            self.buffers[number] = [
                Buffer(
                    None if before is None else (before.keys[i], before.values[i]), self.run.length + self.run.count,
                    0 if before is None else before.first,
                )
                for i in range(len(sites))
            ]
        return self.buffers[number]

    def release(self) -> None:
        """Let go of what only the forward loop needs: graph-bearing tensors that would keep the graph alive."""
        self.sink.products.forget()
        for buffers in self.buffers.values():
            for buffer in buffers:
                buffer.token = None
        for o in self.region.ops:
            if o.kind == "delay":
                self.run.state.lines.pop(o.name, None)

    def store(self) -> None:
        """Hand the buffers over as slots, for a later call or region."""
        rings = {o["slot"]: self.run.ring(o) for o in self.region.visits}
        for number, buffers in self.buffers.items():
            slot = Slot(tuple(b.k for b in buffers), tuple(b.v for b in buffers))
            ring = rings.get(number)
            self.run.state.slots[number] = slot if ring is None else slot.last(ring)


class _Loop(Run):
    """The chunk loop of a job: shares the outer run's state, runs visits on buffers."""

    def __init__(self, outer: Run, host: SunkHost, job: Job):
        self.__dict__ |= outer.__dict__
        self.host, self.job = host, job

    def _visit(self, o: Op, span: Span, masks: Masks, keep: bool) -> RunningVisit:
        return _BufferedVisit(o, self.host, self.job, span, masks)


class _BufferedVisit(RunningVisit):
    """A visit whose slots are buffers."""

    def __init__(self, op: Op, host: SunkHost, job: Job, span: Span, masks: Masks):
        self.op, self.host, self.job, self.span, self.masks = op, host, job, span, masks
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.made = {}
        self.hidden = None

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
    """Runs blocks on their sunk graphs with stand-ins for the parameters; everything else as the host does."""

    def __init__(self, host, sink: Sink, leaves: dict[int, Tensor]):
        self.host, self.sink, self.leaves = host, sink, leaves
        self.modules: dict[str, nn.Module] = {}
        self.params: dict[int, list[Tensor]] = {}

    def leaf(self, parameter: Tensor) -> Tensor:
        return self.leaves.get(id(parameter), parameter)

    def block(self, index: int, visit, hidden: Tensor, sides: Sequence[Tensor]) -> Tensor:
        template, params = self.bound_leaves(index)
        return sunk_graph(template)(self.sink, visit, hidden, *sides, *params)

    def bound_leaves(self, index: int) -> tuple[Template, list[Tensor]]:
        """Template of a block and the stand-ins for what it is bound to."""
        template, params = self.host.bound(index)
        if index not in self.params:
            self.params[index] = [self.leaf(p) for p in params]
        return template, self.params[index]

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


def region_parameters(region: Region, host) -> dict[int, Tensor]:
    """Every parameter the region's ops read, once each, by id."""
    found: dict[int, Tensor] = {}
    for o in region.ops:
        if o.kind == "block":
            tensors = list(host.bound(o["index"])[1])
            for path in host.submodules_of(o["index"]):
                tensors += host.stock_module(o["index"], path).parameters()
            if o["gate"]:
                tensors += host.module(o["gate"]).parameters()
        elif o.kind in ("linear", "weigh", "rms") and o["name"]:
            tensors = list(host.module(o["name"]).parameters())
        else:
            continue
        found |= {id(t): t for t in tensors if t.requires_grad}
    return found


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
    @torch.autograd.function.once_differentiable
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
