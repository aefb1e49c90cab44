"""Decoding one token as one compiled graph: embedding, blocks, head and the new entries of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from depthpass.capture import Block, Capture, Part
from depthpass.capture.direct import direct
from depthpass.errors import LoweringError
from depthpass.hf.calls.host import StockHost, depth_module
from depthpass.hf.calls.inputs import Call
from depthpass.log import fallback, working
from depthpass.plan import Plan

if TYPE_CHECKING:
    from depthpass_lowering.executors.graphed_token import GraphedStep
    from depthpass_lowering.executors.token import StaticCache
    from depthpass_lowering.state import State
    from depthpass_lowering.state.slots import Slot

    from depthpass.hf.model import DepthModel
    from depthpass.lowered import LoweredProgram, Recorder

Advanced = tuple[list[Tensor], dict[str, Tensor], "State"]


def advance_token(
    model: DepthModel, plan: Plan, captured: Capture, call: Call, state: State, record: Recorder
) -> Advanced | None:
    """Advance a state by one token with the compiled step, or return None: this call is none for it.

    Only the levels ``inductor`` and ``cudagraph`` compile, and only calls of one token behind a cache, without gradients.

    Returns:
        the decoder's flat outputs; streams by name; the new state.

    Raises:
        LoweringError: the call is such a step, but the program, a hook, autocast or a weight keeps it from being compiled.
    """
    runtime = model._depth
    if runtime.lowering not in ("inductor", "cudagraph") or not _is_step(call, state, runtime.lowering):
        return None
    ready = _ready(model, plan, captured)
    weights = [read() for read in ready.reads]
    if reason := _refusal_of(model, ready, weights):
        raise LoweringError(
            f"lowering {runtime.lowering!r} cannot compile a decoded token: {reason}. Use lowering='auto', which decodes it "
            "uncompiled."
        )
    from depthpass_lowering.executors.token import StaticCache, StepSlots, capacity
    from depthpass_lowering.state import State

    length = state.length
    rooms = StaticCache.of(state, capacity(length + 1))
    valid = None if call.valid is None else nn.functional.pad(call.valid, (0, rooms.columns - length - 1))
    names, batch = sorted(call.tensors), next(iter(call.tensors.values())).shape[0]
    # The compiled code expects the strides it was made for.
    lines = {n: t.contiguous() for n, t in sorted(state.lines.items())}
    key = (
        id(captured), id(plan), batch, valid is None, rooms.columns, torch.is_inference_mode_enabled(),
        tuple(lines), tuple((n, call.tensors[n].shape) for n in names), tuple(w.stride() for w in weights),
    )
    step: CompiledStep | None = runtime.tokens.get(key)
    device = rooms.tensors()[0].device
    record_steps = _recorder(device) if runtime.lowering == "cudagraph" else None
    at = torch.tensor([length], device=device)
    rank = at.expand(batch, 1).contiguous() if call.valid is None else call.valid[:, :length].sum(-1, keepdim=True)
    moving = [*(call.tensors[n].contiguous() for n in names), at, rank, *([] if valid is None else [valid]), *lines.values()]
    inputs = [*moving, *rooms.tensors(), *weights]
    if step is None:
        step = compile_step(model, plan, captured, names, valid is not None, rooms, list(lines), weights, inputs)
        if record_steps is not None:
            step = replace(step, run=record_steps(step.run, len(moving)))
        runtime.tokens[key] = step
    results = iter(step.run(*inputs))
    record.ran(step.lowered)
    rooms.used = length + 1
    parts = [next(results) for _ in range(step.parts)]
    streams = {name: next(results) for name in step.streams}
    new_lines = dict(zip(lines, results, strict=True))
    slots = cast("dict[int, Slot]", StepSlots(rooms, length + 1))  # made on demand, read only
    return parts, streams, State(length + 1, call.valid, slots, new_lines, pads=state.longer_pads(1))


def _recorder(device: torch.device) -> type[GraphedStep]:
    """What records compiled steps.

    Raises:
        LoweringError: nothing can be recorded on the device.
    """
    from depthpass_lowering.executors import graphed_token

    if reason := graphed_token.obstacle(device):
        raise LoweringError(f"lowering 'cudagraph' cannot record a decoded token: {reason}. Use lowering='inductor'.")
    return graphed_token.GraphedStep


def _is_step(call: Call, state: State, level: str) -> bool:
    """Whether a call is one token of every row behind a cache, without gradients; says so where it is, but not one to compile."""
    tokens = next(iter(call.tensors.values()))
    if torch.is_grad_enabled() or not call.use_cache or not state.length or state.record or tokens.shape[1] != 1:
        return False
    if reason := _exempt(call):
        fallback(f"lowering={level!r} decodes a token uncompiled, because {reason}", asked=True)
    return not reason


def _exempt(call: Call) -> str | None:
    """What of a token's call is no step's, or None."""
    if call.cache is not None and call.cache.residual_bits is not None:
        return "the cache keeps residuals of few bits"
    if more := sorted(set(call.tensors) - {"input_ids", "inputs_embeds", "position_ids", "attention_mask"}):
        return f"the call has {', '.join(more)}"
    if (places := call.tensors.get("position_ids")) is not None and places.dim() > 2:
        return "its tokens have places in images"
    # A token that is padding in some row leaves that row's delay lines as they are.
    return None if call.valid is None or bool(call.valid[:, -1].all()) else "some row has padding in place of the token"


def _refusal_of(model: DepthModel, ready: Ready, weights: list[Tensor]) -> str | None:
    """Why a step cannot be compiled in this call, or None.

    Args:
        weights: what it would read, as it is now: weights are replaced without any other change (``quantize_``).
    """
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return "autocast is on"
    # What multiplies by such a weight is said by its class, which neither the compiler nor a kernel asks.
    odd = next((w for w in weights if type(w) not in (Tensor, nn.Parameter) or w.layout is not torch.strided), None)
    return ready.reason or (None if odd is None else f"a weight is a {type(odd).__name__} ({odd.layout}), no plain tensor")


def _obstacle(model: DepthModel, plan: Plan, captured: Capture) -> str | None:
    """Why no step of this program can be compiled on this model, or None."""
    from depthpass_lowering.executors.token import refusal

    if reason := refusal(plan.program):
        return reason
    host = StockHost(model, captured, ())
    if host.hooked.live:
        return "modules inside a block, the embedding or the final norm have hooks, which need module calls"
    indices = sorted({o["index"] for o in plan.program.visits})
    return next((reason for i in indices if (reason := host.refuses_schedule(i))), None)


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step.

    Attributes:
        run: inputs -> the decoder's outputs, streams, new delay lines; writes the rooms in place.
        parts: how many outputs the decoder has.
        streams: names of the output's and the taps' streams.
        plan: what was compiled; kept, so that its identity is not given to another.
        lowered: its lowered program.
    """

    run: Callable[..., Sequence[Tensor]]
    parts: int
    streams: tuple[str, ...]
    plan: Plan
    lowered: LoweredProgram


