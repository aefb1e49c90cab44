"""``output_hidden_states``: the stream after every visit, as the stock model hands out the stream after every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from depthpass.errors import InputError
from depthpass.passes.taps import Taps
from depthpass.plan import Plan

SCOPE = "hidden_states"
EMBEDDED = f"{SCOPE}.embedded"


def with_states(model: Any, groups: Sequence[tuple[Plan, Tensor | None]]) -> Plan:
    """The plan of a call with a tap after every visit.

    Raises:
        InputError: rows have different numbers of visits, or a visit runs on some tokens only.
    """
    if len(groups) > 1:
        raise InputError("output_hidden_states: the rows of this call have different loop counts, so different numbers of "
                         "states. Put rows of equal counts together, or fix the count with dp.using.")
    plan = groups[0][0]
    if routed := next((o for o in plan.program.visits if plan.types[o.name].tokens is not None), None):
        raise InputError(f"output_hidden_states: the visit %{routed.name} of block {routed['index']} runs on the tokens of a "
                         "route only, so there is no stream of all tokens after it. Use taps (dp.Taps).")
    taps = Taps(at=tuple(range(len(plan.program.visits))), scope=SCOPE)
    return model._depth.plans.of(model, [*plan.passes, taps], plan.chunk)


def take_states(streams: dict[str, Tensor], last: Tensor) -> tuple[Tensor, ...]:
    """Take the states out of a call's streams: embedding, after every visit but the last, and after the final norm."""
    names = [n for n in streams if n.startswith(f"{SCOPE}.v")]
    states = [streams.pop(n) for n in sorted(names, key=lambda n: int(n.rpartition("v")[2]))]
    return (streams.pop(EMBEDDED), *states[:-1], last)
