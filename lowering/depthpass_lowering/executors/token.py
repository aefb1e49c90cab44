"""One decoded token as one graph: the column it stands at is a tensor, and keys and values lie in static rooms.

The run below is not executed token by token: it is traced once per capacity and compiled, after which a step is one call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from depthpass_kernels.few_rows.build import TYPES, obstacle
from depthpass_kernels.few_rows.ops import few_queries_op
from torch import Tensor

from depthpass.ir.definitions import STEP
from depthpass.ir.ops import unfit
from depthpass.ir.program import Op, Program
from depthpass.lowered.build import lower
from depthpass.lowered.program import LoweredProgram
from depthpass.schedule.stacking import StepOrder
from depthpass_lowering.executors.context import CallContext
from depthpass_lowering.executors.eager import Run
from depthpass_lowering.state.slots import Slot, Span, State
from depthpass_lowering.visits.attention import Masks, column_mask
from depthpass_lowering.visits.cut import block_facts
from depthpass_lowering.visits.running import RunningVisit

SMALLEST = 256
"""Columns of the smallest room. StaticCache double, so a decode of n tokens compiles about log2(n / SMALLEST) steps."""


MOST_QUERIES = 8
"""Queries of one key head up to which a decoded token's attention on a CPU is a kernel of few queries."""


def refusal(program: Program) -> str | None:
    """Why a token of this program cannot be one compiled graph, or None."""
    reason = unfit(program, STEP)
    return reason and f"{reason}, whose shapes or numbers depend on data or on the place in the row"


def capacity(columns: int) -> int:
    """Columns of the room for so many tokens."""
    size = SMALLEST
    while size < columns:
        size *= 2
    return size


class StaticCache:
    """Static keys and values of every slot, written column by column.

    Attributes:
        slots: per slot and attention call ``(k, v)``, each ``[batch, kv_heads, capacity, dim]``; columns behind those in
            use are zero.
        used: columns written. A state whose length differs has been left behind and must not write here.
    """

    def __init__(self, slots: dict[int, tuple[tuple[Tensor, Tensor], ...]], used: int):
        self.slots, self.used = slots, used

    @classmethod
    def of(cls, state: State, columns: int) -> StaticCache:
        """StaticCache of a state with space for so many columns: its own where it has them, else copies."""
        slots = state.slots
        if isinstance(slots, StepSlots) and slots.rooms.used == state.length and slots.rooms.columns == columns:
            return slots.rooms

        def room(t: Tensor, first: int) -> Tensor:
            wide = t.new_zeros(*t.shape[:2], columns, t.shape[3])
            wide[:, :, first : first + t.shape[2]] = t
            return wide

        return cls(
            {
                number: tuple((room(k, slot.first), room(v, slot.first)) for k, v in zip(slot.keys, slot.values))
                for number, slot in slots.items()
            },
            state.length,
        )

    @property
    def columns(self) -> int:
        return next(iter(self.slots.values()))[0][0].shape[2]

    def tensors(self) -> list[Tensor]:
        return [t for pairs in self.slots.values() for pair in pairs for t in pair]

    def like(self, tensors: Sequence[Tensor]) -> StaticCache:
        """The same rooms in other tensors, in the order of :meth:`tensors`."""
        left = iter(tensors)
        return StaticCache({n: tuple((next(left), next(left)) for _ in pairs) for n, pairs in self.slots.items()}, self.used)


class StepSlots(Mapping[int, Slot]):
    """Slots of a state that lies in rooms, cut to its length when somebody looks."""

    def __init__(self, rooms: StaticCache, length: int):
        self.rooms, self.length = rooms, length

    def __getitem__(self, number: int) -> Slot:
        pairs = self.rooms.slots[number]
        return Slot(tuple(k[:, :, : self.length] for k, _ in pairs), tuple(v[:, :, : self.length] for _, v in pairs))

    def __iter__(self) -> Iterator[int]:
        return iter(self.rooms.slots)

    def __len__(self) -> int:
        return len(self.rooms.slots)


