"""L0: run a schedule op by op, region by region. Obviously right, and the oracle of every faster rung.

One primitive: advance a state by m new tokens. Training and prefill are m = all tokens, decoding is m = 1. Parallel
regions see all m tokens at once, serial regions run in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthpass.capture.model import Site, Template
from depthpass.errors import LoweringError
from depthpass.ir.program import Op, Program
from depthpass.ir.verify import Type, infer
from depthpass.schedule.regions import Region, Schedule
from depthpass_lowering.attention import Masks, column_mask, sdpa_attention
from depthpass_lowering.state import Slot, Span, State, push_delay, read_delay, spans

ACTIVATIONS = {
    "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu,
}


class Host(Protocol):
    """The stock modules a program runs on; implemented by the Hugging Face layer and by the compiler backend."""

    def block(self, index: int, visit: RunningVisit, hidden: Tensor, sides: Sequence[Tensor]) -> Tensor: ...

    def sides_of(self, index: int) -> tuple[int, ...]: ...

    def sites_of(self, index: int) -> tuple[Site, ...]: ...

    def norm(self, hidden: Tensor) -> Tensor: ...

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
        """Why a block must run as a module (hooks, checkpointing), or None."""
        ...

    def attention(self, index: int, site: Site, q, k, v, mask, causal: bool, sinks) -> Tensor: ...


class RunningVisit:
    """One visit of one span: answers the calls of a block's graph (:class:`depthpass.capture.calls.Visit`).

    The slot is read when the visit is made, so running the block again (activation checkpointing) gives the same.
    """

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool):
        self.op, self.host, self.state, self.span, self.masks, self.keep = op, host, state, span, masks, keep
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.before = state.slots.get(op["slot"])
        self.shared = None if op["keys"] is None else state.slots[op["keys"]]
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.hidden: Tensor | None = None

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        site = self.sites[number]
        if self.op["keys"] is not None and self.op["gate"] is None:
            k, v = self.shared.keys[number], self.shared.values[number]
        else:
            if self.before is not None:
                k = torch.cat((self.before.keys[number], k), 2)
                v = torch.cat((self.before.values[number], v), 2)
            elif self.keep:
                # As a stock cache stores them; the strides decide the last bits of a matrix product.
                k, v = k.contiguous(), v.contiguous()
            self.made[number] = (k, v)
        if self.op["gate"] is not None:
            return self._gated(site, number, q, k, v, sinks)
        mask, causal = self.masks.get(site.window, site.chunk)
        return self.host.attention(self.index, site, q, k, v, mask, causal, sinks)

    def _gated(self, site: Site, number: int, q, k, v, sinks) -> Tensor:
        """PLT: g * Attn(shared keys) + (1 - g) * Attn(own last W keys), per head and token, before o_proj."""
        mask, causal = self.masks.get(site.window, site.chunk)
        far = self.host.attention(
            self.index, site, q, self.shared.keys[number], self.shared.values[number], mask, causal, sinks
        )
        window = min(self.op["window"], site.window or self.op["window"])
        mask, causal = self.masks.get(window, site.chunk)
        near = self.host.attention(self.index, site, q, k, v, mask, causal, sinks)
        return self._mix(q, far, near)

    def _mix(self, q: Tensor, far: Tensor, near: Tensor) -> Tensor:
        gate = self.host.module(self.op["gate"])
        score = gate(q.transpose(1, 2)) if self.op["gate_input"] == "query" else gate(self.hidden)
        g = torch.sigmoid(score)[..., None].to(far.dtype)
        return g * far + (1 - g) * near

    def submodule(self, path: str, *args: Tensor) -> Tensor:
        return self.host.submodule(self.index, path, *args)

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.span.start, self.span.start + self.span.count, device=device)

    def commit(self) -> None:
        """Store the slot; called once, after the block has run."""
        if self.keep and self.made:
            order = range(len(self.sites))
            self.state.slots[self.op["slot"]] = Slot(
                tuple(self.made[i][0] for i in order), tuple(self.made[i][1] for i in order)
            )


def run(
    schedule: Schedule,
    host: Host,
    hidden: Tensor,
    sides: Sequence[Tensor],
    side_axes: Sequence[int | None],
    state: State,
    valid: Tensor | None,
    keep: bool,
    types: dict[str, Type] | None = None,
    lowering: str = "eager",
) -> tuple[dict[str, Tensor], State]:
    """Advance a state by the tokens of ``hidden``.

    Args:
        hidden: the embedded new tokens, ``[batch, m, width]``.
        sides: the prologue's per-token tables for the new tokens.
        valid: validity of all columns, old and new, ``[batch, state.length + m]``; None = no padding anywhere.
        keep: whether the returned state is needed (a cache, not just a forward pass).
        lowering: a rung of :data:`depthpass_lowering.ladder.RUNGS`.

    Returns:
        the streams of ``output`` and of every tap by name (``output`` for the output), and the new state. The state
        passed in is unchanged.
    """
    from depthpass_lowering.ladder import rung

    return rung(lowering)(schedule, host, hidden, sides, side_axes, state.fork(), valid, keep, types).run()


class Run:
    """One advance of a state: the eager rung; faster rungs override how regions and visits run."""

    def __init__(self, schedule, host, hidden, sides, side_axes, state, valid, keep, types):
        self.schedule, self.host, self.hidden = schedule, host, hidden
        self.program: Program = schedule.program
        self.sides, self.side_axes = tuple(sides), tuple(side_axes)
        self.state, self.valid, self.keep = state, valid, keep
        self.types = types or infer(self.program)
        self.length, self.count = state.length, hidden.shape[1]
        self.env: dict[str, Tensor] = {}
        self.out: dict[str, Tensor] = {}

    def run(self) -> tuple[dict[str, Tensor], State]:
        needed = [set(a for o in r.ops for a in o.args) for r in self.schedule.regions]
        for i, region in enumerate(self.schedule.regions):
            later = set().union(*needed[i + 1 :]) if needed[i + 1 :] else set()
            self._region(region, later)
        self.state.length += self.count
        self.state.valid = self.valid
        return self.out, self.state

    def _region(self, region: Region, later: set[str]) -> None:
        inputs = {a: self.env[a] for o in region.ops for a in o.args if a in self.env}
        # Slots of parallel regions are only needed by a later call; those of serial ones by the next chunk.
        keep = self.keep or region.serial or any(o.kind == "block" and o["keys"] is not None for o in region.ops)
        self.env |= self._loop(region, inputs, {o.name for o in region.ops if o.name in later}, keep)

    def _loop(self, region: Region, inputs: dict[str, Tensor], wanted: set[str], keep: bool) -> dict[str, Tensor]:
        """Run a region chunk by chunk; returns the wanted streams over all tokens."""
        cut = spans(self.length, self.count, self.valid, None, region.chunk)
        sizes = [span.count for span in cut]
        pieces = {name: x.split(sizes, 1) for name, x in inputs.items()}
        sides = [[s] * len(cut) if axis is None else s.split(sizes, axis) for s, axis in zip(self.sides, self.side_axes)]
        done: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for i, span in enumerate(cut):
            local = {name: parts[i] for name, parts in pieces.items()}
            masks = Masks(
                span.start, span.count,
                None if self.valid is None else self.valid[:, : span.start + span.count], self.hidden.device,
            )
            tables = [parts[i] for parts in sides]
            for o in region.ops:
                if o.kind == "delay":
                    line = self._line(o, self.hidden)
                    local[o.name] = read_delay(line, local.get(o.args[0]), o["tokens"], span)
                    continue
                result = self._op(o, [local[x] for x in o.args], span, masks, tables, keep)
                if o.name:
                    local[o.name] = result
            for o in region.ops:
                if o.kind == "delay":
                    line = self._line(o, self.hidden)
                    self.state.lines[o.name] = push_delay(line, local[o.args[0]], o["tokens"], span, self.state.record)
            for name, parts in done.items():
                parts.append(local[name])
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in done.items()}

    def _line(self, o: Op, like: Tensor) -> Tensor:
        line = self.state.lines.get(o.name)
        if line is None:
            line = like.new_zeros(self.hidden.shape[0], o["tokens"], self.types[o.name].width)
            self.state.lines[o.name] = line
        return line

    def _op(self, o: Op, args: list[Tensor], span: Span, masks: Masks, sides, keep: bool) -> Tensor | None:
        kind = o.kind
        if kind == "embed":
            return self.hidden if span.count == self.count else self.hidden.narrow(1, span.start - self.length, span.count)
        if kind == "block":
            return self._block(o, args[0], span, masks, sides, keep)
        if kind == "add":
            return self._add(o, args, span)
        if kind == "linear":
            return self.host.module(o["name"])(args[0] if len(args) == 1 else torch.cat(args, -1))
        if kind == "norm":
            return self.host.norm(args[0])
        if kind == "scale":
            return args[0] * o["by"]
        if kind == "mul":
            return args[0] * args[1]
        if kind == "act":
            return ACTIVATIONS[o["fn"]](args[0])
        if kind == "weigh":
            return self.host.module(o["name"])(args[0])
        if kind == "rms":
            y = args[0] * torch.rsqrt(args[0].pow(2).mean(-1, keepdim=True) + o["eps"])
            return self.host.module(o["name"])(y) if o["name"] else y
        if kind == "zeros":
            return self.hidden.new_zeros(self.hidden.shape[0], span.count, o["width"] or self.program.width)
        if kind == "output":
            self.out["output"] = args[0]
            return None
        if kind == "tap":
            self.out[o["name"]] = args[0]
            return None
        raise LoweringError(f"op {kind!r} cannot be run by the eager lowering yet.")

    def _block(self, o: Op, x: Tensor, span: Span, masks: Masks, sides, keep: bool) -> Tensor:
        visit = self._visit(o, span, masks, keep)
        visit.hidden = x
        y = self.host.block(o["index"], visit, x, [sides[s] for s in self.host.sides_of(o["index"])])
        visit.commit()
        return y

    def _visit(self, o: Op, span: Span, masks: Masks, keep: bool) -> RunningVisit:
        return RunningVisit(o, self.host, self.state, span, masks, keep)

    def _add(self, o: Op, args: list[Tensor], span: Span) -> Tensor:
        """Sum; a summand that is absent where the result is present adds nothing there."""
        total, base = None, self.types[o.name].absent
        order = sorted(range(len(args)), key=lambda i: self.types[o.args[i]].absent > base)
        for i in order:
            x, absent = args[i], self.types[o.args[i]].absent
            if absent > base:
                present = span.present(absent)
                if present is not True:
                    mask = present if isinstance(present, Tensor) else torch.zeros(1, span.count, dtype=torch.bool)
                    x = torch.where(mask.to(x.device)[..., None], x, x.new_zeros(()))
            total = x if total is None else total + x
        return total


__all__ = ["Host", "RunningVisit", "column_mask", "run", "sdpa_attention"]
