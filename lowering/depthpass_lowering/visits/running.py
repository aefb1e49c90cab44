"""A visit: one block over one span of tokens against its slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from depthpass_kernels.gated_attention.naive import mix
from torch import Tensor, fx, nn

from depthpass.capture.captured import Template
from depthpass.errors import LoweringError
from depthpass.ir.program import Op, writes_slot
from depthpass_lowering.host import Host
from depthpass_lowering.state.slots import Grown, Slot, Span, State
from depthpass_lowering.visits.attention import Masks, column_mask
from depthpass_lowering.visits.cut import cut_for
from depthpass_lowering.visits.parts import graph_of


class RunningVisit:
    """One visit of one span: answers the calls of a block's graph (:class:`depthpass.capture.calls.Visit`).

    The slot is read when the visit is made, so running the block again (activation checkpointing) gives the same.

    Attributes:
        ring: how many of its own last keys a gated visit has to keep; None = all.
        in_order: whether its own keys are those of the last tokens, without gaps.
        factors: of a modulated visit, ``[width]`` by place.
        memory: the stream that its own keys and values come from, ``[batch, tokens, width]``; None = its input.
    """

    ring: int | None = None
    in_order = True
    factors: Mapping[str, Tensor] | None = None
    memory: Tensor | None = None
    given: Mapping[int, tuple[Tensor, Tensor]] | None = None

    def __init__(self, op: Op, host: Host, state: State, span: Span, masks: Masks, keep: bool):
        self.op, self.host, self.span, self.masks, self.keep = op, host, span, masks, keep
        self.state: State | None = state
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.before = state.slots.get(op["slot"]) if self.writes else None
        # The writer of the shared keys may run in the same call (:class:`StackedVisit`): then they are not there yet.
        shared = state.slots.get(op["keys"]) if self.shares else None
        self.shared = None if shared is None else _until(shared, span.start + span.count)
        self.extended: dict[int, Grown] = {}
        self.hidden: Tensor | None = None

    @property
    def shares(self) -> bool:
        """Whether the visit reads another one's keys."""
        return self.op["keys"] is not None

    @property
    def gated(self) -> bool:
        return self.op["gate"] is not None

    @property
    def writes(self) -> bool:
        """Whether the visit has keys of its own."""
        return writes_slot(self.op) is not None

    def run(self, template: Template, hidden: Tensor, side_inputs: Sequence[Tensor], params, runner=None) -> Tensor:
        """Run the block's graph; ``runner`` gives the callable to run a graph with (None = the graph itself)."""
        runner = runner or (lambda graph: graph)
        cut = cut_for(self.op, self.graph(template))
        if cut.keys is not None:
            source = hidden if self.memory is None else self.memory.to(hidden.device)
            values = runner(cut.keys)(self, source, *side_inputs, *params)
            self.given = {i: (values[2 * i], values[2 * i + 1]) for i in range(len(self.sites))}
        return runner(cut.rest)(self, hidden, *side_inputs, *params)

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        if self.given is not None:
            k, v = self.given[number]
        if not self.shares or self.op["update"]:  # where every token is routed, nothing is left of what others wrote
            k, v = self.extend(number, k, v)
            return self.attention(number, q, k, v, sinks, self._own_mask(k.shape[2], *self.limits(number)))
        slot = self.shared_slot
        far = self.attention(number, q, slot.keys[number], slot.values[number], sinks, self.shared_mask(number))
        if not self.gated:
            return far
        k, v = self.extend(number, k, v)
        return self.mix(q, self.hidden, far, self.near(number, q, k, v, sinks))

    @property
    def shared_slot(self) -> Slot:
        """The slot whose keys it shares."""
        assert self.shared is not None, "a visit that shares keys runs after the one that writes them"
        return self.shared

    def extend(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The visit's own keys and values, this span's last."""
        place = None
        if self.before is not None:
            # One token needs no more than it leaves behind; of several, each has a window of its own.
            k, v, place = self.before.grown(number, k, v, self.ring if self.span.count == 1 else None)
        elif self.keep and self.ring is None:
            # As a stock cache stores them; the strides decide the last bits of a matrix product.
            k, v = k.contiguous(), v.contiguous()
        if self.state is not None:
            self.extended[number] = k, v, place
        return k, v

    def near(self, number: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """A gated visit's attention to its own last keys."""
        site = self.sites[number]
        window = min(self.op["window"], site.window or self.op["window"])
        if self.span.count == 1 and site.chunk is None and self.in_order:
            # One token sees its whole window, but for pads.
            if k.shape[2] > window:
                k, v = k[:, :, -window:], v[:, :, -window:]
            return self.attention(number, q, k, v, sinks, (self.masks.last(k.shape[2]), False))
        if not self.in_order:
            return self.attention(number, q, k, v, sinks, self._own_mask(k.shape[2], window, site.chunk))

        # Stock attention functions repeat key heads by themselves and want a bool mask; SDPA need not repeat.
        plain = self.host.style == "sdpa"
        blocks = self.masks.blocks(
            window, site.chunk, k.shape[2], q.shape[1] // k.shape[1] if plain else 1, q.dtype if plain else None, len(q)
        )
        return blocks.read(q, k, v, lambda q, k, v, *mask: self.attention(number, q, k, v, sinks, mask))

    def limits(self, number: int) -> tuple[int | None, int | None]:
        """Window and chunk of the block itself."""
        return self.sites[number].window, self.sites[number].chunk

    def attention(self, number: int, q, k, v, sinks, mask: tuple[Tensor | None, bool]) -> Tensor:
        return self.host.attention(self.index, self.sites[number], q, k, v, *mask, sinks)

    def shared_mask(self, number: int) -> tuple[Tensor | None, bool]:
        """Mask of the span's queries against the shared keys, and SDPA's causal flag."""
        return self._mask(self._shared_columns(), *self.limits(number))

    def _shared_columns(self) -> tuple[Tensor, Tensor | None] | None:
        """Columns and validity of the shared keys; None = every column in order."""
        slot = self.shared_slot
        return None if slot.columns is None else (slot.columns, validity(slot, self.masks.valid))

    def _own_columns(self) -> tuple[Tensor, Tensor | None] | None:
        """The same for the visit's own keys, this span's included."""
        return None

    def _own_mask(self, keys: int, window: int | None, chunk: int | None) -> tuple[Tensor | None, bool]:
        """Mask of the span's queries against the visit's own last keys, and SDPA's causal flag."""
        where = self._own_columns()
        if where is not None:
            return self._mask(where, window, chunk)
        return self.masks.get(window, chunk, self.span.start + self.span.count - keys)

    def _mask(
        self, where: tuple[Tensor, Tensor | None] | None, window: int | None, chunk: int | None
    ) -> tuple[Tensor | None, bool]:
        """Mask of the span's queries against keys at the given columns, and SDPA's causal flag."""
        if where is None:
            return self.masks.get(window, chunk)
        columns, valid = where
        q = torch.arange(self.span.start, self.span.start + self.span.count, device=columns.device)[None, :, None]
        return column_mask(
            q, columns[:, None], window, chunk, valid, self.masks.row_start, self.masks.ahead
        )[:, None], False

    def mix(self, q: Tensor, hidden: Tensor | None, far: Tensor, near: Tensor) -> Tensor:
        """PLT: g * Attn(shared keys) + (1 - g) * Attn(own last W keys), per head and token, before o_proj."""
        gate = self.host.module(self.op["gate"])
        score = gate(q.transpose(1, 2)) if self.op["gate_input"] == "query" else gate(hidden)
        if score.shape != far.shape[:3]:
            raise LoweringError(
                f"gate {self.op['gate']!r} of block {self.index}: expected a score per token and head, "
                f"{tuple(far.shape[:3])}, got {tuple(score.shape)}: its attention has other heads than the config says. "
                "Use kv='own' or kv='first'."
            )
        return mix(far, near, score)

    def submodule(self, path: str, *args: Tensor) -> Tensor:
        return self.host.submodule(self.index, path, *args)

    def graph(self, template: Template) -> fx.GraphModule:
        """The graph of a block's template that this visit runs."""
        return graph_of(template, self.op)

    def modulate(self, place: str, x: Tensor) -> Tensor:
        assert self.factors is not None, "a modulated visit is given its factors"
        return x * self.factors[place].to(x)

    def adapt(self, names: Sequence[str], tensors: list[Tensor]) -> list[Tensor]:
        """The tensors a block is bound to, with this visit's own low-rank updates added."""
        if self.op["lora"] is None:
            return tensors
        adapted = list(tensors)
        for i, update in updates(self.op, self.host.module(self.op["lora"]), names):
            adapted[i] = adapted[i] + update().to(adapted[i].device)
        return adapted

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.span.start, self.span.start + self.span.count, device=device)

    def commit(self) -> None:
        """Store the slot; called once, after the block has run.

        Afterwards the visit forgets the state: an activation checkpoint keeps the visit, and through it would keep its own
        graph alive for ever.
        """
        state, extended = self.state, self.extended
        self.state, self.extended = None, {}
        if state is None or not self.keep or not extended:
            return
        keys, values, places = zip(*(extended[i] for i in range(len(extended))))
        first = self.span.start + self.span.count - keys[0].shape[2]
        slot = Slot(keys, values, None, None, first, places)
        state.slots[self.op["slot"]] = slot if self.ring is None else slot.last(self.ring)


