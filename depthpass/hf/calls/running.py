"""Run the program of a transformed model up to the final norm: what a call of its decoder does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depthpass.capture import Capture
from depthpass.capture.derivatives import refuse_backward
from depthpass.capture.quiet import without_autocast
from depthpass.hf.caches.cache import NAMES, DepthCache
from depthpass.hf.calls.columns import shapes_only
from depthpass.hf.calls.doors import DepthDecoder, Frame, Left, call_names
from depthpass.hf.calls.growth import without_cache
from depthpass.hf.calls.head_input import HeadInput, taken
from depthpass.hf.calls.hidden_states import EMBEDDED, take_states, with_states
from depthpass.hf.calls.host import StockHost, depth_module
from depthpass.hf.calls.inputs import Call, normalise, warn_frozen
from depthpass.hf.calls.latents import advance, as_embeddings, feeds
from depthpass.hf.calls.live import Live, warn_parts
from depthpass.hf.calls.outputs import decorate, warn_losses
from depthpass.hf.calls.packing import Packing, Rows
from depthpass.hf.calls.pads import Layout, check_places, insert
from depthpass.hf.calls.step import advance_token
from depthpass.hf.modules.placement import check_devices, gather_new
from depthpass.ir.program import Program
from depthpass.lowered.record import Recorder
from depthpass.plan import Plan

if TYPE_CHECKING:
    from depthpass_lowering.executors.fixed_point import JacobiSchedule
    from depthpass_lowering.executors.losses import Pool
    from depthpass_lowering.state import State

    from depthpass.hf.model import DepthModel

Streams = dict[str, Tensor]
Groups = Sequence[tuple[Plan, Tensor | None]]
"""Plans with the rows (of packed calls: the sequences) that run them, by index; None = all."""


@dataclass(eq=False)
class DecoderCall:
    """One call of the decoder while it runs.

    Attributes:
        groups: one plan for all rows, or no cache.
        sweeps: the fixed-point schedule of this call, or None.
        pool: training losses of its runs.
        lowered: how each serial region was run.
        ran: the programs that ran, with their rows and columns.
        compiled: whether it was one compiled token.
    """

    model: DepthModel
    call: Call
    captured: Capture
    groups: Groups
    sweeps: JacobiSchedule | None
    pool: Pool
    lowered: Recorder = field(default_factory=Recorder)
    ran: list[tuple[Program, int, int]] = field(default_factory=list)
    compiled: bool = False

    def host(self) -> StockHost:
        return StockHost(self.model, self.captured, (), self.pool)

    @property
    def trains(self) -> bool:
        """Whether losses of its programs are asked for."""
        asked = self.model.training or self.call.labels is not None
        return asked and any(plan.program.losses for plan, _ in self.groups)


class _Prologue:
    """Answers the prologue's and the norm's questions about columns."""

    def __init__(self, start: int, count: int):
        self.start, self.count = start, count

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.start, self.start + self.count, device=device)


def run_program(model: DepthModel, decoder: DepthModel | DepthDecoder, arguments: dict[str, Any], frame: Frame | None) -> Any:
    """Run the program up to the final norm.

    Args:
        decoder: the module that is called; the model itself where it has no head.
        arguments: by the names of the decoder's stock forward.
        frame: of the outer call that it is a part of; None = the decoder was called by itself.

    Returns:
        the decoder's stock outputs.
    """
    from depthpass_lowering.executors.contraction import start
    from depthpass_lowering.executors.losses import Pool
    from depthpass_lowering.state import State

    runtime = model._depth
    names = call_names(type(decoder)._stock_class)
    call = normalise(model, decoder, names, arguments, frame)
    with shapes_only(call.tensors["attention_mask"]):
        check_places(model, runtime.program, call)
    if feeds(runtime.program):
        call = as_embeddings(model, call)
    warn_frozen(model)
    groups = runtime.plans.running(model, call)
    plan = groups[0][0]
    if call.cache is not None:
        call.cache.check_program(plan.meaning, call.cache_name)
    if len(groups) > 1:
        call = without_cache(call, arguments, [p.program for p, _ in groups])
    if call.hidden_states:
        groups = [(with_states(model, groups), None)]
    now = DecoderCall(model, call, model._captured(call, names), groups, start(runtime.fixed_point), Pool())
    state = call.cache.opened(plan.meaning) if call.cache is not None else State()
    parts, streams, state = _dispatch(now, plan, state)
    now.pool.move()
    runtime.lowered, runtime.ran = now.lowered.done(), tuple(now.ran)
    output: Any = pytree.tree_unflatten(parts, now.captured.out_spec)
    refuse_backward(now.captured.own_backwards, (output.last_hidden_state, *streams.values()))
    if call.hidden_states:
        output["hidden_states"] = take_states(streams, output.last_hidden_state)
    if call.use_cache:
        cache = call.cache if call.cache is not None else DepthCache(model)
        cache.keep(plan.meaning, state)
        for name in NAMES:
            if name in getattr(output, "__dataclass_fields__", {}):
                output[name] = cache
    left = Left(now.captured, streams, plan.heads, now.pool.values(), now.sweeps and tuple(now.sweeps.solves))
    if frame is not None:
        frame.left = left
        if now.compiled and taken(model, decoder):
            output["last_hidden_state"] = output.last_hidden_state.as_subclass(HeadInput)
    else:
        decorate(model, output, left)
        if decoder is not model and model.training:
            warn_losses(left, f"the decoder of a transformed {type(model).__name__} was called by itself")
    return output if call.return_dict else output.to_tuple()


def _dispatch(now: DecoderCall, plan: Plan, state: State) -> tuple[list[Tensor], Streams, State]:
    """Advance a state by a call: by packed sequences, by one compiled token, or by whole rows.

    Returns:
        the decoder's flat outputs; all streams by name; the new state.
    """
    call = now.call
    with shapes_only(call.tensors["attention_mask"]):
        if call.packing is not None:
            parts, streams = _advance_packed(now, call.packing)
            return parts, streams, state
        # A token behind pads stands behind them in the state, too.
        behind = insert(now.model, plan.program, call)[0] if state.pads is not None else call
        step = None if call.hidden_states else advance_token(now.model, plan, now.captured, behind, state, now.lowered)
        now.compiled = step is not None
        advanced = step or _advance(now, state)
    rows, columns = call.tensors["attention_mask"].shape
    now.ran += [(p.program, rows if some is None else len(some), columns) for p, some in now.groups]
    return advanced


def _advance(now: DecoderCall, state: State) -> tuple[list[Tensor], Streams, State]:
    """Advance a state by the tokens of a call; returns as :func:`_dispatch`."""
    model, call, plan = now.model, now.call, now.groups[0][0]
    host, now.pool.asked = now.host(), now.trains
    gather_new(depth_module(model))
    if host.dispatched:
        check_devices(host.layers, plan.program)
    # What runs has the program's pads in it; the caller sees what it gave.
    inner, layout = insert(model, plan.program, call)
    if len(now.groups) > 1:
        hidden, side_inputs = embedded(model, host, inner)
        streams = _by_rows(now, host, hidden, side_inputs, inner.valid)
    else:
        hidden, streams, state = _run(now, plan, host, inner, layout, state, call.use_cache)
    if call.hidden_states:
        streams[EMBEDDED] = hidden
    warn_parts(model, host.counts)
    if layout is not None:
        streams, state.pads = {name: layout.trim(x) for name, x in streams.items()}, layout.pads
    else:
        state.pads = state.longer_pads(hidden.shape[1])
    return list(host.part(now.captured.head, call.tensors, streams["output"])), streams, state


def _run(
    now: DecoderCall, plan: Plan, host: StockHost, call: Call, layout: Layout | None, state: State, keep: bool
) -> tuple[Tensor, Streams, State]:
    """Advance a state by a call with its pads in place.

    Args:
        keep: whether the new state is needed.

    Returns:
        the embedded tokens; all streams by name; the new state.
    """
    from depthpass_lowering.executors.eager import run

    def piece(part: Call, state: State, keep: bool) -> tuple[Tensor, Streams, State]:
        hidden, side_inputs = embedded(now.model, host, part)
        ran = run(
            plan.schedule, host, hidden, side_inputs, now.captured.side_axes, state, part.valid, keep, plan.types,
            now.model._depth.lowering, now.sweeps, now.lowered,
        )
        return hidden, ran.streams, ran.state

    if layout is None or not feeds(plan.program):
        return piece(call, state, keep)
    advanced = advance(call, layout, state, keep, piece)
    if now.captured.head.extras:
        embedded(now.model, host, call)
    return advanced


def embedded(model: DepthModel, host: StockHost, call: Call) -> tuple[Tensor, list[Tensor]]:
    """The embedded tokens of a call and the tables beside them; the host gets what it needs to run blocks."""
    runtime, captured = model._depth, host.captured
    tokens = call.tensors["input_ids" if "input_ids" in call.tensors else "inputs_embeds"]
    # Stock rotary embeddings switch autocast off. A capture is made without autocast and cannot tell.
    with without_autocast(tokens.device):
        visit = _Prologue(call.past, tokens.shape[1])
        if host.hooked.live:
            layers = runtime.layers[len(runtime.decoder) + 1 if runtime.decoder else 0 :]
            host.live = Live(host.decoder, layers, captured, host.hooked, call.tensors, call.past, call.cache)
            # The embedding has run as a module; its weights may be nowhere now.
            hidden, side_inputs = host.live.hidden, host.part(captured.tables, call.tensors, visit=visit)
        else:
            hidden, *side_inputs = host.part(captured.prologue, call.tensors, visit=visit)
    host.extras = side_inputs
    return hidden, side_inputs


def _advance_packed(now: DecoderCall, packing: Packing) -> tuple[list[Tensor], Streams]:
    """The outputs of packed rows: every sequence in them is run as a row.

    Returns:
        the decoder's flat outputs; all streams by name.
    """
    model, call, captured = now.model, now.call, now.captured
    call_host, now.pool.asked = now.host(), now.trains
    gather_new(depth_module(model))
    if call_host.dispatched:
        for plan, _ in now.groups:
            check_devices(call_host.layers, plan.program)
    # Modules with hooks (FSDP's among them) are called as often for packed rows as for others.
    together = bool(call_host.hooked.live) or any(
        call_host.refuses_schedule(i) is not None for i in {o["index"] for plan, _ in now.groups for o in plan.program.visits}
    )
    parts: list[tuple[Rows, Streams]] = []
    for plan, segments in now.groups:
        # Chunks of token loops are compiled once per number of rows.
        compiled = model._depth.lowering in ("inductor", "cudagraph") and bool(plan.schedule.serial_regions)
        for rows in packing.rows(segments, together, powers=compiled):
            host = now.host()
            host.counts = call_host.counts
            parts.append((rows, _sequences(now, plan, host, rows)))
            now.ran.append((plan.program, rows.source.shape[0], rows.source.shape[1]))
    warn_parts(model, call_host.counts)
    streams = {name: packing.join([(rows, one[name]) for rows, one in parts]) for name in parts[0][1]}
    if captured.head.extras:
        embedded(model, call_host, call)
    return list(call_host.part(captured.head, call.tensors, streams["output"])), streams


def _sequences(now: DecoderCall, plan: Plan, host: StockHost, rows: Rows) -> Streams:
    """The streams of some sequences of packed rows, each as a row."""
    from depthpass_lowering.state import State

    inner, layout = insert(now.model, plan.program, now.call.of(rows))
    hidden, streams, _ = _run(now, plan, host, inner, layout, State(), False)
    if now.call.hidden_states:
        streams[EMBEDDED] = hidden
    return streams if layout is None else {name: layout.trim(x) for name, x in streams.items()}


def _by_rows(now: DecoderCall, call_host: StockHost, hidden: Tensor, side_inputs: list[Tensor], valid: Tensor | None) -> Streams:
    """The streams of rows with different loop counts: every group of rows runs its own program, then all are joined."""
    from depthpass_lowering.executors.eager import run
    from depthpass_lowering.state import State

    parts: list[Streams] = []
    axes = now.captured.side_axes
    groups = [(plan, rows) for plan, rows in now.groups if rows is not None]
    for plan, rows in groups:
        group = now.host()
        group.live, group.counts = call_host.live and call_host.live.of_rows(rows), call_host.counts
        mine = [s.index_select(0, rows) if axis and s.shape[0] == len(hidden) else s for s, axis in zip(side_inputs, axes)]
        group.extras = mine
        ran = run(
            plan.schedule, group, hidden.index_select(0, rows), mine, axes, State(),
            None if valid is None else valid.index_select(0, rows), False, plan.types, now.model._depth.lowering, now.sweeps,
            now.lowered,
        )
        parts.append(ran.streams)
    back = torch.argsort(torch.cat([rows for _, rows in groups]))
    return {name: torch.cat([p[name] for p in parts]).index_select(0, back) for name in parts[0]}