class StepMasks(Masks):
    """Masks of one token at a column that is a tensor, against whole rooms.

    Args:
        at: the column, ``[1]``.
        valid: ``[batch, columns]``; None = no padding.
    """

    def __init__(self, at: Tensor, columns: int, valid: Tensor | None):
        super().__init__(0, 1, valid, at.device)
        self.at, self.columns = at, columns

    def _make(self, window: int | None, chunk: int | None, first: int) -> tuple[Tensor, bool]:
        k = torch.arange(self.columns, device=self.device)[None, None]
        return column_mask(self.at[None, None], k, window, chunk, self.valid, self.row_start)[:, None], False


class StepVisit(RunningVisit):
    """A visit of one token that writes its keys and values into its room and reads whole rooms."""

    in_order = False  # a room holds more than the last tokens

    def __init__(self, op: Op, host, state: State, span: Span, masks: StepMasks):
        self.op, self.host, self.state, self.span, self.masks, self.keep = op, host, state, span, masks, True
        self.index = op["index"]
        self.sites = host.sites_of(self.index)
        self.before = state.slots[op["slot"]] if self.writes else None
        self.shared = state.slots[op["keys"]] if self.shares else None
        self.hidden = None

    def extend(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self.before
        assert held is not None
        own_k, own_v = held.keys[number], held.values[number]
        return own_k.index_copy_(2, self.masks.at, k.to(own_k.dtype)), own_v.index_copy_(2, self.masks.at, v.to(own_v.dtype))

    def shared_mask(self, number: int) -> tuple[Tensor | None, bool]:
        return self.masks.get(*self.limits(number))

    def attention(self, number: int, q, k, v, sinks, mask: tuple[Tensor, bool]) -> Tensor:
        site = self.sites[number]
        groups = q.shape[1] // k.shape[1]
        if sinks is not None or site.softcap is not None:
            return super().attention(number, q, k, v, sinks, mask)
        # The heads that share keys are queries of one head: nothing is repeated.
        b, h, count, d = q.shape
        # Several queries where visits are stacked: all stand at the same column.
        seen = mask[0][:, :, :1]
        q, k, v = q.reshape(b, h // groups, groups * count, d), k.to(q.dtype), v.to(q.dtype)
        if q.device.type == "cpu" and q.dtype in TYPES and groups * count <= MOST_QUERIES and obstacle(q.dtype) is None:
            # The library's kernel, made for long rows of queries, costs as much as several products of one row.
            out = few_queries_op(q, k, v, seen, site.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=site.scale)
        return out.reshape(b, h, count, out.shape[-1]).transpose(1, 2)

    def columns(self, device: torch.device) -> Tensor:
        return self.masks.at

    def commit(self) -> None:
        """StaticCache are written by the attention itself."""


class StepRun(Run):
    """One token of a program against static rooms; every number that changes from token to token is a tensor.

    Args:
        context: of one token behind a state that begins with its rooms.
        at: the token's column, ``[1]``.
        rank: real tokens before it in its row, ``[batch, 1]``.
    """

    def __init__(self, context: CallContext, rooms: StaticCache, lines: Mapping[str, Tensor], at: Tensor, rank: Tensor):
        slots = {n: Slot(tuple(k for k, _ in pairs), tuple(v for _, v in pairs)) for n, pairs in rooms.slots.items()}
        super().__init__(context, State(slots=slots, lines=dict(lines)))
        self.at, self.rank, self.columns = at, rank, rooms.columns

    def lowered(self) -> LoweredProgram:
        schedule = self.context.schedule
        step = self._step() or StepOrder(1, tuple(o for region in schedule.regions for o in region.ops))
        return lower(schedule, "token", "inductor", step=step, facts=functools.partial(block_facts, self.host))

    def _at_once(self) -> tuple[Span, StepMasks]:
        return Span(0, 1, None, self.rank), StepMasks(self.at, self.columns, self.context.valid)

    def _visit(self, o: Op, span: Span, masks: StepMasks, keep: bool) -> StepVisit:
        return StepVisit(o, self.host, self.state, span, masks)