def _until(slot: Slot, end: int) -> Slot:
    """A slot's entries before column ``end``: a region that ran before a token loop has written every token's."""
    if slot.columns is not None or slot.keys[0].shape[2] <= end:
        return slot
    return slot.map(lambda t: t[:, :, :end])


def validity(slot: Slot, valid: Tensor | None) -> Tensor | None:
    """Which entries of a slot with columns are real."""
    if slot.valid is not None:
        return slot.valid
    return None if valid is None else valid.gather(1, slot.listed_columns)


def updates(o: Op, lora: nn.Module, names: Sequence[str]) -> list[tuple[int, nn.Module]]:
    """The low-rank updates of a visit, each with the place of the weight that it belongs to.

    Raises:
        LoweringError: the block's graph does not read one of the weights.
    """
    # PEFT moves a wrapped weight one level down.
    place = {name.replace(".base_layer.", "."): i for i, name in enumerate(names)}
    placed = []
    for path, update in lora.named_modules():
        if not hasattr(update, "low_rank"):
            continue
        i = place.get(f"{path}.weight")
        if i is None:
            raise LoweringError(
                f"per-visit LoRA {o['lora']!r}: {path} of block {o['index']} is not read by its graph (it belongs to an "
                "experts layer, which runs as a whole). Leave lora_rank out for this model."
            )
        placed.append((i, update))
    return placed