@dataclass(frozen=True)
class Ready:
    """What a step asks of a model, which stays the same while its watch does.

    Attributes:
        of: watch, plan and capture.
        reason: why no step of it can be compiled, or None.
        reads: what reads its tensors, once each.
    """

    of: tuple[object, object, object]
    reason: str | None
    reads: list[Callable[[], Tensor]]


def _ready(model: DepthModel, plan: Plan, captured: Capture) -> Ready:
    runtime, of = model._depth, (model._depth.watches[-1], plan, captured)
    held = runtime.ready
    if held is None or any(a is not b for a, b in zip(held.of, of)):
        reason = _obstacle(model, plan, captured)
        held = runtime.ready = Ready(of, reason, [] if reason else _reads(model, plan, captured))
    return held


def _reads(model: DepthModel, plan: Plan, captured: Capture) -> list[Callable[[], Tensor]]:
    host = StockHost(model, captured, ())
    readers: dict[int, Callable[[], Tensor]] = {}

    def take(reads: Iterable[Callable[[], Tensor]]) -> None:
        for read in reads:
            readers.setdefault(id(read()), read)

    def below(module: nn.Module) -> Iterator[Callable[[], Tensor]]:
        for m in module.modules():
            for table in (m._parameters, m._buffers):
                for name in (n for n, t in table.items() if t is not None):
                    yield cast("Callable[[], Tensor]", partial(table.__getitem__, name))

    for part in (captured.prologue, captured.norm, captured.head):
        take(host.readers(part, host.decoder))
    for index in sorted({o["index"] for o in plan.program.visits}):
        take(host.readers(captured.blocks[index], host.layers[index]))
        for path in host.submodules_of(index):
            take(below(host.stock_module(index, path)))
    take(below(depth_module(model)))
    return list(readers.values())


