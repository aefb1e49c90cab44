"""Numbers with their units, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from depthpass.prompt import at_prompt, in_notebooks

SINGULAR = {f"{word}s": word for word in (
    "token", "block visit", "block call", "block", "step", "slot", "position", "parameter", "value", "round", "visit")}
SINGULAR["runs through one block"] = "run through one block"
"""Units of 1."""

Value = int | float | Fraction | str
BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB")


@in_notebooks
@dataclass(frozen=True)
class Number:
    """One number of a report.

    Attributes:
        key: name in JSON.
        label: name in text.
        value: the number; a string for a closed form.
        unit: e.g. ``block visits``; empty for a plain ratio or a count whose label says what it counts.
        note: what it counts, or how it was found.
        stock: the same number of the stock model, where it has one.
        out_of: the whole that the value is a part of, in the same unit.
        least: whether the value is a lower bound.
        repeats: whether it says only what another row of the report says: kept in JSON, left out where people read.
    """

    key: str
    label: str
    value: Value
    unit: str
    note: str = ""
    stock: Value | None = None
    out_of: int | None = None
    least: bool = False
    repeats: bool = False

    @property
    def text(self) -> str:
        """Value with unit, e.g. ``14 of 16 block visits`` or ``38.75 MiB``."""
        return f"{self.figure} {self.short_unit}".strip()

    @property
    def figure(self) -> str:
        """Value without unit, at most four digits of a large one; :attr:`short_unit` has its prefix."""
        if self.out_of is not None:
            return f"{plain(self.value)} of {plain(self.out_of)}"
        return ("at least " if self.least else "") + scaled(self.value, self.unit)[0]

    @property
    def short_unit(self) -> str:
        """The unit that :attr:`figure` counts in, e.g. ``MiB`` or ``G parameters``."""
        if self.out_of is not None:
            return self.unit
        unit = scaled(self.value, self.unit)[1]
        return SINGULAR.get(unit, unit) if self.value == 1 else unit

    @property
    def remark(self) -> str:
        """The stock model's number and the note, in words."""
        stock = "" if self.stock is None else f"stock {short(self.stock, self.unit)}"
        if stock and self.ratio is not None:
            stock += f", {times(self.ratio)}"
        return "; ".join(part for part in (stock, self.note) if part)

    @property
    def ratio(self) -> float | None:
        """Value over the stock model's; None where that makes no sense."""
        if not self.stock or isinstance(self.stock, str) or isinstance(self.value, str):
            return None
        return float(self.value / self.stock)


@at_prompt
@dataclass(frozen=True)
class Section:
    """Numbers that belong together."""

    title: str
    numbers: tuple[Number, ...]

    @property
    def shown(self) -> tuple[Number, ...]:
        """The numbers without those that repeat another."""
        return tuple(x for x in self.numbers if not x.repeats)


def plain(value: Value) -> str:
    """A number without unit: thousands separated, fractions kept, floats to four digits.

    >>> plain(1235814400), plain(Fraction(7, 2)), plain(0.000123456)
    ('1,235,814,400', '7/2', '0.0001235')
    """
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Fraction):
        return str(value)
    return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"


def scaled(value: Value, unit: str) -> tuple[str, str]:
    """A number as people read it, and its unit: bytes in Ki, Mi, Gi; seconds in ms, us; others from a million on in M, G, T.

    >>> scaled(3145728, "bytes"), scaled(1235814400, "parameters"), scaled(0.00425, "s"), scaled(39, "steps")
    (('3', 'MiB'), ('1.236', 'G parameters'), ('4.25', 'ms'), ('39', 'steps'))
    """
    if isinstance(value, bool | str | Fraction):
        return plain(value), unit
    if unit in ("byte", "bytes"):
        return _prefixed(value, 1024, BINARY, 1024, unit)
    if unit == "s":
        # In whole nanoseconds upwards, so that a unit of time is never a fraction.
        size = next((i for i, (_, factor) in enumerate(SECONDS) if abs(value) >= factor), len(SECONDS) - 1)
        name, factor = SECONDS[size]
        return (_digits(value / factor), name) if value else ("0", "s")
    prefixes = tuple(p + ("" if unit.startswith("FLOP") else " ") + unit for p in ("k", "M", "G", "T", "P", "E"))
    return _prefixed(value, 1000, prefixes, 1_000_000, unit)


SECONDS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


def _prefixed(value: float, base: int, prefixes: tuple[str, ...], smallest: int, unit: str) -> tuple[str, str]:
    if abs(value) < smallest:
        return plain(value), unit
    power = min(int(math.log(abs(value), base) + 1e-12), len(prefixes))
    # 999,960,000 rounds to 1000 M: it is written 1 G.
    if float(f"{value / base**power:.4g}") >= base and power < len(prefixes):
        power += 1
    return _digits(value / base**power), prefixes[power - 1]


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short(value: Value, unit: str) -> str:
    """The number of :func:`scaled` with the prefix of its unit, and no more: ``1.236 G``, ``38.75 MiB``, ``548``."""
    figure, name = scaled(value, unit)
    if name == unit:
        return figure
    return f"{figure} {name if unit in ('byte', 'bytes', 's') else name.removesuffix(unit).strip()}"


def times(ratio: float) -> str:
    """A ratio.

    >>> times(34.25), times(187_500.0)
    ('34.25x', '187,500x')
    """
    rounded = float(f"{ratio:.4g}")
    return f"{rounded:,.0f}x" if 1000 <= rounded < 1e12 else f"{plain(rounded)}x"


def as_json(value: Value | None) -> int | float | str | None:
    """A value as JSON can hold it: fractions as text such as ``7/2``, whole fractions as integers."""
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else str(value)
    return value
