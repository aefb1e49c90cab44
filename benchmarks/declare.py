"""What a benchmark declares: settings, and measurements of variants, each with an oracle for its numbers and a floor.

A benchmark is a file of ``benchmarks/suite`` that assigns ``BENCHMARK``; ``benchmarks/run.py`` does all the rest.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

Answer = dict[str, Tensor]
"""Named results that can be compared; the names of gradients start with ``gradient of``."""


class Run(Protocol):
    """A call to time. It may also have ``answer() -> Answer``, its numbers, and ``note() -> str``, what else it says."""

    def __call__(self) -> object: ...


@dataclass(frozen=True)
class Setting:
    """One option of a benchmark.

    Attributes:
        name: as in ``--name``.
        value: what it is without the option; its type is the option's type, and a tuple is given as ``a,b,c``.
        tiny: what it is with ``--tiny``; None = the same.
        choices: the legal values; empty = any.
    """

    name: str
    value: int | float | str | bool | tuple
    tiny: int | float | str | bool | tuple | None = None
    help: str = ""
    choices: tuple = ()


@dataclass(frozen=True)
class Variant:
    """One row of a measurement.

    Attributes:
        make: builds model and inputs, once, and returns what is timed.
        oracle: gives the right numbers, by other means; None = this row is what others are held against.
        tolerance: largest relative error of a result; None = that of the dtype.
        floor: the least ratio to the baseline that is possible, or what says so after the warm-up; None = not known.
    """

    make: Callable[[], Run]
    oracle: Callable[[], Answer] | None = None
    tolerance: float | None = None
    floor: float | Callable[[], float] | None = None


@dataclass(frozen=True)
class Measurement:
    """Rows that are compared with one of them.

    Attributes:
        part: name that ``--only`` takes.
        quantity: ``"seconds"`` of a call, or the ``"value"`` that one call returns.
        unit: of a value.
        per: results of one call (decoded tokens), by which seconds are divided.
        isolated: every row is built and run in a process of its own, in ``environment``.
        dtype: of the timed model, for tolerances and product rates.
        axis: ``(name, value)`` of the size that a sweep varies.
    """

    part: str
    title: str
    baseline: str
    variants: dict[str, Variant]
    quantity: str = "seconds"
    unit: str = "ms"
    per: int = 1
    isolated: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    axis: tuple[str, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Product:
    """A matrix product whose rate decides a result: ``rows`` tokens through a weight ``[outputs, inputs]``, ``uses`` times."""

    rows: int
    inputs: int
    outputs: int
    uses: int = 1


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        parts: names of its measurements, for ``--only``.
        measurements: yields them, built from the settings.
        products: the products whose rates are measured before anything is timed.
    """

    settings: tuple[Setting, ...]
    parts: tuple[str, ...]
    measurements: Callable[[Namespace], Iterator[Measurement]]
    products: Callable[[Namespace], list[Product]] = lambda s: []
