"""Packed rows: several sequences behind each other in one row, each of them a row of its own to the program.

Padding-free training (``DataCollatorWithFlattening``, TRL's ``packing=True``) lays short examples end to end and says where
each one starts: by ``position_ids`` that restart, or by the keywords of variable-length attention. The start of a segment is
the start of a row for everything that crosses tokens, whatever it is (attention, delays, routes, pads, noise, loop counts
that follow n), so a packed call runs its segments as rows and puts the results back where the segments were. Segments of
similar length run together; what is padded between them is at most as much again as the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, maybe_get_bdim

from depthpass.errors import InputError

LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
WORDS = (*LENGTHS, *LONGEST, "seq_idx")
"""Keywords of a call that say where segments start."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some segments as rows of their own.

    Attributes:
        segments: which ones, by their number in the call, ``[rows]``.
        source: the column that each of their columns is, among all columns of the call laid end to end, ``[rows, columns]``.
        valid: which of these are tokens of the segment, ``[rows, columns]``; None = all.
    """

    segments: Tensor
    source: Tensor
    valid: Tensor | None

    def take(self, x: Tensor, fill: float | None = None) -> Tensor:
        """A value per column of the call, ``[batch, tokens, ...]``, as ``[rows, columns, ...]``.

        Args:
            fill: what stands where there is no token; None = anything.
        """
        taken = x.flatten(0, 1).index_select(0, self.source.flatten()).unflatten(0, self.source.shape)
        if fill is None or self.valid is None:
            return taken
        return taken.masked_fill(~self.valid.view(*self.valid.shape, *[1] * (taken.dim() - 2)), fill)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the segments of a packed call lie.

    Attributes:
        starts: the first token of every segment, ``[batch, tokens]`` bool.
        real: tokens that are no padding, ``[batch, tokens]``; None = all.
    """

    starts: Tensor
    real: Tensor | None

    @cached_property
    def first(self) -> Tensor:
        """Column of each segment's first token among all columns laid end to end, ``[segments]``."""
        return self.starts.flatten().nonzero()[:, 0]

    @cached_property
    def number(self) -> Tensor:
        """Segment that each column lies in or behind, ``[batch * tokens]``; 0 also before the first one."""
        return (self.starts.flatten().cumsum(0) - 1).clamp_min(0)

    @cached_property
    def place(self) -> Tensor:
        """Column of each column in its segment, ``[batch * tokens]``."""
        return torch.arange(len(self.number), device=self.number.device) - self.first[self.number]

    @cached_property
    def widths(self) -> Tensor:
        """Columns from each segment's first token to its last one, ``[segments]``."""
        own = self._begun if self.real is None else self._begun & self.real.flatten()
        widths = torch.zeros_like(self.first)
        return widths.scatter_reduce_(0, self.number[own], self.place[own] + 1, "amax")

    @cached_property
    def inside(self) -> Tensor:
        """Which columns lie in a segment, ``[batch * tokens]``: neither before a row's first token nor behind its last."""
        return self._begun & (self.place >= 0) & (self.place < self.widths[self.number])

    @cached_property
    def _begun(self) -> Tensor:
        return (self.starts.cumsum(1) > 0).flatten()

    @property
    def positions(self) -> Tensor:
        """Columns counted from the start of each segment, ``[batch, tokens]``; 0 in padding."""
        return torch.where(self.inside, self.place, 0).view(self.starts.shape)

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens of each segment, padding inside it left out."""
        own = self.inside if self.real is None else self.inside & self.real.flatten()
        return torch.zeros_like(self.first).index_add_(0, self.number[own], torch.ones_like(self.number[own])).tolist()

    def rows(self, segments: Tensor | None, together: bool = False, powers: bool = False) -> list[Rows]:
        """Segments as rows, in groups of similar width.

        Args:
            segments: which ones; None = all.
            together: put all into one group, however much padding that takes.
            powers: groups of 1, 2, 4, 8, ... rows only: what is compiled for a number of rows meets few numbers.
        """
        widths = self.widths.tolist()
        wanted = list(range(len(widths))) if segments is None else segments.tolist()
        groups = [wanted] if together else _similar(wanted, widths)
        if powers:
            groups = [part for g in groups for part in _powers(g)]
        return [self._group(g, max(widths[i] for i in g)) for g in groups]

    def fixed_rows(self, count: int) -> list[Rows]:
        """All segments in groups of exactly so many rows, the last one filled up with copies of one of its segments."""
        widths = self.widths.tolist()
        order = sorted(range(len(widths)), key=lambda i: -widths[i])
        groups = [order[i : i + count] for i in range(0, len(order), count)]
        return [self._group(g + g[-1:] * (count - len(g)), widths[g[0]]) for g in groups]

    def _group(self, segments: list[int], columns: int) -> Rows:
        return self._rows(torch.tensor(segments, device=self.first.device), columns)

    def _rows(self, segments: Tensor, columns: int) -> Rows:
        places = torch.arange(columns, device=segments.device)[None]
        widths = self.widths[segments][:, None]
        source = self.first[segments][:, None] + torch.minimum(places, widths - 1)
        valid = places < widths
        if self.real is not None:
            valid = valid & self.real.flatten()[source]
        return Rows(segments, source, None if bool(valid.all()) else valid)

    def join(self, parts: Sequence[tuple[Rows, Tensor]]) -> Tensor:
        """Streams of all segments, ``[rows, columns, ...]`` each, back in the call's columns: ``[batch, tokens, ...]``.

        Columns in no segment are 0.
        """
        at, width, offset = torch.zeros_like(self.first), torch.ones_like(self.first), 0
        for rows, x in parts:
            count, columns = x.shape[:2]
            at[rows.segments] = offset + torch.arange(count, device=at.device) * columns
            width[rows.segments], offset = columns, offset + count * columns
        whole = torch.cat([x.flatten(0, 1) for _, x in parts])
        index = at[self.number] + self.place.clamp_min(0).minimum(width[self.number] - 1)
        joined = whole.index_select(0, index)
        if not bool(self.inside.all()):
            inside = self.inside.view(-1, *[1] * (joined.dim() - 1))
            joined = torch.where(inside, joined, joined.new_zeros(()))
        return joined.unflatten(0, self.starts.shape)


def _similar(segments: list[int], widths: Sequence[int]) -> list[list[int]]:
    """Groups in which padding takes no more columns than the segments themselves, longest first."""
    groups: list[list[int]] = []
    columns = filled = 0
    for i in sorted(segments, key=lambda i: -widths[i]):
        if not groups or (len(groups[-1]) + 1) * columns > 2 * (filled + widths[i]):
            groups.append([])
            columns, filled = widths[i], 0
        groups[-1].append(i)
        filled += widths[i]
    return groups


def _powers(group: list[int]) -> list[list[int]]:
    """A group cut into parts whose sizes are powers of two, largest first."""
    parts = []
    while group:
        size = 1 << len(group).bit_length() - 1
        parts.append(group[:size])
        group = group[size:]
    return parts


def find_packing(
    words: Mapping[str, object], positions: Tensor | None, real: Tensor | None, gaps: bool, shape: tuple[int, int],
    device: torch.device,
) -> Packing | None:
    """Where segments start in a call; None = every row is one sequence.

    Args:
        words: those of :data:`WORDS` that the call has.
        positions: ``position_ids`` of the call, ``[batch, tokens]``; None = it has none. Positions on the meta device say
            nothing.
        real: tokens that are no padding, ``[batch, tokens]``; None = all.
        gaps: whether positions that leave numbers out go on with the same sequence, as they do in a call with a 2-D mask;
            otherwise they start another one, as transformers has it.
        shape: of the call, batch and tokens.

    Raises:
        InputError: boundaries that do not fit the call, or that contradict each other.
    """
    told = _told(words, shape, device)
    restarts = None if positions is None or positions.is_meta else _restarts(positions, real, gaps or told is not None)
    if told is None and restarts is None:
        return None
    starts = restarts if told is None else _first_tokens(told, real)
    assert starts is not None
    if restarts is not None and bool((lost := restarts & ~starts).any()):
        row, column = lost.nonzero()[0].tolist()
        raise InputError(
            f"position_ids: restart at column {column} of row {row}, where {', '.join(w for w in WORDS if w in words)} let the "
            "same sequence go on. Let both say where sequences start, or leave one out."
        )
    return Packing(starts, real) if bool((starts.sum(-1) > 1).any()) else None


def check_batched(positions: Tensor, gaps: bool) -> None:
    """Refuse packed rows under vmap, whose segments would be of another number in each batch.

    Raises:
        InputError: positions restart.
    """
    while is_batchedtensor(positions):
        dim = maybe_get_bdim(positions)
        positions = get_unwrapped(positions).movedim(dim, 0)
    steps = positions.diff(dim=-1)
    if bool((steps <= 0 if gaps else steps != 1).any()):
        raise InputError("position_ids: restart inside a row (packed sequences) under torch.func.vmap, where rows cannot be cut "
                         "into their sequences. Put one sequence in each row.")


def _restarts(positions: Tensor, real: Tensor | None, gaps: bool) -> Tensor:
    """Real tokens that no real token comes before, or one whose position they do not follow: ``[batch, tokens]``."""
    columns = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    last = columns if real is None else torch.where(real, columns, -1).cummax(-1).values
    before = torch.nn.functional.pad(last, (1, -1), value=-1)
    steps = positions - positions.gather(1, before.clamp_min(0))
    starts = (before < 0) | (steps <= 0 if gaps else steps != 1)
    return starts if real is None else starts & real


def _first_tokens(boundaries: Tensor, real: Tensor | None) -> Tensor:
    """The first real token at or behind each boundary, before the next one: ``[batch, tokens]``."""
    if real is None:
        return boundaries
    segment = boundaries.cumsum(-1)
    # Segment of the last real token before each column; 0 = none.
    last = torch.nn.functional.pad(torch.where(real, segment, 0).cummax(-1).values, (1, -1))
    return real & (segment != last)


def _told(words: Mapping[str, object], shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """Columns at which a sequence starts by the keywords of a call, ``[batch, tokens]``; None = they say nothing."""
    given = {n: v for n, v in words.items() if v is not None}
    said = {}
    if any(n in given for n in LENGTHS):
        said["cu_seq_lens_q"] = _by_lengths(given, shape, device)
    if "seq_idx" in given:
        said["seq_idx"] = _by_numbers(given["seq_idx"], shape, device)
    if len(said) == 2 and not torch.equal(said["cu_seq_lens_q"], said["seq_idx"]):
        raise InputError("seq_idx: numbers other sequences than cu_seq_lens_q says. Leave one of them out.")
    starts = next(iter(said.values()), None)
    _check_longest(given, starts, shape)
    return starts


def _by_lengths(given: Mapping[str, object], shape: tuple[int, int], device: torch.device) -> Tensor:
    """Boundaries from cumulative lengths over all rows laid end to end."""
    lengths = [_numbers(n, given[n], 1, device) for n in LENGTHS if n in given]
    if len(lengths) == 2 and not torch.equal(*lengths):
        raise InputError("cu_seq_lens_k: differs from cu_seq_lens_q; expected keys of the same sequences as the queries.")
    ends, total = lengths[0], shape[0] * shape[1]
    name = next(n for n in LENGTHS if n in given)
    listed = ends.tolist()
    if len(listed) < 2 or listed[0] != 0 or listed[-1] != total or listed != sorted(listed):
        raise InputError(f"{name}: expected cumulative lengths from 0 to {total}, the call's tokens, got {_short(listed)}.")
    starts = torch.zeros(total + 1, dtype=torch.bool, device=device).index_fill_(0, ends, True)[:-1].view(shape)
    if not bool(starts[:, 0].all()):
        raise InputError(f"{name}: a sequence goes over the end of a row; expected boundaries at multiples of {shape[1]}, the "
                         f"columns of a row, got {_short(listed)}.")
    return starts


def _by_numbers(value: object, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Boundaries from the number of each token's sequence."""
    numbers = _numbers("seq_idx", value, 2, device)
    if tuple(numbers.shape) not in (shape, (1, shape[1])):
        raise InputError(f"seq_idx: expected shape {shape}, got {tuple(numbers.shape)}.")
    starts = torch.nn.functional.pad(numbers.diff(dim=-1) != 0, (1, 0), value=True)
    return starts.expand(shape)


