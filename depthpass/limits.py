"""What a spec may ask for: a spec comes with a checkpoint, so it must not be able to fill the memory or run for ever."""

from __future__ import annotations

from reprlib import Repr

from depthpass.errors import SpecError

INTEGER = 1 << 16
"""Largest count, group, rank or position of a spec."""

VISITS = 1 << 13
"""Most block visits of a program; ops have eight times as many."""

OPS = 8 * VISITS

TEXT = 1 << 20
"""Most characters of a spec file."""

FORMULA = 256
"""Most characters of a loop count that is an expression in n."""

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlong, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxlevel = 40, 20, 20, 20, 4


def shown(value: object) -> str:
    """A value for a message: its ``repr`` where that is short, else its beginning."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print thousands of digits
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be printed"


def check_program(visits: int, ops: int, who: str = "program") -> None:
    """Refuse a program that grows beyond what can be scheduled in a few seconds.

    Raises:
        SpecError: it does.
    """
    if visits > VISITS or ops > OPS:
        what = f"{visits} block visits" if visits > VISITS else f"{ops} ops"
        raise SpecError(f"{who}: expected a program of at most {VISITS} block visits and {OPS} ops, got at least {what}. Ask "
                        "for fewer iterations, or a smaller range of blocks.")
