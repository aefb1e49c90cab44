"""Caches that keep keys and values of later iterations as small residuals against the first iteration's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from depthpass.analysis.kv import BITS, group_of, later_slots
from depthpass.errors import CacheError, InputError

if TYPE_CHECKING:
    from depthpass_lowering.state import Grown, Slot, State

    from depthpass.ir.program import Program


def check_bits(bits: Any) -> None:
    """Raise InputError for a number of bits that residuals cannot be kept in."""
    if bits is not None and (isinstance(bits, float) or bits not in BITS):
        raise InputError(f"residual_bits: expected {' or '.join(map(str, BITS))}, or None for whole keys, got {bits!r}.")


@dataclass(frozen=True)
class Packed:
    """Numbers in groups, each between its least value and that plus ``2**bits - 1`` steps of its scale.

    Attributes:
        codes: ``[batch, heads, tokens, width * bits / 8]`` uint8.
        scale, least: ``[batch, heads, tokens, groups]``.
    """

    codes: Tensor
    scale: Tensor
    least: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int) -> Packed:
        """Pack ``[batch, heads, tokens, width]``, rounding to the nearest step."""
        width = x.shape[-1]
        grouped = x.unflatten(-1, (-1, group_of(width)))
        least, most = grouped.amin(-1), grouped.amax(-1)
        scale = (most - least) / (2**bits - 1)
        codes = ((grouped - least[..., None]) / scale.clamp(min=torch.finfo(x.dtype).tiny)[..., None]).round()
        codes = codes.clamp(0, 2**bits - 1).flatten(-2).to(torch.uint8)
        per = 8 // bits
        if missing := -width % per:
            codes = torch.nn.functional.pad(codes, (0, missing))
        shifts = torch.arange(per, device=x.device, dtype=torch.uint8) * bits
        packed = (codes.unflatten(-1, (-1, per)) << shifts).sum(-1, dtype=torch.uint8)
        return cls(packed, scale, least, bits)

    def whole(self, width: int) -> Tensor:
        """The numbers again, ``[batch, heads, tokens, width]``."""
        per = 8 // self.bits
        shifts = torch.arange(per, device=self.codes.device, dtype=torch.uint8) * self.bits
        codes = ((self.codes[..., None] >> shifts) & (2**self.bits - 1)).flatten(-2)[..., :width]
        grouped = codes.to(self.scale.dtype).unflatten(-1, (self.scale.shape[-1], -1))
        return (grouped * self.scale[..., None] + self.least[..., None]).flatten(-2)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Packed:
        return Packed(fn(self.codes), fn(self.scale), fn(self.least), self.bits)

    def joined(self, other: Packed) -> Packed:
        """These tokens, then others."""
        codes, scale, least = (torch.cat(pair, 2) for pair in zip(
            (self.codes, self.scale, self.least), (other.codes, other.scale, other.least)
        ))
        return Packed(codes, scale, least, self.bits)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.least.nbytes


@dataclass(frozen=True)
class ResidualSlot:
    """A slot whose keys and values are those of another slot plus what is kept here; stands in a state as a slot does.

    Attributes:
        parts: residuals of keys and values, per attention call.
        base: the slot that they are residuals of; None = not in a cache now.
    """

    parts: tuple[tuple[Packed, Packed], ...]
    base: Slot | None = None
    columns = valid = places = ragged = None
    first = 0

    @property
    def length(self) -> int:
        return self.parts[0][0].codes.shape[2]

    def _one(self, side: int, number: int) -> Tensor:
        if self.base is None:
            raise CacheError("this slot holds residuals of keys, which only a DepthCache can read. Use cache.layers[i].keys.")
        like = (self.base.keys, self.base.values)[side][number][:, :, : self.length]
        return like + self.parts[number][side].whole(like.shape[-1]).to(like)

    @property
    def keys(self) -> tuple[Tensor, ...]:
        return tuple(self._one(0, i) for i in range(len(self.parts)))

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(self._one(1, i) for i in range(len(self.parts)))

    def map(self, fn: Callable[[Tensor], Tensor]) -> ResidualSlot:
        return ResidualSlot(tuple((k.map(fn), v.map(fn)) for k, v in self.parts))

    def grown(self, number: int, k: Tensor, v: Tensor, last: int | None = None) -> Grown:
        """Whole keys and values with new ones behind them; the new ones are packed when the slot is stored."""
        return torch.cat((self._one(0, number), k), 2), torch.cat((self._one(1, number), v), 2), None

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.parts)


class ResidualSlots(dict):
    """Slots of a state: what is stored in one of a later iteration is packed against the first iteration's.

    A call that runs in chunks or passes stores a slot several times and reads it in between, whole: :meth:`settle` packs it once
    the call is over.

    Attributes:
        bases: slots that are packed, with the slots they are packed against.
        errors: by slot, the squared error and the squared sum of what was packed.
        packed: what a running call has stored over, as it was packed.
    """

    def __init__(self, slots: Mapping[int, Any], bases: Mapping[int, int], bits: int, errors: dict[int, Tensor]):
        super().__init__()
        self.bases, self.bits, self.errors = bases, bits, errors
        self.packed: dict[int, ResidualSlot] = {}
        for number in slots:
            self[number] = dict.__getitem__(slots, number) if isinstance(slots, dict) else slots[number]
        self.settle()

    def __setitem__(self, number: int, slot: Any) -> None:
        if isinstance(slot, ResidualSlot):
            self.packed.pop(number, None)
            slot = replace(slot, base=None)
        elif isinstance(old := super().get(number), ResidualSlot):
            self.packed[number] = old
        super().__setitem__(number, slot)

    def settle(self) -> None:
        """Pack what was stored whole."""
        for number in self.bases:
            slot = super().get(number)
            if slot is not None and not isinstance(slot, ResidualSlot) and slot.columns is None and not slot.first:
                super().__setitem__(number, self._packed(number, slot))
        self.packed.clear()

    def _packed(self, number: int, slot: Any) -> ResidualSlot:
        base, old = super().__getitem__(self.bases[number]), cast(Any, self.packed.get(number))
        start = old.length if isinstance(old, ResidualSlot) and old.length <= slot.keys[0].shape[2] else 0
        parts = []
        for i, (k, v) in enumerate(zip(slot.keys, slot.values)):
            new = []
            for side, (x, whole) in enumerate(((k, base.keys[i]), (v, base.values[i]))):
                residual = x[:, :, start:] - whole[:, :, start : x.shape[2]]
                packed = Packed.of(residual, self.bits)
                self._see(number, x[:, :, start:], residual - packed.whole(x.shape[-1]))
                new.append(packed if not start else old.parts[i][side].joined(packed))
            parts.append(tuple(new))
        return ResidualSlot(tuple(parts))

    def _see(self, number: int, x: Tensor, error: Tensor) -> None:
        # Summed where it is: reading it would wait for the device at every visit.
        now = torch.stack((error.detach().float().square().sum(), x.detach().float().square().sum()))
        self.errors[number] = self.errors[number].to(now) + now if number in self.errors else now

    def _bound(self, number: int, slot: Any) -> Any:
        return replace(slot, base=super().__getitem__(self.bases[number])) if isinstance(slot, ResidualSlot) else slot

    def __getitem__(self, number: int) -> Any:
        return self._bound(number, super().__getitem__(number))

    def get(self, number: int, default: Any = None) -> Any:
        slot = super().get(number, default)
        return self._bound(number, slot)

    def values(self) -> Any:
        return [self[n] for n in self]

    def copy(self) -> ResidualSlots:
        """The same slots, to be advanced by themselves."""
        slots = ResidualSlots({}, self.bases, self.bits, self.errors)
        dict.update(slots, self)
        slots.packed = dict(self.packed)
        return slots


def packed_state(state: State, program: Program, bits: int, errors: dict[int, Tensor]) -> State:
    """A state whose slots of later iterations are kept as residuals.

    Raises:
        InputError: the program has none.
    """
    if isinstance(state.slots, ResidualSlots):
        return state
    bases = later_slots(program)
    if not bases:
        raise InputError(f"residual_bits={bits}: expected a program in which every token visits a block with keys of its own "
                         "again, got one without. Make the cache without it.")
    return replace(state, slots=ResidualSlots(state.slots, bases, bits, errors))
