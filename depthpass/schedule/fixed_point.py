"""The fixed-point schedule: serial regions as sweeps over all tokens instead of a token loop (Jacobi iteration)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from depthpass.errors import SpecError, did_you_mean
from depthpass.prompt import in_notebooks

SCHEDULES = ("sequential", "fixed_point")
STARTS = ("zero", "plain")


@in_notebooks
@dataclass(frozen=True)
class FixedPoint:
    """How the sweeps of a serial region are run and when they end.

    c = what the region's delays inject, for all tokens. One sweep runs the region over all tokens at once with the c of the
    sweep before, and c follows anew. After k sweeps the first k chunks are exact whatever the weights are, because a chunk
    reads earlier chunks only, so as many sweeps as chunks are always enough.

    Args:
        tol: chunks whose c changed by at most this, relative to its norm, are taken over before they must be right. None =
            rounding: 4 units in the last place of c's dtype. 0 = only where c did not change by a bit. Above rounding the
            result is approximate: with a rate rho below 1 its error is about ``rho / (1 - rho) * tol``.
        max_sweeps: sweeps a chunk may take. None = as many as pay (see ``ridge``), at most the number of chunks.
        window: chunks that are swept together; None = all that are left. 1 is the sequential schedule.
        exact: True = where ``max_sweeps`` are over, the tokens that are left run in the token loop. False = the last sweep is
            taken as it is: another model than the sequential one, cut off after ``max_sweeps - 1`` hops.
        ridge: rows from which a matrix product is bound by arithmetic and no longer by reading its weights; decides whether
            sweeps pay. None = 22 on a CPU, 184 elsewhere (see ``depthpass calibrate``).
        start: what the first sweep reads behind its first chunk: ``zero`` streams through every delay, or nothing at all, as
            the ``plain`` model without delays does (T2MLR, arXiv 2607.15178). The same where only bridges read delays.
        backward: gradients flow through the last so many sweeps, unrolled; what enters them is a constant. None = those of
            the fixed point. Needs ``exact=False``. Memory is that of so many plain forward passes.

    Raises:
        SpecError: a field is out of range, or fields contradict each other.
    """

    tol: float | None = None
    max_sweeps: int | None = None
    window: int | None = None
    exact: bool = True
    ridge: float | None = None
    start: Literal["zero", "plain"] = "zero"
    backward: int | None = None

    def __post_init__(self) -> None:
        _number("tol", self.tol, 0)
        _number("ridge", self.ridge, 1)
        for name in ("max_sweeps", "window", "backward"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SpecError(f"{name}: expected an integer of at least 1, or None, got {value!r}.")
        if type(self.exact) is not bool:
            raise SpecError(f"exact: expected True or False, got {self.exact!r}.")
        if not self.exact and self.max_sweeps is None:
            raise SpecError("exact=False: expected max_sweeps beside it, got None. Without a limit the sweeps run until they "
                            "are exact; leave exact out, or say how many sweeps the model has.")
        if not self.exact and self.window is not None:
            raise SpecError(f"exact=False: expected no window, got window={self.window}. A model that is cut off after "
                            "max_sweeps sweeps is defined over the whole row; leave window out.")
        if self.start not in STARTS:
            raise SpecError(f"start: expected 'zero' or 'plain', got {self.start!r}.{did_you_mean(str(self.start), STARTS)}")
        if self.start == "plain" and self.window is not None:
            raise SpecError(f"start='plain': expected no window, got window={self.window}. A plain pass runs over the whole row.")
        if self.backward is None:
            return
        if self.exact:
            raise SpecError(f"backward={self.backward}: expected exact=False and max_sweeps beside it, got exact=True. How many "
                            "sweeps an exact solution takes depends on the data; leave backward out for its own gradient.")
        if self.backward > (self.max_sweeps or 0):
            raise SpecError(f"backward: expected at most the {self.max_sweeps} sweeps of max_sweeps, got {self.backward}.")

    @property
    def approximate(self) -> str | None:
        """Why results may differ from the sequential schedule by more than rounding, or None."""
        if not self.exact and self.max_sweeps is not None:
            return (f"scoring stops after {self.max_sweeps} sweeps, so values pass {_hops(self.max_sweeps - 1)} at most; "
                    "one-token decoding passes all, so it differs from scoring")
        if self.tol:
            return (f"chunks are taken over once their input changes by at most {self.tol:g}, so scoring differs from one-"
                    "token decoding by about as much")
        return None

    def __str__(self) -> str:
        set_ = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"fixed_point({', '.join(set_)})"

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not at their default, as plain data; :func:`load_schedule` reads them back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class Measure:
    """Token loop, with a measurement of what sweeps would do beside it; see :func:`depthpass.contraction`.

    Args:
        sweeps: to measure at most; None = as many as there are chunks.
    """

    sweeps: int | None = None

    def __post_init__(self) -> None:
        if self.sweeps is not None and (type(self.sweeps) is not int or self.sweeps < 1):
            raise SpecError(f"max_sweeps: expected an integer of at least 1, or None, got {self.sweeps!r}.")


def load_schedule(schedule: Any = "sequential", **options: Any) -> FixedPoint | None:
    """The schedule that ``dp.transform`` was asked for; None = sequential.

    Args:
        schedule: ``"sequential"``, ``"fixed_point"``, a :class:`FixedPoint`, or the mapping a checkpoint holds.
        options: fields of :class:`FixedPoint`, for ``"fixed_point"``; None = not given.

    Raises:
        SpecError: an unknown schedule, or options that belong to another one.
    """
    given = {k: v for k, v in options.items() if v is not None}
    if isinstance(schedule, FixedPoint | Mapping) and given:
        raise SpecError(f"schedule: expected the options inside the {type(schedule).__name__}, got {', '.join(given)} beside "
                        "it.")
    if isinstance(schedule, FixedPoint):
        return schedule
    known = [f.name for f in fields(FixedPoint)]
    if isinstance(schedule, Mapping):
        for key in schedule:
            if key not in known:
                raise SpecError(f"schedule: unknown field {key!r}.{did_you_mean(str(key), known)} "
                                f"Fields: {', '.join(known)}.")
        return FixedPoint(**schedule)
    if schedule not in SCHEDULES:
        raise SpecError(f"schedule: expected 'sequential', 'fixed_point' or a FixedPoint, got {schedule!r}."
                        f"{did_you_mean(str(schedule), SCHEDULES)}")
    if schedule == "sequential":
        if given:
            raise SpecError(f"schedule='sequential': expected no {', '.join(given)}, which are options of "
                            "schedule='fixed_point'.")
        return None
    return FixedPoint(**given)


def _number(name: str, value: Any, least: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise SpecError(f"{name}: expected a number of at least {least}, or None, got {value!r}.")


def _hops(count: int) -> str:
    return f"{count} hop" if count == 1 else f"{count} hops"