class _StepHost(StockHost):
    """Runs a step that is being traced: parameters are the trace's inputs, columns a tensor."""

    def __init__(self, model: DepthModel, captured: Capture, leaves: dict[int, Tensor], at: Tensor):
        super().__init__(model, captured, ())
        self.leaves, self.at, self.training, self.runner = leaves, at, False, direct
        self.stand_ins: dict[str, nn.Module] = {}

    def leaf(self, t: Tensor) -> Tensor:
        return self.leaves.get(id(t), t)

    def tensors(self, owner: Block | Part, module: nn.Module) -> list[Tensor]:
        return [self.leaf(t) for t in super().tensors(owner, module)]

    def block(self, index: int, visit, hidden: Tensor, side_inputs: Sequence[Tensor]) -> Tensor:
        template, params = self.bound(index)
        return visit.run(template, hidden, side_inputs, visit.adapt(template.params, params))

    def module(self, name: str) -> nn.Module:
        return self._stand_in(f"/{name}", super().module(name))

    def submodule(self, index: int, path: str, *args: Tensor) -> Tensor:
        return self._stand_in(f"{index}/{path}", self.stock_module(index, path))(*args)

    def columns(self, device: torch.device) -> Tensor:
        """As a visit: the prologue asks where its tokens stand."""
        return self.at

    def _stand_in(self, key: str, module: nn.Module) -> nn.Module:
        from depthpass_lowering.executors.stand_ins import stand_in

        if key not in self.stand_ins:
            self.stand_ins[key] = stand_in(module, self.leaf)
        return self.stand_ins[key]


def compile_step(
    model: DepthModel, plan: Plan, captured: Capture, names: list[str], padded: bool, rooms: StaticCache, lines: list[str],
    weights: list[Tensor], inputs: list[Tensor],
) -> CompiledStep:
    """Trace one token through the program and compile it.

    Args:
        inputs: token tensors by ``names``, column, rank, validity if ``padded``, delay lines, rooms, weights.
    """
    from depthpass_lowering.executors.context import CallContext
    from depthpass_lowering.executors.token import StepRun
    from depthpass_lowering.fx_passes.few_rows import few_rows_pass

    counts: list[int] = []
    streams: list[str] = []
    programs: list[LoweredProgram] = []

    def token(*flat: Tensor) -> list[Tensor]:
        left = iter(flat)
        tensors = {n: next(left) for n in names}
        at, rank = next(left), next(left)
        valid = next(left) if padded else None
        state_lines = {n: next(left) for n in lines}
        held = rooms.like([next(left) for _ in rooms.tensors()])
        leaves = {id(w): t for w, t in zip(weights, left, strict=True)}
        host = _StepHost(model, captured, leaves, at)
        hidden, *side_inputs = host.part(captured.prologue, tensors, visit=host)
        host.extras = side_inputs
        context = CallContext(plan.schedule, host, hidden, tuple(side_inputs), tuple(captured.side_axes), valid, True, plan.types)
        ran = StepRun(context, held, state_lines, at, rank).run()
        out, state = ran.streams, ran.state
        programs[:] = [ran.lowered]
        parts = list(host.part(captured.head, tensors, out["output"]))
        counts[:], streams[:] = [len(parts)], out
        return [*parts, *out.values(), *(state.lines[n] for n in lines)]

    with working(f"compiling a decoded token of {type(model).__name__}"), torch.no_grad():
        graph = make_fx(token, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        few_rows_pass(graph, weights)
        compiled: Any = torch._inductor.compile(graph, cast(Any, inputs))
    return CompiledStep(compiled, counts[0], tuple(streams), plan, programs[0])


