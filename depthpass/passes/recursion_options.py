"""What the options of Mixture-of-Recursions have to fulfil together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.passes.base import require

if TYPE_CHECKING:
    from depthpass.passes.mixture_of_recursions import MixtureOfRecursions

_EXPERT = {"mode": "topk", "capacity": None, "alpha": 0.1, "combine": "paper", "aux": 1e-3, "threshold": 0.5}
_TOKEN = {"balance": 0.1, "balancing": "loss", "rate": 1e-3}


def check_recursions(spec: MixtureOfRecursions) -> None:
    """Check the options against each other.

    Raises:
        SpecError: naming the field.
    """
    n = spec.name
    require(spec.start is None or spec.start >= 0, f"{n}.start", "a position of at least 0", spec.start)
    first = 1 if spec.start is None else spec.start
    require(spec.end is None or spec.end > first, f"{n}.end", f"a position above start={first}", spec.end,
            "Ranges are half-open.")
    require(spec.init == "stepwise" or not spec.keeps_layers, f"{n}.init", "no start and end beside it", spec.init,
            "With them the model keeps its own layers and nothing is shared anew.")
    require(spec.recursions >= 1, f"{n}.recursions", "at least 1", spec.recursions)
    other, of = (_EXPERT, "expert") if spec.router == "token" else (_TOKEN, "token")
    for field, default in other.items():
        require(getattr(spec, field) == default, f"{n}.{field}", f"router={of!r} beside it", getattr(spec, field))
    require(spec.alpha != 0, f"{n}.alpha", "a factor other than 0", spec.alpha)
    require(spec.alpha == 0.1 or spec.combine == "paper", f"{n}.alpha", "combine='paper' beside it", spec.combine)
    several = not isinstance(spec.threshold, float | int)
    for value in (spec.threshold,) if isinstance(spec.threshold, float | int) else spec.threshold:
        require(0 <= value <= 1 if several else 0 < value < 1, f"{n}.threshold", "a number between 0 and 1", value)
    require(spec.threshold == 0.5 or spec.mode == "threshold", f"{n}.threshold", "mode='threshold' beside it",
            spec.mode)
    for field in ("aux", "balance", "rate", "z"):
        require((getattr(spec, field) or 0) >= 0, f"{n}.{field}", "a number of at least 0", getattr(spec, field))
    require(spec.scope.isidentifier(), f"{n}.scope", "a plain name of letters, digits and _", spec.scope)
    _check_capacity(spec)


def _check_capacity(spec: MixtureOfRecursions) -> None:
    n, caps = spec.name, spec.capacity
    if caps is None:
        return
    require(spec.mode == "topk", f"{n}.capacity", "mode='topk' beside it", spec.mode)
    require(len(caps) == spec.recursions, f"{n}.capacity", f"{spec.recursions} shares", list(caps))
    require(all(0 < c <= 1 for c in caps), f"{n}.capacity", "shares in (0, 1]", list(caps))
    require(list(caps) == sorted(caps, reverse=True), f"{n}.capacity", "shares that do not grow", list(caps),
            "A token that left does not come back.")
    require(caps[0] == 1 or spec.kv == "recursion", f"{n}.capacity", f"a first share of 1 with kv={spec.kv!r}", list(caps),
            "Later recursions read the keys of the first one at every token, so it runs for every token.")
    require(caps[0] == 1 or spec.combine == "paper", f"{n}.capacity", "a first share of 1 with combine='delta'",
            list(caps))