def _check_longest(given: Mapping[str, object], starts: Tensor | None, shape: tuple[int, int]) -> None:
    """Variable-length attention cuts sequences at these lengths: they have to be lengths that nothing exceeds."""
    for name in LONGEST:
        if name not in given:
            continue
        if starts is None:
            raise InputError(f"{name}: expected cu_seq_lens_q and cu_seq_lens_k with it, which say where sequences start.")
        edges = torch.cat((starts.flatten().nonzero()[:, 0], starts.new_tensor([shape[0] * shape[1]], dtype=torch.long)))
        longest, told = int(edges.diff().max()), int(given[name])  # type: ignore[call-overload]
        if told < longest:
            raise InputError(f"{name}: expected at least {longest}, the length of the longest sequence, got {told}.")


def _numbers(name: str, value: object, dims: int, device: torch.device) -> Tensor:
    numbers = torch.as_tensor(value, device=device)
    if numbers.is_meta or numbers.dim() != dims or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise InputError(f"{name}: expected integers in {dims} dimension{'s' * (dims > 1)}, got {numbers.dtype} of shape "
                         f"{tuple(numbers.shape)} on {numbers.device}.")
    return numbers.long()


def _short(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return f"[{shown}, ..., {numbers[-1]}]" if len(numbers) > 5 else str(numbers)
