"""Roofline: the least time a program's matrix multiplies can take on a machine, from two ceilings.

A GEMM of ``r`` rows over ``P`` parameters takes at least ``max(2*r*P / F, itemsize*P / W)`` seconds, with F the FLOP/s
of a large GEMM and W the bytes/s at which weights stream. Below ``ridge = F*itemsize / (2*W)`` rows it is bound by its
weights. In a serial region every chunk is a GEMM of its own. Attention, norms, elementwise work, launches and the
optimizer are left out, so a floor is below every real time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from depthpass.errors import InputError, did_you_mean
from depthpass.prompt import in_notebooks


@in_notebooks
@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most.

    Attributes:
        device, dtype: what it was measured (or assumed) for.
        flops_per_s: of a large GEMM.
        bytes_per_s: at which one-row products stream weights larger than any cache.
        source: ``measured`` with its sizes, or where an assumed number comes from.
        assumed: True when nothing was measured.
    """

    device: str
    dtype: torch.dtype
    flops_per_s: float
    bytes_per_s: float
    source: str
    assumed: bool

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise InputError(f"{name}: expected a positive number, got {value!r}.")

    @property
    def ridge_rows(self) -> float:
        """Rows from which a GEMM is bound by FLOP/s and no longer by reading its weights."""
        return self.flops_per_s * self.dtype.itemsize / (2 * self.bytes_per_s)

    def gemm_seconds(self, rows: float, parameters: float, read: float | None = None, extra_bytes: float = 0) -> float:
        """Least time of a GEMM.

        Args:
            rows: tokens that go through it at once.
            parameters: weights each token is multiplied with.
            read: weights that are read, when that is not the same (experts).
            extra_bytes: further bytes per parameter (an accumulator that is read and written).
        """
        read = parameters if read is None else read
        return max(2 * rows * parameters / self.flops_per_s,
                   (self.dtype.itemsize + extra_bytes) * read / self.bytes_per_s)

    def rows(self) -> list[tuple[str, float | str, str]]:
        """(name, value, unit) for tables."""
        return [
            ("device", self.device, ""), ("dtype", str(self.dtype).removeprefix("torch."), ""),
            ("FLOP rate", self.flops_per_s, "FLOP/s"), ("weight rate", self.bytes_per_s, "byte/s"),
            ("ridge", self.ridge_rows, "row"), ("source", self.source, ""),
        ]


# Dense half-precision peaks and memory rates of the vendors' data sheets.
_PEAKS = {"a100": (312e12, 2.039e12), "h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12)}
_SUSTAINED_FLOPS, _SUSTAINED_BYTES = 0.8, 0.9


def assumed(device: str) -> Ceilings:
    """Ceilings of a known device that were not measured: 80 % of the data sheet's FLOP/s and 90 % of its bytes/s.

    Raises:
        InputError: a device that is not in the table.
    """
    name = device.lower()
    if name not in _PEAKS:
        raise InputError(
            f"unknown device {device!r}.{did_you_mean(name, _PEAKS)} Known without measuring: {', '.join(_PEAKS)}; "
            "anything else is measured on the machine itself with ceilings(device) or 'depthpass calibrate'."
        )
    flops, rate = _PEAKS[name]
    return Ceilings(
        name, torch.bfloat16, _SUSTAINED_FLOPS * flops, _SUSTAINED_BYTES * rate,
        f"assumed: {_SUSTAINED_FLOPS:.0%} of {flops / 1e12:g} TFLOP/s and {_SUSTAINED_BYTES:.0%} of "
        f"{rate / 1e12:g} TB/s of the vendor's data sheet", True,
    )


def ceilings(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    width: int | None = None,
    rows: int | None = None,
    copies: int = 24,
    repeat: int = 3,
) -> Ceilings:
    """Measure a device: a large GEMM for the FLOP rate, one-row products over many weights for the byte rate.

    Args:
        device: a torch device on this machine.
        dtype: of weights and activations.
        width: side of the square weights; 2048 on a CPU, 8192 elsewhere (large enough to hide launches).
        rows: rows of the large GEMM; half the width.
        copies: distinct weights; together they must be larger than any cache.
        repeat: timed rounds, of which the best counts.

    Raises:
        InputError: no such device here, or a dtype that is not floating point.
    """
    target = _device(device)
    if not dtype.is_floating_point:
        raise InputError(f"dtype: expected a floating point dtype, got {dtype}.")
    width = width or (2048 if target.type == "cpu" else 8192)
    rows = rows or width // 2
    for name, value in (("width", width), ("rows", rows), ("copies", copies), ("repeat", repeat)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value!r}.")
    weights = [torch.randn(width, width, device=target, dtype=dtype) for _ in range(copies)]
    wide = torch.randn(rows, width, device=target, dtype=dtype)
    calls = min(4, copies)
    large = _best(target, wide, weights[:calls], repeat)
    narrow = _best(target, wide[:1].contiguous(), weights, repeat)
    return Ceilings(
        str(target), dtype, 2 * rows * width * width / large, weights[0].nbytes / narrow,
        f"measured: GEMM {rows}x{width}x{width}, one-row products over {copies} weights of "
        f"{weights[0].nbytes / 1e6:.0f} MB", False,
    )


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device: expected a torch device of this machine, such as 'cpu' or 'cuda', got {device!r} "
            f"({str(error).splitlines()[0]})."
        ) from None
    if target.type == "meta":
        raise InputError("device: expected a device that computes, got 'meta'.")
    return target


