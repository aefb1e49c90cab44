"""Numbers with their units, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

Value = int | float | Fraction | str
BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB")


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
    """

    key: str
    label: str
    value: Value
    unit: str
    note: str = ""
    stock: Value | None = None
    out_of: int | None = None
    least: bool = False

    @property
    def text(self) -> str:
        """Value with unit, e.g. ``14 of 16 block visits``."""
        if self.out_of is not None:
            return f"{self.figure} {self.unit}"
        return ("at least " if self.least else "") + with_unit(self.value, self.unit)

    @property
    def figure(self) -> str:
        """Value without unit."""
        whole = f" of {plain(self.out_of)}" if self.out_of is not None else ""
        return ("at least " if self.least else "") + plain(self.value) + whole

    @property
    def remark(self) -> str:
        """The stock model's number and the note, in words."""
        stock = "" if self.stock is None else f"stock {plain(self.stock)}"
        if stock and self.ratio is not None:
            stock += f", ratio {plain(self.ratio)}"
        return "; ".join(part for part in (stock, self.note) if part)

    @property
    def ratio(self) -> float | None:
        """Value over the stock model's; None where that makes no sense."""
        if not self.stock or isinstance(self.stock, str) or isinstance(self.value, str):
            return None
        return float(self.value / self.stock)


@dataclass(frozen=True)
class Section:
    """Numbers that belong together."""

    title: str
    numbers: tuple[Number, ...]


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


def with_unit(value: Value, unit: str) -> str:
    """A number with its unit; large byte counts also in binary multiples.

    >>> with_unit(3145728, "bytes")
    '3,145,728 bytes (3.0 MiB)'
    """
    text = f"{plain(value)} {unit}".strip()
    if unit not in ("byte", "bytes") or isinstance(value, str) or value < 1024:
        return text
    power = min(int(math.log(value, 1024)), len(BINARY))
    return f"{text} ({value / 1024**power:.1f} {BINARY[power - 1]})"


def as_json(value: Value | None) -> int | float | str | None:
    """A value as JSON can hold it: fractions as text such as ``7/2``, whole fractions as integers."""
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else str(value)
    return value
