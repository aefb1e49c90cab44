"""Loop counts that follow the row's real tokens: where a cache is exact, and where it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from depthpass.errors import InputError
from depthpass.ir.program import Program

if TYPE_CHECKING:
    from depthpass.hf.calls.inputs import Call


def without_cache(call: Call, arguments: dict[str, object], programs: Sequence[Program]) -> Call:
    """A call whose rows have different loop counts, without a cache nobody asked for.

    Raises:
        InputError: a cache was asked for.
    """
    if call.cache is not None or arguments.get("use_cache"):
        counts = ", ".join(str(len(p.visits)) for p in programs)
        raise InputError(
            f"use_cache: the rows of this call have different loop counts ({counts} visits), because the count follows "
            "their real tokens; one cache holds rows of one count. Pass use_cache=False, put rows of equal counts together, "
            "or fix the count with dp.using(model, spec)."
        )
    return replace(call, use_cache=False)


def check_growth(model: Any, mask: object, prompt: tuple[int, int] | None, new: int | None) -> None:
    """Refuse to generate with a cache when the loop count would change on the way.

    As long as the count stays what it was, every cached token is what a forward pass over the whole row gives. Once it
    changes, every earlier token would have to run again.

    Args:
        mask: the prompt's attention mask, if any; ``generate`` drops one that is all ones.
        prompt: rows and columns of the prompt; None = not known.
        new: tokens that will be generated at most; None = not known. The last one is never run.

    Raises:
        InputError: rows of different counts, or a count that would change.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.long().sum(-1).tolist()
    elif prompt is not None:
        real = [prompt[1]] * prompt[0]
    else:
        return
    if new is None:
        return
    now = model._depth.plan
    first, most = min(real), max(real) + max(new - 1, 0)

    def settled(n: int) -> list:
        return [p.settled(tokens=n) for p in now.passes]

    if (start := settled(first)) != settled(most):
        change = next(n for n in range(first, most + 1) if settled(n) != start)
        raise InputError(
            f"generate: the loop count follows the row's real tokens, of which this call has {first} to {most}, and changes "
            f"at {change}: all earlier tokens would have to run again. Generate with use_cache=False, which computes the "
            "row so far afresh at every step, or fix the count for this request: with dp.using(model, spec)."
        )