def _best(device: torch.device, x: torch.Tensor, weights: Sequence[torch.Tensor], repeat: int) -> float:
    """Seconds of one product, best of some rounds; the first round warms up."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = math.inf
    for _ in range(repeat + 1):
        sync()
        start = time.perf_counter()
        for w in weights:
            torch.nn.functional.linear(x, w)
        sync()
        best = min(best, time.perf_counter() - start)
    return best / len(weights)


class Weights(Protocol):
    """Weights of a piece of work; see :class:`depthpass.analysis.cost.stock.Weights`."""

    def read(self, rows: float) -> float:
        """Elements that a run of so many rows reads."""
        ...


@dataclass(frozen=True)
class Dense:
    """Weights that every run reads completely."""

    elements: float

    def read(self, rows: float) -> float:
        return self.elements


@dataclass(frozen=True)
class Work:
    """The matrix multiplies of one visit, map or head, over all tokens of a sequence.

    Attributes:
        name: what it is.
        parameters: weights each token is multiplied with.
        weights: what a run reads.
        chunk: tokens per step of the token loop; None = all tokens at once.
        share: share of the tokens that take it.
        extra_tokens: tokens of a row beyond the real ones (pads).
        graded: whether the gradient flows through it.
        trained: whether its weights train.
        stack: work with the same number runs as rows of one call at decode.
    """

    name: str
    parameters: float
    weights: Weights
    chunk: int | None = None
    share: float = 1.0
    extra_tokens: int = 0
    graded: bool = True
    trained: bool = True
    stack: int | None = None


@in_notebooks
@dataclass(frozen=True)
class Floor:
    """Least times, in seconds.

    Attributes:
        forward_s: one forward pass over the sequence.
        backward_s: input and weight gradients; 0 when nothing trains.
        decode_s: one token of every row against its state.
        ceilings: what it rests on.
        tokens, batch: of the sequence.
    """

    forward_s: float
    backward_s: float
    decode_s: float
    ceilings: Ceilings
    tokens: int
    batch: int

    @property
    def step_s(self) -> float:
        """One training step, the optimizer left out."""
        return self.forward_s + self.backward_s

    def rows(self) -> list[tuple[str, float, str]]:
        """(name, value, unit) for tables."""
        return [("floor forward", self.forward_s, "s"), ("floor training step", self.step_s, "s"),
                ("floor decoded token", self.decode_s, "s")]


def floor(work: Sequence[Work], machine: Ceilings, *, tokens: int, batch: int, sink: bool = True) -> Floor:
    """Roofline floor of a program.

    Forward and input gradients run chunk by chunk in a serial region. Weight gradients are sunk out of the loop and run
    once over all tokens; with ``sink=False`` they run per chunk and read and write a float32 accumulator each time
    (8 bytes per parameter).

    Args:
        work: the program's matrix multiplies, e.g. ``cost(...).work()``.
        machine: ceilings, measured or assumed.
        tokens, batch: of the sequence.
        sink: whether weight gradients leave the token loop.

    Raises:
        InputError: a size below 1.
    """
    for name, value in (("tokens", tokens), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}.")
    forward = backward = 0.0
    for item in work:
        total = tokens + item.extra_tokens
        every = batch * total * item.share
        chunks = [total] if item.chunk is None else _chunks(total, item.chunk)
        once = sum(_seconds(machine, item, batch * c * item.share) * times for c, times in _counted(chunks))
        forward += once
        if item.graded:
            backward += once
        if item.trained and sink:
            backward += _seconds(machine, item, every)
        elif item.trained:
            extra = 0 if item.chunk is None else 8
            backward += sum(_seconds(machine, item, batch * c * item.share, extra) * times
                            for c, times in _counted(chunks))
    return Floor(forward, backward, _decode(work, machine, batch), machine, tokens, batch)


def _chunks(total: int, chunk: int) -> list[int]:
    rest = total % chunk
    return [chunk] * (total // chunk) + ([rest] if rest else [])


def _counted(chunks: list[int]) -> list[tuple[int, int]]:
    return [(c, chunks.count(c)) for c in dict.fromkeys(chunks)]


def _seconds(machine: Ceilings, item: Work, rows: float, extra: float = 0) -> float:
    return machine.gemm_seconds(rows, item.parameters, item.weights.read(rows), extra)


def _decode(work: Sequence[Work], machine: Ceilings, batch: int) -> float:
    """One token per row; a routed visit is taken by the share of rows it usually gets."""
    stacked: dict[object, list[Work]] = {}
    for i, item in enumerate(work):
        stacked.setdefault(("one", i) if item.stack is None else item.stack, []).append(item)
    return sum(_seconds(machine, items[0], batch * sum(w.share for w in items)) for items in stacked.values())
